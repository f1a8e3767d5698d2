"""A large batch in micro-batches has the activations of one of them in memory."""

import sys
from pathlib import Path

import pytest
from conftest import launch

CODE = """
import sys
from pathlib import Path
from flipscale.cli import main
main(["pretrain", "--config", sys.argv[1]])
print("peak", Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_of_a_large_batch_is_a_micro_batch_s(write_recipe, tmp_path: Path) -> None:
    peaks = []
    for micro_batch_size in (128, None):
        data = {"global_batch_size": 2048, "micro_batch_size": micro_batch_size}
        stages = [{"name": "whole", "samples": 2048, "base_lr": 0.002}]
        file = write_recipe(tmp_path / f"run-{micro_batch_size}", data=data, stages=stages, save={"every_samples": 0})
        done = launch([sys.executable, "-c", CODE, str(file)])
        assert done.returncode == 0, done.stderr
        peaks.append(1024 * int(done.stdout.split("peak ")[1]))
    # Both hold the program and 1.5 MB of patches; the second has 16 times the activations besides.
    assert peaks[1] - peaks[0] > 200e6, peaks
