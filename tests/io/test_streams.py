"""A locale whose encoding is not UTF-8."""

import os
import subprocess
import sys

import pytest

POSIX = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("flags", [[], ["-I"]], ids=["usual", "without variables"])
def test_a_command_reads_its_words_as_utf8(flags: list[str]) -> None:
    code = "import sys; from flipscale.process.state import use_utf8; use_utf8(); print(ascii(sys.argv[1]))"
    command = [sys.executable, *flags, "-c", code, "ü"]
    done = subprocess.run(command, env={**os.environ, **POSIX}, capture_output=True, check=True)
    # In isolated mode Python heeds no variable, so the words stay as they are.
    assert done.stdout.decode().strip() in (["'\\xfc'"] if not flags else ["'\\xfc'", "'\\udcc3\\udcbc'"])


def test_the_command_line_keeps_a_name_of_utf8() -> None:
    command = [sys.executable, "-m", "flipscale.cli", "status", "läufe"]
    done = subprocess.run(command, env={**os.environ, **POSIX}, capture_output=True, check=False)
    assert done.returncode == 2
    assert "läufe" in done.stderr.decode()
