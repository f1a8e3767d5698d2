"""A loss that is not finite, a corrupt sample, a full disk: the run goes on, or stops with one clear sentence."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import add_member, metrics, pretrain, write_shards

from flipscale.training.health import MAX_SKIPPED_IN_A_ROW


def test_steps_that_are_not_finite_are_skipped_then_the_run_stops(write_recipe, tmp_path: Path) -> None:
    stages = [{"name": "diverging", "samples": 640, "mask_ratio": 0.5, "base_lr": 1e30}]
    done = pretrain(write_recipe(tmp_path / "run", stages=stages))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, none of them taken" in done.stderr
    records = metrics(tmp_path / "run")
    assert [r["num_skipped"] for r in records[-4:]] == [1, 1, 1, 1]
    assert records[-1]["loss"] is None


@pytest.mark.parametrize("processes", [1, 2])
def test_corrupt_samples_are_replaced_alike_everywhere(write_recipe, tmp_path: Path, processes: int) -> None:
    write_shards(tmp_path / "shards", [40])
    with tarfile.open(tmp_path / "shards/00001.tar", "w") as tar:
        for number, (image, caption) in enumerate([(b"\xff\xd8 cut", b"a red disc"), (None, b""), (None, b"\xff\xfe")]):
            with tarfile.open(tmp_path / "shards/00000.tar") as good:
                picture = image or good.extractfile("000001.png").read()
            add_member(tar, f"{number}.png", picture)
            add_member(tar, f"{number}.txt", caption)
        with tarfile.open(tmp_path / "shards/00000.tar") as good:
            add_member(tar, "9.png", good.extractfile("000001.png").read())
        add_member(tar, "9.txt", b"a blue bar")
    run_dir = tmp_path / f"run{processes}"
    done = pretrain(write_recipe(run_dir, data={"shards": str(tmp_path / "shards")}), processes)
    assert done.returncode == 0, done.stderr
    assert len([r for r in metrics(run_dir) if "loss" in r]) == 40
    # 640 samples are 14 epochs and 24 of the 44 samples: three bad ones in every epoch, replaced 3, 2 and 1 samples on.
    assert sum(r.get("num_replaced", 0) for r in metrics(run_dir)) >= (14 * 3 if processes == 1 else 14)


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
        assert last.startswith("flipscale: error: checkpoint ")
        assert "No space left on device" in last
        assert last.endswith("the ones before it are whole: free some space and start the run again")
        kept = sorted(path.name for path in (small / "run/checkpoints").iterdir())
        assert kept
        assert all(name.startswith("step-") for name in kept)
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        done = pretrain(file)
        assert done.returncode == 0, done.stderr
        assert len([r for r in metrics(small / "run") if "loss" in r]) == 40
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_other_shards_under_a_running_recipe_are_refused(write_recipe, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", [40])
    file = write_recipe(tmp_path / "run", data={"shards": str(tmp_path / "shards")})
    assert pretrain(file).returncode == 0
    (tmp_path / "run/DONE").unlink()
    write_shards(tmp_path / "shards", [41])
    done = pretrain(file)
    assert done.returncode == 2
    assert "was trained on 40 samples, data.shards now has 41" in done.stderr


def test_environment_is_recorded(write_recipe, tmp_path: Path) -> None:
    assert pretrain(write_recipe(tmp_path / "run")).returncode == 0
    recorded = json.loads((tmp_path / "run/environment.json").read_text())
    assert recorded["num_processes"] == 1
    assert recorded["python"] == ".".join(str(n) for n in sys.version_info[:3])
    assert shutil.which("git") is None or recorded["commit"]
