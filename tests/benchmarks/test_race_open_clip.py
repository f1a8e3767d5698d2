"""The race beside open_clip's trainer, at a tiny size: both train on equal data, and one code evaluates both."""

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import write_shards, write_tokenizer

from benchmarks import race_open_clip as bench
from benchmarks.race_open_clip import ARMS, Setting, main, tune
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.results import read_results
from flipscale.io.json_lines import read_metrics

pytest.importorskip("open_clip_train")
pytestmark = pytest.mark.usefixtures("process_as_before")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for seed, part in enumerate(("train", "validation", "test")):
        write_shards(folder / part, [50, 40] if part == "train" else [40, 40], seed)
    # Each name is in five sets, but the last, which one set has ten times.
    rows = [f"set{row % 5}\tname{row // 5}" for row in range(80)] + ["set0\tname16"] * 10
    (folder / "train.tsv").write_text("\n".join(rows) + "\n")
    write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_ends", bos_token="<s>", eos_token="</s>")
    return folder


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arms with towers of one layer, and one trial of each."""
    towers = ("causal, end token", "mean of the words")
    small = {"width": 16, "layers": 1, "heads": 1}
    values = {
        "VISION": {**bench.VISION, **small},
        "TEXT": {**small, "context_length": 8},
        "TEXT_TOWERS": {name: bench.TEXT_TOWERS[name] for name in towers},
        "ARMS": ARMS[:2],
        "BATCH": 8,
        "EVALUATIONS": 2,
        "SHORTER": (2,),
        "WINDOW": 2,
        "tune": lambda side, trial: {"rate": 2e-3, "decay": 0.2, "rank": trial(rate=2e-3, decay=0.2)},
    }
    for name, value in values.items():
        monkeypatch.setattr(bench, name, value)


@pytest.mark.long
def test_race(tiny: None, real_figures: None, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "race"
    arguments = ["--data", str(data), "--output_dir", str(folder)]
    arguments += ["--minutes", "0.05", "--seeds", "1", "--repeats", "1"]
    main(arguments)
    table = (folder / "table.md").read_text().splitlines()
    names = ["open_clip, 75 % patch dropout", "flipscale, size schedule", "flipscale, size schedule, 1/2 of the time"]
    assert [line.split("|")[1].strip() for line in table[2:5]] == names
    assert (folder / "accuracy.png").stat().st_size > 10_000

    pace = json.loads((folder / "pairs_per_second.json").read_text())
    assert list(pace[names[1]]) == ["tiny", "small", "tuned"]
    assert min(value for stages in pace.values() for value in stages.values()) > 0
    towers = json.loads((folder / "text_towers.json").read_text())
    assert list(towers) == list(bench.TEXT_TOWERS)

    # open_clip's own log has the pairs, and the rate and the dropout that the race asked for.
    run_dir = folder / "open_clip_75_patch_dropout_seed_0"
    log = (run_dir / "out.log").read_text()
    seen = read_metrics(run_dir)[-1]["samples_seen"]
    assert f"/{seen // 2} (100%)" in log
    assert all(
        f"{name}: {value}\n" in log for name, value in (("lr", 0.002), ("wd", 0.2), ("force_patch_dropout", 0.75))
    )
    measured = [one for one in read_results(run_dir) if one.result.metric == "top1"]
    assert [one.samples_seen for one in measured] == [seen // 2, seen]
    assert measured[-1].trained_seconds == pytest.approx(seen / pace[names[0]]["all"])
    assert measured[-1].trained_seconds == pytest.approx(3, rel=0.2)

    # flipscale's clock is moved by its pairs.
    own, seconds, seen = pace[names[1]], 0.0, 0
    for record in read_metrics(folder / "flipscale_size_schedule_seed_0"):
        if record.get("stage"):
            seconds += (record["samples_seen"] - seen) / own[record["stage"]]
            seen = record["samples_seen"]
            assert record["trained_seconds"] == pytest.approx(seconds, abs=0.2)
    assert seconds == pytest.approx(3, rel=0.1)

    # Nothing is trained again.
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*/DONE")}
    capsys.readouterr()
    main(arguments)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/DONE")} == done
    assert "\n".join(table) in capsys.readouterr().out


def test_pairs_of_common_names(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PAIRS_PER_SHARD", 30)
    all_pairs, common = TarSource(str(data / "train")), TarSource(str(bench.Race(data, tmp_path / "race").shards()))
    assert common.shard_sizes == [30, 30, 20]
    for row in (0, 29, 30, 79):
        of_all, of_common = all_pairs.read(*divmod(row, 50)), common.read(*divmod(row, 30))
        assert (of_common.image, of_common.captions) == (of_all.image, of_all.captions)


@pytest.mark.parametrize(
    ("rank", "fourth"),
    [
        (lambda rate, decay: rate, (0.0005, 0.2)),
        (lambda rate, decay: -rate, (0.008, 0.2)),
        (lambda rate, decay: abs(rate - 0.002) + decay, (0.002, 0.05)),
    ],
)
def test_fourth_trial(rank: Callable[[float, float], float], fourth: tuple[float, float]) -> None:
    tried = []

    def trial(rate: float, decay: float) -> float:
        tried.append((rate, decay))
        return rank(rate, decay)

    found = tune("open_clip", trial)
    assert tried == [(0.001, 0.2), (0.002, 0.2), (0.004, 0.2), fourth]
    assert (found["rate"], found["decay"]) == fourth


def test_open_clip_reads_the_tokenizer(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    monkeypatch.setattr(bench, "TEXT", {**bench.TEXT, "context_length": 8})
    race = bench.Race(data, tmp_path / "race")
    ids = {}
    for text in bench.TEXT_TOWERS:
        folder = race.model_folder(text)
        ids[text] = open_clip.get_tokenizer(f"local-dir:{folder}")(["a red disc"])[0].tolist()
    words = ids["class token"]
    assert words[3:] == [0] * 5
    assert min(words[:3]) > 1  # no padding, and nothing unknown
    assert ids["causal, end token"] == [12, *words[:3], 13, 0, 0, 0]
    assert ids["mean of the words"] == words
    command = race.open_clip_command(ARMS[3], Setting(1e-3, 0.2, "class token"), tmp_path / "run", 0, 1280, 1)
    assert "--force-patch-dropout" not in command


def test_mean_rank(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = torch.eye(16)
    truth = bench.TestSet.open(data / "test")
    labels = torch.tensor([truth.label(16, shard, number) for shard in (0, 1) for number in range(40)])
    # The right name comes first for half of the images, and after two others for the rest.
    images = classes[labels].clone()
    images[::2] += 2 * (classes[(labels[::2] + 1) % 16] + classes[(labels[::2] + 2) % 16])
    embedder = Mock(texts=lambda *_, **__: classes, images=lambda source: images)
    monkeypatch.setattr(bench.TestSet, "labels", lambda *_: labels)
    assert bench.mean_rank(embedder, data / "test") == pytest.approx(3**0.5)
