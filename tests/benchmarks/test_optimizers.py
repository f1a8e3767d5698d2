"""The comparison of optimisers, at a tiny size: both are tuned by as many trials, and train for equal time."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import write_shards, write_tokenizer

from benchmarks import optimizers as bench
from benchmarks.optimizers import main, walk
from flipscale.cli import main as flipscale
from flipscale.io.json_lines import read_metrics

pytestmark = pytest.mark.usefixtures("process_as_before")


@pytest.mark.long
def test_optimizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data, weights, folder = tmp_path / "data", tmp_path / "weights", tmp_path / "runs"
    for seed, part in enumerate(("train", "validation", "test")):
        write_shards(data / part, [60, 60], seed)
    write_tokenizer(data / "tokenizer")
    flipscale(["prepare", "weights", str(data / "train"), str(weights), "--caption_counts"])
    for name, value in {"WIDTHS": (16,), "BATCHES": (8,), "TRIALS": 2, "WINDOW": 32, "WINDOWS": 3}.items():
        monkeypatch.setattr(bench, name, value)
    arguments = ["--data", str(data), "--weights", str(weights), "--output_dir", str(folder)]
    arguments += ["--batches", "8", "--minutes", "0.03", "--seeds", "1", "--repeats", "1"]
    capsys.readouterr()
    main(arguments)
    table = (folder / "table_8.md").read_text()
    assert [line.split("|")[3].strip() for line in table.splitlines()[2:]] == ["adamw", "muon"]

    pace = json.loads((folder / "pairs_per_second_8.json").read_text())
    for optimizer, (rate, decay) in bench.FIRST.items():
        tuned = json.loads((folder / f"tuned_{optimizer}_width_16_batch_8.json").read_text())
        ranks = [tuned[f"rate {one:g}, decay {decay:g}"] for one in (rate, 2 * rate)]
        assert (tuned["rate"], tuned["decay"]) == (rate * (1 + (ranks[1] < ranks[0])), decay)
        run_dir = folder / f"{optimizer}_width_16_batch_8_seed_0"
        fields = yaml.safe_load((run_dir / "recipe.yaml").read_text())
        assert fields["optim"]["name"] == optimizer
        assert fields["optim"]["weight_decay"] == decay
        assert fields["stages"][0]["base_lr"] == tuned["rate"]
        assert fields["data"]["weights"] == str(weights)
        seen = read_metrics(run_dir)[-1]["samples_seen"]
        assert seen == pytest.approx(1.8 * pace[f"{optimizer}, width 16, batch 8"], abs=8)

    # Nothing is trained again.
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*/DONE")}
    assert len(done) == 1 + 2 * 3  # the calibration, and two trials and a run each
    capsys.readouterr()
    main(arguments)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/DONE")} == done
    assert table in capsys.readouterr().out


def test_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TRIALS", 7)
    # The best is four times the rate and a third of the decay.
    ranks = walk(lambda rate, decay: abs(rate - 4e-3) * 1e3 + abs(decay - 0.1), 1e-3, 0.3)
    assert list(ranks) == [pytest.approx(one) for one in [
        (1e-3, 0.3), (2e-3, 0.3), (4e-3, 0.3), (8e-3, 0.3), (4e-3, 0.1), (8e-3, 0.1), (2e-3, 0.1),
    ]]  # fmt: skip

    # The walk ends where all trials beside the best are worse.
    assert len(walk(lambda rate, decay: abs(rate - 1e-3) + abs(decay - 0.3), 1e-3, 0.3)) == 5
