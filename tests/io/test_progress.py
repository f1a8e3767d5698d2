"""Progress of long work, on a terminal and off it."""

import io
import sys

import pytest

from flipscale.io.progress import Progress, each


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := _Terminal())
    assert list(each(range(3), "hashing", "shards")) == [0, 1, 2]
    assert "hashing: 100%" in terminal.getvalue()
    with Progress(3, "hidden", "shards", hidden=True) as bar:
        bar.update(3)
    assert "hidden" not in terminal.getvalue()
    assert not caplog.records
