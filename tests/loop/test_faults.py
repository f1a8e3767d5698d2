"""A loss that is not finite, a corrupt sample, a full disk: the run continues, or stops with one clear sentence."""

import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import processes
import pytest
from conftest import add_member, cut, losses, metrics, pretrain, trained, write_shards
from distributed.crowd import start_ranks
from loop.troubled import trouble

from flipscale import cli
from flipscale import pretrain as trainer
from flipscale.data.order import order_of
from flipscale.data.sources.tar import TarSource
from flipscale.engines.checkpoint import CheckpointWriter, latest_checkpoint
from flipscale.loop.sync import MAX_SKIPPED_IN_A_ROW
from flipscale.process.preemption import Stopped
from flipscale.process.slow_steps import StepWatch
from flipscale.recipe.data import DataRecipe
from flipscale.records.tracking import BadSamples
from flipscale.start.complete_recipe import parse_recipe


def test_steps_that_are_not_finite_are_skipped_then_the_run_stops(write_recipe, tmp_path: Path) -> None:
    stages = [{"name": "diverging", "samples": 640, "mask_ratio": 0.5, "base_lr": 1e30}]
    done = pretrain(write_recipe(tmp_path / "run", stages=stages))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row" in done.stderr
    records = metrics(tmp_path / "run")
    assert [r["num_skipped"] for r in records[-4:]] == [1, 1, 1, 1]
    assert records[-1]["loss"] is None


def test_the_advice_after_steps_that_are_not_finite_goes_on_from_the_open_save(
    write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointWriter, "is_writing", True)
    file = write_recipe(tmp_path / "run", save={"every_samples": 80})
    with trouble(poisoned=range(5, 11)), pytest.raises(FloatingPointError) as failed:
        trainer.pretrain(parse_recipe(["--config", str(file)]))
    flags, command = re.search(
        r"in another output_dir, with (--model.init_from \S+), which `flipscale (.*)` writes of", str(failed.value)
    ).groups()
    cli.main(shlex.split(command))
    assert latest_checkpoint(tmp_path / "run").name == "step-00000005"
    lower = write_recipe(tmp_path / "lower", stages=[{"name": "lower", "samples": 32, "base_lr": 1e-4}])
    trainer.pretrain(parse_recipe(["--config", str(lower), *shlex.split(flags)]))
    assert (tmp_path / "lower/DONE").exists()


def test_counts_since_the_last_record_outlive_a_stop(
    write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20 steps with two records, three of the second interval are skipped and one is slow, before a stop in it."""
    was_slow = property(lambda watch: watch._step == 12, lambda watch, value: None)
    monkeypatch.setattr(StepWatch, "was_slow", was_slow, raising=False)
    stages = [{"name": "one", "samples": 320, "base_lr": 0.01}]
    recipe = write_recipe(tmp_path / "run", stages=stages, log={"every_samples": 160})
    with trouble(poisoned=(10, 11, 12), stopped=14), pytest.raises(Stopped):
        trainer.pretrain(parse_recipe(["--config", str(recipe)]))
    assert len(metrics(tmp_path / "run")) == 1
    trainer.pretrain(parse_recipe(["--config", str(recipe)]))
    last = metrics(tmp_path / "run")[-1]
    assert (last["step"], last["num_skipped"], last["num_slow"]) == (20, 3, 1)


@pytest.mark.parametrize("is_full", [False, True])
def test_a_run_with_too_many_bad_samples_first_ends_its_open_save(
    write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    count, commit = BadSamples.count, CheckpointWriter.commit

    def counted(samples: BadSamples, faults: list, num_bad: int, num_samples: int) -> OSError | None:
        return count(samples, faults, 999 if samples._samples == 128 else num_bad, num_samples)

    def committed(writer: CheckpointWriter) -> int | None:
        if is_full and writer.is_open:
            raise OSError("no room")
        return commit(writer)

    monkeypatch.setattr(BadSamples, "count", counted)
    monkeypatch.setattr(CheckpointWriter, "commit", committed)
    monkeypatch.setattr(CheckpointWriter, "is_writing", True)
    file = write_recipe(tmp_path / "run", save={"every_samples": 80})
    with pytest.raises(OSError, match=r"max_bad_fraction"):
        trainer.pretrain(parse_recipe(["--config", str(file)]))
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-00000005"] * (not is_full)


def png_bomb() -> bytes:
    """Return a PNG of a few bytes with a header of 30000 x 30000 pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99)))]
    parts = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# By key: what it is counted as, its image and its caption.
BAD: dict[str, tuple[str, str | bytes, bytes | None]] = {
    "garbage": ("undecodable_image", b"\xff\xd8 no picture", b"a red disc"),
    "cut": ("undecodable_image", "cut", b"a red disc"),
    "bomb": ("image_too_large", png_bomb(), b"a red disc"),
    "blank": ("missing_caption", "good", b" "),
    "uncaptioned": ("missing_caption", "good", None),
    "latin": ("undecodable_caption", "good", b"\xff\xfe"),
}


def write_bad_shards(folder: Path) -> None:
    """40 good pairs; every kind of bad sample, and one good; a shard cut behind 9 pairs; an empty file."""
    write_shards(folder, [40])
    with tarfile.open(folder / "00000.tar") as tar:
        good = tar.extractfile("000000.jpg").read()
    images = {"good": good, "cut": good[:-200]}
    with tarfile.open(folder / "00001.tar", "w") as tar:
        for key, (_, image, caption) in BAD.items():
            add_member(tar, f"{key}.jpg", images.get(image, image))
            if caption is not None:
                add_member(tar, f"{key}.txt", caption)
        add_member(tar, "good.jpg", good)
        add_member(tar, "good.txt", b"a blue bar")
    shutil.copy(folder / "00000.tar", folder / "00002.tar")
    with tarfile.open(folder / "00002.tar") as tar:
        os.truncate(folder / "00002.tar", tar.getmember("000009.png").offset + 700)
    (folder / "00003.tar").touch()


def test_bad_data_is_replaced_counted_and_named_alike_everywhere(write_recipe, tmp_path: Path) -> None:
    """One process, the same cut within an interval of the log and resumed, and two processes: the same counts, names
    and training."""
    write_bad_shards(tmp_path / "shards")
    changes = {
        "data": {"shards": str(tmp_path / "shards"), "max_bad_fraction": 0.25},
        "save": {"every_samples": 160, "total_limit": 9},
        "log": {"every_samples": 48, "report_to": []},
    }
    runs = [tmp_path / name for name in ("one", "resumed", "two")]
    trained(write_recipe(runs[0], **changes))
    cut(runs[0], runs[1], 20)
    trained(write_recipe(runs[1], **changes))
    trained(write_recipe(runs[2], **changes), 2)

    order = order_of(TarSource(str(tmp_path / "shards")), 0, DataRecipe(global_batch_size=16, shards_per_block=2))
    assert order.shard_sizes.tolist() == [40, 7, 9, 0]
    shards, numbers = order.locate(np.arange(640))
    causes = [cause for cause, _, _ in BAD.values()]
    expected = Counter(causes[number] for number in numbers[shards == 1] if number < len(causes))
    for run_dir in runs:
        records = [record for record in metrics(run_dir) if "loss" in record]
        assert sum(record["num_replaced"] for record in records) == expected.total() >= 640 // 56 * 6
        for cause, count in expected.items():
            assert sum(record.get(f"replaced/{cause}", 0) for record in records) == count
        assert losses(run_dir) == pytest.approx(losses(runs[0]), abs=1e-4)
        named = [json.loads(line) for line in (run_dir / "bad_samples.jsonl").read_text().splitlines()]
        assert [(Path(n["shard"]).name, n["cause"]) for n in named[:2]] == [
            ("00002.tar", "truncated_shard"),
            ("00003.tar", "unreadable_shard"),
        ]
        assert {n["key"]: n["cause"] for n in named[2:]} == {key: cause for key, (cause, _, _) in BAD.items()}
        assert len(named) == 8
    files = [(run_dir / "bad_samples.jsonl").read_text() for run_dir in runs]
    assert files[0] == files[1] == files[2]


def test_too_many_bad_samples_stop_the_run(write_recipe, tmp_path: Path) -> None:
    write_bad_shards(tmp_path / "shards")
    run_dir = tmp_path / "run"
    shards = str(tmp_path / "shards/00001.tar")
    done = pretrain(write_recipe(run_dir, data={"shards": shards}, log={"every_samples": 10**6, "report_to": []}))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(
        r"error: 5\d of the last 64 samples could not be used, more than data.max_bad_fraction 0.05 ", last
    )
    assert "missing_caption" in last
    assert f"{run_dir}/bad_samples.jsonl names them; mend the data or raise the fraction" in last
    assert len((run_dir / "bad_samples.jsonl").read_text().splitlines()) == 6


def test_a_full_disk_leaves_the_last_checkpoint_whole(write_recipe, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("no right to mount a tmpfs here")
    try:
        save = {"every_samples": 160, "total_limit": 9}
        file = write_recipe(small / "run", save=save)
        done = pretrain(file)
        assert done.returncode == 1, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        # Whichever file meets the end first: a checkpoint is written while the metrics go on.
        assert last.startswith(("flipscale: error: checkpoint ", f"flipscale: error: the disk of {small}/run is full"))
        assert "No space left on device" in last
        assert "free some space" in last
        kept = sorted(path.name for path in (small / "run/checkpoints").iterdir())
        assert kept
        assert all(name.startswith(("step-", ".step-")) for name in kept)
        assert latest_checkpoint(small / "run") is not None
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        trained(file)
        assert len(losses(small / "run")) == 40
    finally:
        subprocess.run(["umount", str(small)], check=True)


def train_on_a_node(file: str, folder: str) -> None:
    """Train in the folder of this process, as on its own node."""
    os.chdir(f"{folder}/{os.environ['RANK']}")
    processes.call_main("flipscale.pretrain", ["--config", file], folder)


@pytest.mark.long
def test_nodes_with_other_copies_of_a_shard_are_found_out(write_recipe, tmp_path: Path) -> None:
    """In one of two nodes' folders, a shard was cut."""
    for rank in range(2):
        write_shards(tmp_path / f"{rank}/shards", [20, 20])
    os.truncate(tmp_path / "1/shards/00001.tar", 50_000)
    file = write_recipe(tmp_path / "run", data={"shards": "shards", "max_bad_fraction": 0.5})
    ranks = start_ranks(2, train_on_a_node, str(file), str(tmp_path), ACCELERATE_USE_CPU="1")
    assert 0 not in processes.exit_codes(ranks)
    printed = (tmp_path / "stderr").read_text()
    assert "error: processes 1 of 2 differ from process 0 in the samples of their shards" in printed
    assert "make the nodes' copies the same" in printed
