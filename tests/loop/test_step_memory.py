"""A large batch in micro-batches has the activations of one of them in memory."""

from pathlib import Path

import processes
import pytest

from flipscale.cli import main


def train_and_measure(file: str, out: str) -> None:
    """Write the peak memory of this process in bytes."""
    main(["pretrain", "--config", file])
    Path(out).write_text(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0] + "000")


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_of_a_large_batch_is_a_micro_batch_s(write_recipe, tmp_path: Path) -> None:
    peaks = []
    for micro_batch_size in (128, None):
        data = {"global_batch_size": 2048, "micro_batch_size": micro_batch_size}
        stages = [{"name": "whole", "samples": 2048, "base_lr": 0.002}]
        file = write_recipe(tmp_path / f"run-{micro_batch_size}", data=data, stages=stages, save={"every_samples": 0})
        process = processes.start(train_and_measure, str(file), str(tmp_path / "peak"))
        assert processes.exit_codes([process]) == [0]
        peaks.append(int((tmp_path / "peak").read_text()))
    # Both hold the program and 1.5 MB of patches; the second has 16 times the activations besides.
    assert peaks[1] - peaks[0] > 200e6, peaks
