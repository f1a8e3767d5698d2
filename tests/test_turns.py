"""The choice of the long tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import turns

IDS = [f"tests/fuzz/test_fuzz.py::test_reader[{number}]" for number in range(600)]


def test_each_long_test_has_one_sixth_and_sixths_are_alike() -> None:
    sizes = [sum(turns.is_chosen(str(sixth), test) for test in IDS) for sixth in range(turns.SIXTHS)]
    assert sum(sizes) == len(IDS)
    assert min(sizes) > 70
    assert all(turns.is_chosen("all", test) and not turns.is_chosen("none", test) for test in IDS)


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def test_six_commits_have_six_turns(tmp_path: Path) -> None:
    git(tmp_path, "init")
    seen = set()
    for number in range(turns.SIXTHS):
        git(tmp_path, "commit", "--allow-empty", "-m", str(number))
        sixth, reason = turns.whose_turn(tmp_path)
        assert reason == f"{number + 1} commits"
        seen.add(sixth)
    assert seen == set(range(turns.SIXTHS))


@pytest.mark.parametrize("history", ["shallow", "no repository", "no git"])
def test_the_day_decides_without_a_history(history: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if history == "shallow":
        git(tmp_path, "init", "whole")
        for number in range(3):
            git(tmp_path / "whole", "commit", "--allow-empty", "-m", str(number))
        git(tmp_path, "clone", "--depth", "1", f"file://{tmp_path}/whole", "clone")
        tmp_path = tmp_path / "clone"
    elif history == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(turns.time, "time", lambda: 86400.0 * (6 * 3000 + 4))
    assert turns.whose_turn(tmp_path) == (4, "the history is not here, so the day decides")


TESTS = """
import pytest
from turns import pytest_collection_modifyitems, pytest_sessionstart

@pytest.mark.long
@pytest.mark.parametrize("number", range(60))
def test_long(number): ...

def test_short(): ...
"""


def test_a_session_runs_what_is_short_and_what_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from turns import pytest_collection_modifyitems, pytest_sessionstart\n")
    (tmp_path / "test_a.py").write_text(TESTS)
    (tmp_path / "setup.cfg").write_text("[tool:pytest]\nmarkers =\n    long: long\ntestpaths = test_a.py\n")

    def collected(choice: str, *more: str) -> tuple[set[str], str]:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), turns.VARIABLE: choice}
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *more]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return {line for line in done.stdout.splitlines() if "::" in line}, done.stdout + done.stderr

    sixths = [collected(str(sixth))[0] for sixth in (0, 1)]
    assert sixths[0] & sixths[1] == {"test_a.py::test_short"}
    assert all(1 < len(sixth) < 30 for sixth in sixths)
    tests, printed = collected("")
    assert len(tests) < 30
    assert "long tests: sixth " in printed
    tests, printed = collected("", "test_a.py")
    assert (len(tests), "long tests: all" in printed) == (61, True)
    assert "FLIPSCALE_LONG is 'some'" in collected("some")[1]
