"""`flipscale init`: a recipe that trains, from data alone."""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from conftest import metrics, write_shards, write_tar
from filelock import FileLock

from flipscale import cli
from flipscale.data.sources.opening import open_shards
from flipscale.data.tokenizers import load_tokenizer
from flipscale.evaluation.suite import planned_tasks
from flipscale.hub.convert_open_clip import open_clip_config
from flipscale.objectives.build_objective import build_config
from flipscale.planning.proposal import FEW_CLASSES, MOST_REPEATED, Proposal, Survey, propose, survey
from flipscale.recipe.data import DataRecipe, SourceRecipe
from flipscale.recipe.schedule import schedule_stages
from flipscale.start.complete_recipe import parse_recipe

DATA = Survey(pairs=300, width=500, height=400, tokens=5, captions={f"a {n}": 1 for n in range(300)}, sampled=300)


def proposed(data: Survey, minutes: float, num_gpus: int, tokenizer: Path, **values: Any) -> Proposal:
    """A proposal for a machine of two cores."""
    of_tokenizer = {"vocab_size": None, "pad_token_id": None, "packs": True}
    values = {"tasks": [], **of_tokenizer, "output_dir": "runs/mine", **values}
    return propose(data, minutes, 2, num_gpus, source=SourceRecipe(shards="data"), tokenizer=str(tokenizer), **values)


@pytest.fixture
def init(shards: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs `flipscale init` in its own folder and returns the recipe's file."""
    monkeypatch.chdir(tmp_path)

    def init(*options: str) -> Path:
        cli.main(["init", "mine.yaml", "--shards", str(shards), "--tokenizer", str(tokenizer_dir), *options])
        return tmp_path / "mine.yaml"

    return init


@pytest.mark.long  # the README's commands, which tests/cli/test_pages.py runs, are shorter
def test_a_recipe_for_this_machine_trains(
    init: Callable[..., Path], shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = init("--tests", str(shards), "--minutes", "0.02")
    said = capsys.readouterr()
    first, *_, length, command = said.out.splitlines()
    assert first.startswith(f"{shards}: 96 pairs; the median picture has ")
    assert "as measured here; " in length
    plain = "flipscale pretrain --config mine.yaml"
    assert command in (f"next: {plain}", f"next: ACCELERATE_MIXED_PRECISION=bf16 {plain}")  # by the machine
    assert said.err.splitlines()[-1].startswith("warning: captions repeat, as about ")
    assert "# Warning: captions repeat" in file.read_text()
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


def test_no_speed_where_the_links_are_unknown(init: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = parse_recipe(["--config", str(init("--gpu", "rtx_4090", "--num_gpus", "8", "--hours", "12"))])
    assert recipe.budget_minutes == 720
    length = capsys.readouterr().out.splitlines()[-2]
    assert "12 hours" in length
    assert "unknown" in length
    assert "pairs" not in length


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
    proposal = proposed(DATA, 30, 0, tokenizer_dir)
    short, long = (yaml.safe_load(proposal.text(["word " * 40, "end"], minutes)) for minutes in (0.5, 30.0))
    assert (short.pop("budget_minutes"), long.pop("budget_minutes")) == (0.5, 30.0)
    assert short == long
    assert sum(stage["share"] for stage in short["stages"]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "h100"], "gpu and hours go together"),
        (["--hours", "3"], "gpu and hours go together"),
        (["--gpu", "h100", "--hours", "3", "--minutes", "3"], "minutes is for this machine and gpu for others"),
        (["--num_gpus", "3"], "num_gpus is for machines elsewhere"),
        (["--gpu", "h100", "--hours", "3", "--num_gpus", "12"], "num_gpus is 12"),
        (["--gpu", "abacus", "--hours", "3"], "gpu is 'abacus'; use one of h100, h100_pcie, "),
        (["--tests", "nowhere"], "nowhere"),
        (["--tests", "silent"], "silent has neither two names in classnames.txt nor captions"),
        (["--tokenizer", "./none"], "; `flipscale prepare tokenizer "),
    ],
)
def test_errors_of_options(
    shards: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str],
    message: str, refused: Callable[..., str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_tar(Path("silent/0.tar"), [{"jpg": cv2.imencode(".jpg", np.zeros((40, 40, 3), np.uint8))[1].tobytes()}])
    assert message in refused("init", "mine.yaml", "--shards", shards, "--tokenizer", tokenizer_dir, *options)
    assert not Path("mine.yaml").exists()


@pytest.mark.parametrize(("names", "kinds"), [(None, ["zero_shot", "retrieval"]), ("one", ["retrieval"])])
def test_a_test_set_whose_first_shard_is_empty(
    init: Callable[..., Path], shards: Path, tmp_path: Path, names: str | None, kinds: list[str]
) -> None:
    shutil.copytree(shards, tmp_path / "test", ignore=shutil.ignore_patterns("*.manifest"))
    write_tar(tmp_path / "test/0.tar", [])  # the first in the order of names
    if names:
        (tmp_path / "test/classnames.txt").write_text(names)
    recipe = parse_recipe(["--config", str(init("--tests", "test", "--gpu", "h100", "--hours", "1"))])
    assert [task.kind for task in planned_tasks(recipe.eval)] == kinds


def test_one_command_at_a_time_writes_a_recipe(
    init: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = FileLock(tmp_path / ".mine.yaml.lock")
    with lock, pytest.raises(SystemExit):
        init("--gpu", "h100", "--hours", "1")
    assert "another `flipscale init` writes mine.yaml" in capsys.readouterr().err
    assert not (tmp_path / "mine.yaml").exists()
    init("--gpu", "h100", "--hours", "1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml"]


def test_errors_of_files_and_data(shards: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "has no ending .yaml" in refused("init", tmp_path / "recipe", "--shards", shards)
    write_shards(tmp_path / "few", [3])
    line = refused("init", tmp_path / "new.yaml", "--shards", tmp_path / "few")
    assert "has 3 pairs; training needs at least 16" in line


@pytest.mark.long
def test_no_gpu_is_large_enough(tokenizer_dir: Path) -> None:
    proposal = proposed(DATA, 30, 0, tokenizer_dir)
    with pytest.raises(ValueError, match="32 do not fit 4 GPUs of 0 GiB"):
        proposal.fit(4, 0)
    recipe = proposal.recipe()
    assert (recipe.data.micro_batch_size, recipe.model.gradient_checkpointing) == (1, True)


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


@pytest.mark.parametrize("num_gpus", [0, 1, 24])
@pytest.mark.parametrize("pairs", [16, 20_000, 3_000_000, 2_000_000_000])
def test_proposals(pairs: int, num_gpus: int, tokenizer_dir: Path) -> None:
    # Few pairs with short captions and little time, or many pairs with long captions.
    minutes = 3 if pairs < 1000 else 30
    proposal = proposed(dataclasses.replace(DATA, pairs=pairs, tokens=minutes), minutes, num_gpus, tokenizer_dir)
    assert proposal.warnings == []
    assert 30_000 * minutes <= proposal.samples_in(60 * minutes, [1000.0, 500.0]) <= 60_000 * minutes
    recipe = proposal.recipe()
    batch = recipe.data.global_batch_size
    stages = schedule_stages(recipe.stages, batch, recipe.budget_minutes)
    assert [stage.mask_ratio > 0 for stage in stages] == [True, False]
    assert stages[0].peak_lr == pytest.approx(1e-3 if num_gpus else 2e-3 * (batch / 256) ** 0.5, rel=0.005)
    assert batch % max(num_gpus, 1) == 0
    assert batch <= max(pairs, num_gpus)
    open_clip_config(build_config(recipe))
    assert recipe.data.pack_captions is (proposal.kind == "small_gpu")
    left = proposed(proposal.values["data"], minutes, num_gpus, tokenizer_dir, packs=False)
    assert not left.recipe().data.pack_captions


def test_a_warning_of_repeated_captions(tokenizer_dir: Path) -> None:
    """A third of the pairs share a caption, which is too much, and too little for names of classes."""
    data = dataclasses.replace(DATA, captions={"cat": 100, **{f"a {n}": 1 for n in range(200)}})
    proposal = proposed(data, 30, 0, tokenizer_dir)
    (warning,) = proposal.warnings
    assert "about 11 of the 32" in warning
    assert "loss.positives equal_captions" in warning
    assert MOST_REPEATED * 32 < data.repeated(32) < FEW_CLASSES * 32
    assert not proposal.values["few_classes"]


def test_a_recipe_for_folders_of_classes(tokenizer_dir: Path) -> None:
    """Their names are the captions, so equal captions are no fault of the data."""
    data = dataclasses.replace(DATA, captions={"red": 150, "green": 150})
    proposal = proposed(data, 30, 0, tokenizer_dir)
    assert proposal.warnings == []
    assert "about 32 of the 32" in proposal.values["few_classes"]
    assert "shards: data # captions name a few classes: about 32" in proposal.text([], 1.0)
