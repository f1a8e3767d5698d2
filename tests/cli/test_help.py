"""The help of every verb, which imports nothing heavy."""

import subprocess
import sys

import pytest

from flipscale.cli import VERBS, main

# Each takes a second or seconds to import.
HEAVY = {*["torch", "transformers", "huggingface_hub", "accelerate", "datasets", "scipy", "cv2", "matplotlib"]}


def test_no_verb_s_help_imports_what_only_its_work_needs() -> None:
    code = f"""
import sys
from flipscale.cli import VERBS, main
for verb in VERBS:
    try: main([verb, "--help"])
    except SystemExit as ended: assert not ended.code, verb
    print(verb, *({HEAVY} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == list(VERBS)
    assert all(f"usage: flipscale {verb} " in done.stdout for verb in VERBS)


def test_the_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"{verb} {summary}" in printed for verb, summary in VERBS.items())
