"""Every target of the fuzzer, with 300 inputs. `make fuzz` tries inputs for five minutes."""

import os
import tempfile
from pathlib import Path

import processes
import pytest
from fuzz import fuzzing

RUNS = 300


def run(target: str, folder: str) -> None:
    """Fuzz a target in a process that libFuzzer ends, with its output in a file."""
    output = os.open(f"{folder}/output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    tempfile.tempdir = folder
    fuzzing.run(target, [f"-runs={RUNS}", "-seed=1"], Path(folder, "findings"))


@pytest.mark.long
@pytest.mark.parametrize("target", fuzzing.TARGETS)
def test_no_finding(target: str, tmp_path: Path) -> None:
    codes = processes.exit_codes([processes.start(run, target, str(tmp_path))])
    printed = (tmp_path / "output").read_text(errors="replace")
    assert codes == [0], printed[-4000:]
    assert not list((tmp_path / "findings").iterdir())
