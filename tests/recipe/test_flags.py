"""Flags of one stage, names of other trainers, and training on with a changed recipe."""

import argparse
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flipscale import cli
from flipscale.io.errors import UserError
from flipscale.model.configuration_flip import FlipTextConfig, FlipVisionConfig
from flipscale.recipe.flags import _SETTINGS
from flipscale.recipe.optim import StageRecipe
from flipscale.recipe.recipe import build_parser, parse_fields
from flipscale.start.complete_recipe import parse_recipe

NAMED = "[{name: masked, samples: 64, base_lr: 0.1}, {name: a.b, samples: 32}, {name: '0', samples: 16}]"


@pytest.mark.parametrize(
    ("flags", "stage", "field", "value"),
    [
        (["--stages.masked.base_lr", "0.001"], 0, "base_lr", 0.001),
        (["--stages.masked.base_lr", "1", "--stages.masked.base_lr", "2"], 0, "base_lr", 2.0),
        (["--stages.a.b.image_size", "16"], 1, "image_size", 16),
        (["--stages.masked.base_lr", "null"], 0, "base_lr", None),
        (["--stages.0.name", "7"], 2, "name", "7"),  # the stage of that name, not the first
    ],
)
def test_a_flag_changes_one_field_of_a_stage(flags: list[str], stage: int, field: str, value: object) -> None:
    before, after = (parse_fields(["--stages", NAMED, *more]).stages for more in ([], flags))
    assert getattr(after[stage], field) == value
    pairs = enumerate(zip(before, after, strict=True))
    changed = [(n, name) for n, (old, new) in pairs for name in vars(old) if vars(old)[name] != vars(new)[name]]
    assert changed == [(stage, field)]


def test_the_flag_wins_over_a_file_and_is_printed(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--stages.unmasked.base_lr", "0.5", "--config", str(write_recipe(tmp_path / "run"))]
    assert [stage.base_lr for stage in parse_recipe(words).stages] == [0.012, 0.5]
    with pytest.raises(SystemExit):
        parse_recipe([*words, "--print_config"])
    assert [stage["base_lr"] for stage in yaml.safe_load(capsys.readouterr().out)["stages"]] == [0.012, 0.5]


LISTS = """
stages: [{name: a, samples: 64, mask_ratio: 0.75, warmup_samples: 32, base_lr: 0.1}]
data: {sources: [{dataset: a, weight: 3, caption_columns: [alt]}]}
eval: {tasks: [{kind: zero_shot, data: a, image_size: 8}]}
model: {vision_config: {image_size: 32}}
"""
STAGE = {"name": "b", "samples": 16}


@pytest.mark.parametrize(
    ("words", "section"),
    [
        (["--stages", json.dumps([STAGE])], {"stages": [STAGE]}),
        (["--stages", json.dumps([STAGE | {"mask_ratio": 0.5}]), "--stages", json.dumps([STAGE])], {"stages": [STAGE]}),
        (["--stages", json.dumps([STAGE]), "--stages.b.base_lr", "1"], {"stages": [STAGE | {"base_lr": 1.0}]}),
        (["--data.sources", "[{shards: b}]"], {"data": {"sources": [{"shards": "b"}]}}),
        (["--data", "{sources: [{shards: b}]}"], {"data": {"sources": [{"shards": "b"}]}}),
        (["--eval.tasks", "[{kind: retrieval, data: b}]"], {"eval": {"tasks": [{"kind": "retrieval", "data": "b"}]}}),
    ],
)
@pytest.mark.parametrize("order", ["file first", "flags first", "second file", "extends"])
def test_a_list_replaces_another_as_long(words: list[str], section: Any, order: str, tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(LISTS)
    start = ["--config", str(tmp_path / "old.yaml")]
    if order in ("second file", "extends"):
        extends = {"extends": "old.yaml"} if order == "extends" else {}
        (tmp_path / "new.yaml").write_text(json.dumps(section | extends))
        words = ["--config", str(tmp_path / "new.yaml")]
        start = start if order == "second file" else []
    found = parse_fields([*words, *start] if order == "flags first" else [*start, *words])
    (tmp_path / "whole.yaml").write_text(json.dumps({**yaml.safe_load(LISTS), **section}))
    assert found == parse_fields(["--config", str(tmp_path / "whole.yaml")])


@pytest.mark.parametrize("extends", [True, False])
def test_a_second_file_merges_mappings_as_one_that_extends(extends: bool, tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(f"{LISTS}seed: 3\noptim: {{weight_decay: 0.1, lora: {{rank: 2}}}}")
    (tmp_path / "new.yaml").write_text(
        ("extends: old.yaml\n" if extends else "")
        + "model: {vision_config: {patch_size: 8}}\noptim: {lora: {<<: {rank: 4}}}\n"
    )
    files = ["--config", str(tmp_path / "new.yaml")]
    recipe = parse_fields(files if extends else ["--config", str(tmp_path / "old.yaml"), *files])
    assert recipe.model.vision_config == {"image_size": 32, "patch_size": 8}
    assert (recipe.seed, recipe.optim.weight_decay, recipe.optim.lora.rank) == (3, 0.1, 4)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--stages.maskd.base_lr 1", "--stages.maskd.base_lr .* --stages.masked.base_lr"),
        ("--stages.masked.lr 1", "--stages.masked.lr .*base_lr"),
        ("--stages.masked.base_lr -1", r"stages\[0\].base_lr is -1"),
        ("--stages.masked.base_lr --seed 3", "--stages.masked.base_lr has no value"),
        ("--lr 1", "--lr .* --stages.STAGE.base_lr"),
        ("--batch_size 1", "--batch_size .* --data.global_batch_size"),
        ("--precision bf16", "--precision .* mixed_precision of the launch file"),
        ("--frobnicate 1", "--frobnicate .* --help"),
    ],
)
def test_flags_that_are_no_field(flags: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_recipe(["--stages", NAMED, *flags.split()])


def test_settings_exist() -> None:
    known = {flag for action in build_parser()._actions for flag in action.option_strings}
    known |= {f"--stages.STAGE.{name}" for name in StageRecipe.__dataclass_fields__}
    flags = {re.split("[, ]", setting)[0] for setting in _SETTINGS.values() if setting.startswith("--")}
    in_section = {flag for flag in flags - known if flag.startswith(("--model.vision_config.", "--model.text_config."))}
    assert flags - known == in_section
    fields = {*FlipVisionConfig().to_dict(), *FlipTextConfig().to_dict()}
    assert {flag.split(".")[-1] for flag in in_section} <= fields
    assert not {f"--{name}" for name in _SETTINGS} & known


def test_all_flags_of_open_clip_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    params = pytest.importorskip("open_clip_train.params")
    flags: list[str] = []

    def collect(parser: argparse.ArgumentParser, *_: object) -> None:
        flags.extend(option for action in parser._actions for option in action.option_strings)
        raise InterruptedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", collect)
    with pytest.raises(InterruptedError):
        params.parse_args([])
    monkeypatch.undo()
    known = {flag for action in build_parser()._actions for flag in action.option_strings}
    asked = [flag for flag in flags if flag not in {*known, "-h", "--help"}]
    assert len(asked) > 60
    for flag in asked:
        with pytest.raises(UserError, match=f"^{flag} .*(; use |; leave it out: )"):
            parse_recipe(["--stages", NAMED, flag, "1"])


@pytest.fixture
def short(recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a recipe of two steps whose vocabulary is that of its tokenizer, in the working directory."""
    monkeypatch.chdir(tmp_path)
    model = {**recipe["model"], "text_config": dict(recipe["model"]["text_config"])}
    del model["text_config"]["vocab_size"]
    stages = [{"name": "only", "samples": 32, "mask_ratio": 0.5, "base_lr": 0.01}]
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**recipe, "model": model, "stages": stages, "output_dir": "mine"}))
    return file


def vocabulary(run: str) -> int:
    return json.loads(Path(run, "model/config.json").read_text())["text_config"]["vocab_size"]


def test_the_refusal_of_a_changed_rate_names_a_command_that_works(short: Path, refused: Callable[..., str]) -> None:
    cli.main(["pretrain", "--config", "mine.yaml"])
    changed = ["pretrain", "--config", "mine.yaml", "--stages.only.base_lr", "0.02"]
    line = refused(*changed)
    assert "stages[0].base_lr: 0.01, now 0.02" in line
    flags = shlex.split(line.split(" add ")[1])
    assert flags == ["--model.init_from", "mine", "--output_dir", "mine_2"]
    cli.main([*changed, *flags])
    assert yaml.safe_load(Path("mine_2/recipe.yaml").read_text())["stages"][0]["base_lr"] == 0.02
    assert vocabulary("mine_2") == vocabulary("mine") == 12
    # Weights of another shape cannot be trained on.
    assert "--model.init_from" not in refused(*changed, "--model.text_config.hidden_size", "64")
    # The run continues without its start weights, with the vocabulary that it recorded.
    shutil.rmtree("mine")
    shutil.rmtree("mine_2/model")
    Path("mine_2/DONE").unlink()
    cli.main([*changed, *flags])
    assert vocabulary("mine_2") == 12


@pytest.mark.parametrize("name", ["open_clip:ViT-B-16,laion2b_s34b_b88k", "hf:openai/clip-vit-base-patch16"])
def test_start_weights_of_another_program(name: str, short: Path, refused: Callable[..., str]) -> None:
    line = refused("pretrain", "--config", "mine.yaml", "--model.init_from", name)
    assert f"model.init_from is {name!r}" in line
    assert not Path("mine").exists()
