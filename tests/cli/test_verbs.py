"""Runs, their evaluation and status, and races, from the command line."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from conftest import changed_recipe, launch, metrics, trained, write_shards
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flipscale.cli import main
from flipscale.model import FlipModel

FLIPSCALE = [sys.executable, "-m", "flipscale.cli"]


@pytest.fixture(scope="module")
def run_dir(recipe: dict, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was evaluated and reported to TensorBoard."""
    folder = tmp_path_factory.mktemp("verbs")
    changes = {
        "eval": {"every_samples": 320, "zero_shot": str(shards), "retrieval": str(shards)},
        "log": {"every_samples": 160, "report_to": ["tensorboard"]},
        "output_dir": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(changed_recipe(recipe, changes)))
    trained(folder / "run.yaml")
    return folder / "run"


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict]:
    """Runs a command that prints JSON."""

    def run(*words: str | Path) -> dict:
        capsys.readouterr()
        main([*map(str, words), "--json"])
        AcceleratorState._reset_state(reset_partial_state=True)
        return json.loads(capsys.readouterr().out)

    return run


def test_the_run_directory_holds_what_is_promised(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = {"recipe.yaml", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints", "model", "DONE"}
    expected |= {"starts.jsonl", "heartbeat.json", "results.jsonl", "tracker_run_id", "report.html", "figures"}
    assert {path.name for path in run_dir.iterdir()} == expected
    shown = EventAccumulator(str(next((run_dir / "tensorboard").rglob("events*")).parent)).Reload().Tags()["scalars"]
    assert {"loss", "peak_memory_bytes", "data_wait_share", "images_per_s", "zero_shot/top1"} <= set(shown)
    (start,) = map(json.loads, (run_dir / "starts.jsonl").read_text().splitlines())
    assert list(start["seconds"]) == ["imports", "data", "processes", "checkpoint"]
    records = metrics(run_dir)
    assert [r["samples_seen"] for r in records if "loss" in r] == [160, 320, 480, 640]
    assert [r["samples_seen"] for r in records if "zero_shot/top1" in r] == [320, 640]
    fields = {"loss", "lr", "grad_norm", "logit_scale", "images_per_s", "data_wait_share", "trained_seconds", "stage"}
    fields |= {"peak_memory_bytes", "num_replaced", "num_skipped", "num_slow"}
    assert fields <= records[0].keys()
    # What the processor can do is measured in passing, on a machine that may be busy.
    assert 2**27 < records[0]["peak_memory_bytes"] < 2**34
    main(["pretrain", "--config", str(run_dir.with_suffix(".yaml"))])
    assert metrics(run_dir) == records, "a finished run is left alone"


def test_evaluate_and_status_give_the_run_s_own_figures(
    run_dir: Path, shards: Path, printed: Callable[..., dict]
) -> None:
    records = metrics(run_dir)
    found = printed("evaluate", run_dir / "model", "--zero_shot", shards, "--retrieval", shards, "--num_workers", "0")
    assert found == {name: pytest.approx(value, abs=1e-4) for name, value in records[-1].items() if "/" in name}
    status = printed("status", run_dir)
    assert (status["state"], status["samples_seen"], status["total_samples"]) == ("done", 640, 640)
    assert status["checkpoint_samples"] == 640
    assert (status["num_starts"], status["num_processes"]) == (1, 1)
    assert status["images_per_s"] == [r["images_per_s"] for r in records if "loss" in r][-1]
    assert status["metrics"] == {name: value for name, value in records[-1].items() if "/" in name}


@pytest.mark.long
def test_a_race_of_more_recipes_than_cores_trains_one_after_the_other(recipe: dict, tmp_path: Path) -> None:
    out, files = tmp_path / "out", [str(tmp_path / f"{name}.yaml") for name in ("one", "two")]
    for file in files:
        Path(file).write_text(yaml.safe_dump(recipe))
    one_core = "os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])"
    on_one_core = f"import os, sys; {one_core}; os.execv(sys.argv[1], sys.argv[1:])"
    race = [*FLIPSCALE, "study", "race", *files, "--minutes", "0.02", "--output_dir", str(out)]
    done = launch([sys.executable, "-c", on_one_core, *race])
    assert done.returncode == 0, done.stderr
    second_began = json.loads((out / "two/starts.jsonl").read_text())["time"]
    assert (out / "one/DONE").stat().st_mtime < second_began


@pytest.mark.long
def test_a_race_lays_recipes_side_by_side_for_the_same_time(recipe: dict, tmp_path: Path) -> None:
    write_shards(tmp_path / "test", [20])
    names = tmp_path / "test/classnames.txt"
    names.write_text("".join(f"a {name}\n" for name in names.read_text().splitlines()))
    arms = {"flip": recipe["stages"], "clip": [{"name": "whole", "samples": 320, "base_lr": 0.01}]}
    for name, stages in arms.items():
        changed = {**recipe, "stages": stages, "eval": {"zero_shot": str(tmp_path / "test")}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(changed))
    out = tmp_path / "out"
    files = [str(tmp_path / f"{name}.yaml") for name in arms]
    command = [*FLIPSCALE, "study", "race", *files, "--minutes", "0.03", "--seeds", "2", "--output_dir", str(out)]
    level = {"task": "zero_shot", "kind": "zero_shot", "metric": "top1", "value": 12.5, "who": "nearest image, HOG"}
    (tmp_path / "baselines.jsonl").write_text(json.dumps(level) + "\n")
    command += ["--baselines", str(tmp_path / "baselines.jsonl")]
    done = launch(command)
    assert done.returncode == 0, done.stderr
    table = (out / "table.md").read_text()
    assert table in done.stdout
    labels = {line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")}
    assert {"flip (75% masked, then tuned), seed 1", "nearest image, HOG", "chance"} <= labels
    assert re.search(r"^(flip|clip) reaches the last top-1 of (flip|clip) \(\d", table, re.MULTILINE)
    assert {path.name for path in (out / "figures").iterdir()} == {"loss.png", "zero_shot.png"}
    assert FlipModel.from_pretrained(out / "model").config.vision_config.image_size == 32
    assert "nearest image, HOG" in (out / "model/README.md").read_text()
    runs = [f"{name}-seed{seed}" for seed in (0, 1) for name in arms]
    shown = yaml.safe_load((out / "flip-seed1/recipe.yaml").read_text())
    # The masked stage has 24 of 40 steps, of fewer operations each.
    shares = [stage["share"] for stage in shown["stages"]]
    assert sum(shares) == 1
    assert 0.2 < shares[0] < 0.6
    assert (shown["seed"], shown["budget_minutes"]) == (1, 0.03)
    for name in runs:
        assert metrics(out / name)[-1]["trained_seconds"] > 0.9, "it ended before its time"
    before = {name: (out / name / "results.jsonl").read_text() for name in runs}

    again = launch(command)
    assert again.returncode == 0, again.stderr
    assert {name: (out / name / "results.jsonl").read_text() for name in runs} == before, "it was trained again"
    changed = launch([*command, "--minutes", "9"])
    assert changed.returncode == 2
    assert "budget_minutes: 0.03, now 9.0" in changed.stderr


def test_a_folder_that_hides_the_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "flipscale").mkdir()
    package = Path(__file__).parents[2] / "flipscale"
    code = f"import flipscale; flipscale.__path__ = [{str(package)!r}]; import flipscale.cli"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("flipscale: error: ")
    assert "leave this folder" in ended.stderr


@pytest.mark.parametrize("kilobytes", [300_000, 1_000_000, 1_400_000])
def test_a_memory_limit_is_named(kilobytes: int) -> None:
    command = f"ulimit -v {kilobytes}; exec {sys.executable} -m flipscale.cli pretrain --config none.yaml"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert "ulimit -v unlimited" in ended.stderr
