"""`flipscale init`: a recipe that trains, from data alone."""

import dataclasses
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from conftest import COLOURS, add_member, metrics, write_shards

from flipscale import cli
from flipscale.data.sources.opening import open_shards
from flipscale.data.tokenizers import load_tokenizer
from flipscale.evaluation.suite import planned_tasks
from flipscale.hub.convert_open_clip import open_clip_config
from flipscale.init import _fitted, _recipe_of, _recipe_text, measured_rates
from flipscale.io import progress
from flipscale.objectives.build import build_config
from flipscale.planning.proposal import (
    FEW_CLASSES,
    MOST_REPEATED,
    Survey,
    commented_yaml,
    most_samples,
    propose,
    samples_in,
    survey,
)
from flipscale.recipe.data import DataRecipe
from flipscale.recipe.optim import StageRecipe
from flipscale.training.complete_recipe import parse_recipe
from flipscale.training.schedule import plan_stages

DATA = Survey(pairs=300, width=500, height=400, tokens=5, captions={f"a {n}": 1 for n in range(300)}, sampled=300)


@pytest.fixture
def init(shards: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs `flipscale init` in a folder of its own and returns the recipe's file."""
    monkeypatch.chdir(tmp_path)

    def init(*options: str) -> Path:
        cli.main(["init", "mine.yaml", "--shards", str(shards), "--tokenizer", str(tokenizer_dir), *options])
        return tmp_path / "mine.yaml"

    return init


def test_a_recipe_for_this_machine_trains(
    init: Callable[..., Path], shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    file = init("--tests", str(shards), "--minutes", "0.02")
    said = capsys.readouterr()
    first, measuring, *_, length, command = said.out.splitlines()
    assert measuring == "measuring the speed: a trainer starts and takes 12 steps of each stage"
    assert {"0 of 24", "24 of 24"} <= set(re.findall(r"measuring: (\d+ of \d+) steps done", said.err))
    assert first.startswith(f"{shards}: 96 pairs; the median picture has ")
    assert "as measured here; " in length
    plain = "flipscale pretrain --config mine.yaml"
    assert command in (f"next: {plain}", f"next: ACCELERATE_MIXED_PRECISION=bf16 {plain}")  # by the machine
    assert said.err.splitlines()[-1].startswith("warning: captions repeat, as about ")
    text = file.read_text()
    assert all(
        line in " ".join(text.split()) for line in ("# Written by `flipscale init`.", "# Warning: captions repeat")
    )
    recipe = parse_recipe(["--config", str(file)])
    assert (recipe.budget_minutes, recipe.eval.every_share, recipe.log.every_samples) == (0.02, 0.1667, None)
    assert sum(stage.share for stage in recipe.stages) == pytest.approx(1.0)
    assert [task.kind for task in planned_tasks(recipe.eval)] == ["zero_shot", "retrieval"]
    cli.main(["pretrain", "--config", "mine.yaml", "--dry_run"])
    cli.main(["pretrain", "--config", "mine.yaml", "--log.report_to", "[]"])
    assert {"zero_shot/top1", "retrieval/image_to_text_r1"} <= metrics(file.parent / "runs/mine")[-1].keys()
    # Training on from its own weights: the vocabulary is theirs.
    cli.main(["pretrain", "--config", "mine.yaml", "--model.init_from", "runs/mine", "--output_dir", "runs/mine_on"])
    configs = [json.loads((file.parent / f"runs/{name}/model/config.json").read_text()) for name in ("mine", "mine_on")]
    assert configs[0]["text_config"]["vocab_size"] == configs[1]["text_config"]["vocab_size"] < 100


def test_a_recipe_for_gpus_elsewhere(init: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = parse_recipe(["--config", str(init("--gpu", "h100", "--num_gpus", "8", "--hours", "12"))])
    *_, length, command = capsys.readouterr().out.splitlines()
    assert "as computed for 8 H100 (docs/planning.md)" in length
    assert command == (
        "next: flipscale launch_files . && accelerate launch --config_file ds_configs/ddp.yaml --num_processes 8 "
        "-m flipscale.pretrain --config mine.yaml"
    )
    assert recipe.data.global_batch_size % 8 == 0
    assert 0 < recipe.budget_minutes <= 12 * 60
    assert [stage.samples for stage in recipe.stages] == [None, None]


def test_the_speed_decides_no_field_but_the_time(tokenizer_dir: Path) -> None:
    proposal = propose(DATA, {}, 30, cores=2, num_gpus=0)
    proposal.fields["data"]["tokenizer"] = str(tokenizer_dir)
    proposal.fields["eval"] = {"tasks": []}
    short, long = (yaml.safe_load(_recipe_text(proposal, [], "", minutes)) for minutes in (0.5, 30.0))
    assert (short.pop("budget_minutes"), long.pop("budget_minutes")) == (0.5, 30.0)
    assert short == long
    assert plan_stages([StageRecipe(**stage) for stage in short["stages"]], proposal.batch_size, 30.0)[-1].last == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "h100"], "gpu and hours go together"),
        (["--hours", "3"], "gpu and hours go together"),
        (["--gpu", "h100", "--hours", "3", "--minutes", "3"], "minutes is for this machine and gpu for others"),
        (["--num_gpus", "3"], "num_gpus is for machines elsewhere"),
        (["--gpu", "abacus", "--hours", "3"], "gpu is 'abacus'; use one of h100, h100_pcie, "),
        (["--tests", "nowhere"], "nowhere"),
        (["--tokenizer", "./none"], "; `flipscale prepare tokenizer "),
    ],
)
def test_errors_of_options(
    shards: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str],
    message: str, refused: Callable[..., str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert message in refused("init", "mine.yaml", "--shards", shards, "--tokenizer", tokenizer_dir, *options)
    assert not Path("mine.yaml").exists()


def test_errors_of_files_and_data(shards: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "has no ending .yaml" in refused("init", tmp_path / "recipe", "--shards", shards)
    write_shards(tmp_path / "few", [3])
    line = refused("init", tmp_path / "new.yaml", "--shards", tmp_path / "few")
    assert "has 3 pairs; training needs at least 16" in line


def test_nothing_but_bad_samples(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    with tarfile.open(tmp_path / "bad/0.tar", "w") as tar:
        for number in range(20):
            add_member(tar, f"{number}.jpg", b"no picture")
            add_member(tar, f"{number}.txt", b"a red disc")
    with pytest.raises(ValueError, match="none of 20 samples has a picture"):
        survey(open_shards(str(tmp_path / "bad"), DataRecipe()), load_tokenizer(str(tokenizer_dir), 8))


def test_a_test_set_without_labels(
    shards: Path, tokenizer_dir: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "silent").mkdir()
    with tarfile.open(tmp_path / "silent/0.tar", "w") as tar:
        add_member(tar, "0.jpg", cv2.imencode(".jpg", np.zeros((40, 40, 3), np.uint8))[1].tobytes())
    words = ("--shards", shards, "--tokenizer", tokenizer_dir, "--tests", tmp_path / "silent")
    assert "silent has no classnames.txt and no captions" in refused("init", tmp_path / "mine.yaml", *words)


def test_an_unmeasurable_speed(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = parse_recipe(["--config", str(write_recipe(tmp_path / "run", data={"shards": "nowhere"}))])
    with pytest.raises(ValueError, match=r"ended with exit code 2: .*nowhere"):
        measured_rates(recipe, 4, tmp_path)


def test_no_gpu_is_large_enough(tokenizer_dir: Path) -> None:
    proposal = propose(DATA, {}, 30, cores=2, num_gpus=0)
    proposal.fields["data"]["tokenizer"] = str(tokenizer_dir)
    with pytest.raises(ValueError, match="a batch of 32 do not fit 4 GPUs of 0 GiB"):
        _fitted(proposal, 4, 0)
    assert proposal.fields["data"]["micro_batch_size"] == 1
    assert proposal.fields["model"]["gradient_checkpointing"]


def test_the_survey(shards: Path, tokenizer_dir: Path) -> None:
    found = survey(open_shards(str(shards), DataRecipe()), load_tokenizer(str(tokenizer_dir), 8))
    assert (found.pairs, found.sampled, found.tokens, len(found.captions)) == (96, 96, 3, 16)
    assert 36 <= min(found.width, found.height) <= max(found.width, found.height) < 60


def test_repeated_captions_of_batches() -> None:
    counts = {"a": 60, "b": 30, **{str(n): 1 for n in range(110)}}
    captions = [caption for caption, count in counts.items() for _ in range(count)]
    rng, found = np.random.default_rng(0), []
    for _ in range(2000):
        batch = Counter(rng.permutation(captions)[:16].tolist())
        found.append(sum(count for count in batch.values() if count > 1))
    assert dataclasses.replace(DATA, captions=counts).repeated(16) == pytest.approx(np.mean(found), rel=0.03)
    assert DATA.repeated(256) == 0


@pytest.mark.parametrize("num_gpus", [0, 1, 8, 24])
@pytest.mark.parametrize("pairs", [16, 300, 20_000, 3_000_000, 400_000_000, 2_000_000_000])
def test_proposals(pairs: int, num_gpus: int, tokenizer_dir: Path) -> None:
    # Few pairs with short captions and little time, or many pairs with long captions.
    minutes = 3 if pairs < 1000 else 30
    data = dataclasses.replace(DATA, pairs=pairs, tokens=minutes)
    proposal = propose(data, {}, minutes, cores=2, num_gpus=num_gpus)
    assert proposal.warnings == []
    proposal.fields["data"]["tokenizer"] = str(tokenizer_dir)
    in_time = samples_in(60 * minutes, [1000.0, 500.0], proposal)
    assert 30_000 * minutes <= in_time <= 60_000 * minutes
    recipe = _recipe_of(proposal, min(in_time, most_samples(data, proposal)))
    stages = plan_stages(recipe.stages, recipe.data.global_batch_size)
    assert [stage.mask_ratio > 0 for stage in stages] == [True, False]
    assert stages[0].peak_lr == pytest.approx(
        1e-3 if num_gpus else 2e-3 * (recipe.data.global_batch_size / 256) ** 0.5, rel=0.005
    )
    assert recipe.data.global_batch_size % max(num_gpus, 1) == 0
    assert recipe.data.global_batch_size <= max(pairs, num_gpus)
    open_clip_config(build_config(recipe))


def test_a_warning_of_repeated_captions() -> None:
    """A third of the pairs share a caption, which is too much, and too little for names of classes."""
    data = dataclasses.replace(DATA, captions={"cat": 100, **{f"a {n}": 1 for n in range(200)}})
    proposal = propose(data, {}, 30, cores=2, num_gpus=0)
    (warning,) = proposal.warnings
    assert warning.startswith("captions repeat, as about 11 of the 32 in a batch also belong to another pair")
    assert "loss.positives equal_captions" in warning
    assert MOST_REPEATED * 32 < data.repeated(32) < FEW_CLASSES * 32
    assert "data.shards" not in proposal.reasons


@pytest.mark.parametrize("num_gpus", [0, 8])
def test_captions_of_a_few_classes_are_no_warning(num_gpus: int) -> None:
    data = dataclasses.replace(DATA, captions={"cat": 150, "dog": 150})
    proposal = propose(data, {}, 30, cores=2, num_gpus=num_gpus)
    assert proposal.warnings == []
    count = proposal.batch_size
    assert f"classes: about {count} of the {count} in a batch also" in proposal.reasons["data.shards"]


def test_a_recipe_for_folders_of_classes(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(32):
        place = Path(f"pictures/a {list(COLOURS)[number % 2]} circle")
        place.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(place / f"{number}.png"), np.full((40, 40, 3), number, np.uint8))
    cli.main(["prepare", "shards", "pictures", "data", "--labels", "folder", "--num_workers", "1"])
    capsys.readouterr()
    gpus = ["--gpu", "h100", "--hours", "1"]  # so nothing is measured
    cli.main(["init", "mine.yaml", "--shards", "data", "--tokenizer", str(tokenizer_dir), *gpus])
    said = capsys.readouterr()
    (line,) = [line for line in said.out.splitlines() if "classify" in line]
    assert line.startswith("captions name a few classes: about 8 of the 8 in a batch also belong to another pair; ")
    assert "warning" not in said.err
    assert "shards: data # captions name a few classes: about 8 of the 8" in Path("mine.yaml").read_text()


def test_comments_keep_the_fields() -> None:
    fields = {
        "text": "yes",
        "number": 12_345,
        "rate": 2e-3,
        "section": {"flag": True, "range": [0.5, 1.0]},
        "list": [{"name": "a: b", "of": "c # d"}, {"name": "e"}],
    }
    text = commented_yaml(["word " * 40, "end"], fields, {"section": "why", "section.flag": "so", "list[1].name": "as"})
    assert yaml.safe_load(text) == fields
    assert all(len(line) <= 120 for line in text.splitlines())
    assert "\nnumber: 12_345\n" in text
    assert "section: # why\n  flag: true # so\n" in text
    assert "  - name: e # as\n" in text
