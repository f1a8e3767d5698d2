"""Choice of the long tests: all, none, or the sixth whose turn it is.

A test marked `long` belongs to one of six sixths, by its id. `make test` runs every other test and one sixth, chosen by
the number of commits, so that a long test is run at least once in six commits. `make nightly` runs all.
"""

import os
import subprocess
import time
import zlib
from pathlib import Path

import pytest

SIXTHS = 6
VARIABLE = "FLIPSCALE_LONG"
ROOT = Path(__file__).parents[1]


def sixth_of(test: str) -> int:
    """Return the sixth of a test id, which depends on nothing but the id."""
    return zlib.crc32(test.encode()) % SIXTHS


def whose_turn(root: Path = ROOT) -> tuple[int, str]:
    """Return the sixth to run now, and the reason.

    A shallow clone or an unpacked archive does not know the number of commits, so the day decides there.
    """
    commits = _git(root, "rev-list", "--count", "HEAD")
    if commits.isdigit() and _git(root, "rev-parse", "--is-shallow-repository") == "false":
        return int(commits) % SIXTHS, f"{commits} commits"
    return int(time.time() / 86400) % SIXTHS, "the history is not here, so the day decides"


def _git(root: Path, *arguments: str) -> str:
    """Return git's output, or an empty string without git or a repository."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def is_chosen(choice: str, test: str) -> bool:
    """Return whether a long test is run under a choice: `all`, `none`, or the number of a sixth."""
    return choice == "all" or choice == str(sixth_of(test))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Choose the long tests once, for the processes of pytest-xdist too, and print the choice."""
    config = session.config
    if hasattr(config, "workerinput"):  # a process of pytest-xdist, which inherits the choice
        return
    choice = os.environ.get(VARIABLE, "")
    if choice not in ("all", "none", *map(str, range(SIXTHS)), ""):
        raise pytest.UsageError(f"{VARIABLE} is {choice!r}; expected all, none, or a sixth from 0 to {SIXTHS - 1}")
    reason = VARIABLE
    if not choice and config.args_source is config.ArgsSource.ARGS:
        choice, reason = "all", "the command names tests"
    elif not choice:
        sixth, reason = whose_turn()
        choice = str(sixth)
    os.environ[VARIABLE] = choice
    shown = f"sixth {choice} of 0 to {SIXTHS - 1}" if choice.isdigit() else choice
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(f"long tests: {shown} ({reason}); {VARIABLE}=all or `make nightly` runs all")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long tests that are not chosen."""
    choice = os.environ[VARIABLE]
    left_out = [i for i in items if i.get_closest_marker("long") and not is_chosen(choice, i.nodeid)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        dropped = set(left_out)
        items[:] = [item for item in items if item not in dropped]
