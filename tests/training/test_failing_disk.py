"""Each file operation of a run fails in turn: one sentence, whole checkpoints, and the next start learns the same."""

import os
import random
import re
import shutil
from pathlib import Path

import processes
import pytest
from conftest import losses, pretrain
from training import failing_disk
from training.failing_disk import ERRORS

from flipscale.engines.checkpoint import list_checkpoints, require_valid

# A few operations of saves; FLIPSCALE_FAILURES=all for every one of the whole run directory, one number for so many.
FAILURES = os.environ.get("FLIPSCALE_FAILURES", "8")
PLACE = "run" if "FLIPSCALE_FAILURES" in os.environ else "run/checkpoints"


def train(file: Path, tmp_path: Path, failing: int = 0, error: int = 0) -> tuple[int, str, list[str]]:
    """Return the exit code, output and operations of a start."""
    output = tmp_path / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    arguments = str(file), str(tmp_path / PLACE), str(output / "log"), failing, error, str(output)
    process = processes.start(failing_disk.train, *arguments)
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    printed = "".join((output / name).read_text() for name in ("stdout", "stderr"))
    return process.exitcode, printed, (output / "log").read_text().splitlines()


def chosen(operations: list[str]) -> list[tuple[int, int]]:
    """Return operations by number, from 1, with errors: all, or one of each of some kinds."""
    if FAILURES == "all":
        return [(number, ERRORS[number % len(ERRORS)]) for number in range(1, len(operations) + 1)]
    kinds: dict[str, int] = {}
    for number, operation in enumerate(operations, 1):
        kinds.setdefault(re.sub(r"\d{8}", "N", operation), number)
    numbers = random.Random(0).sample(sorted(kinds.values()), min(int(FAILURES), len(kinds)))
    return [(number, ERRORS[place % len(ERRORS)]) for place, number in enumerate(sorted(numbers))]


@pytest.mark.long
@pytest.mark.timeout(600 if FAILURES == "8" else 6000)
def test_each_operation_fails_in_turn(write_recipe, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    stages = [{"name": "masked", "samples": 160, "mask_ratio": 0.75, "base_lr": 0.012}]
    file = write_recipe(run_dir, stages=stages, save={"every_samples": 64, "total_limit": 1})
    code, printed, operations = train(file, tmp_path)
    assert code == 0, printed
    whole = losses(run_dir)
    assert len(whole) == 10
    told, went_on = 0, []
    for number, error in chosen(operations):
        what = f"operation {number} ({operations[number - 1]}) fails with {os.strerror(error)}"
        shutil.rmtree(run_dir)
        code, printed, met = train(file, tmp_path, number, error)
        assert "Traceback" not in printed, (what, printed)
        assert len(met) >= number
        complaints = [line for line in printed.splitlines() if line.startswith("flipscale: error: ")]
        assert (code, len(complaints)) in ((1, 1), (0, 0)), (what, printed)
        told += code
        if code == 0:
            went_on.append(what)
        else:
            assert os.strerror(error) in complaints[0], what
        for checkpoint in list_checkpoints(run_dir):
            require_valid(checkpoint)
        if code:
            again = pretrain(file)
            assert again.returncode == 0, (what, again.stderr)
        assert losses(run_dir) == whole, what
        assert (run_dir / "DONE").exists(), what
    print(f"{told} ended in a sentence; the run went on after:", *went_on, sep="\n")
    assert told >= len(went_on)
