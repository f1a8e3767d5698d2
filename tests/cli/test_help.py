"""The help of every verb, which imports nothing heavy."""

import subprocess
import sys

import pytest

from flipscale.cli import VERBS, main

# Each takes a second or seconds to import.
HEAVY = {*["torch", "transformers", "huggingface_hub", "accelerate", "datasets", "scipy", "cv2", "matplotlib"]}


def test_no_verb_s_help_imports_what_only_its_work_needs() -> None:
    """An evaluation sets how torch's threads wait before torch is imported, because later it does not count."""
    code = f"""
import os, sys
from flipscale.cli import VERBS, main
for words in (*([verb, "--help"] for verb in VERBS), ["evaluate", "./none"]):
    try: main(words)
    except SystemExit as ended: assert bool(ended.code) == (words[-1] == "./none"), words
    assert not {HEAVY} & set(sys.modules), words
assert os.environ["OMP_WAIT_POLICY"] == "passive"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"usage: flipscale {verb} " in done.stdout for verb in VERBS)


def test_the_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"{verb} {summary}" in printed for verb, summary in VERBS.items())
