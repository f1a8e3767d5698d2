"""Progress of long work, on a terminal and off it."""

import io
import logging
import sys

import pytest

from flipscale.io.progress import Progress, each


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_a_line_each_half_minute_off_a_terminal(
    clock: list[float], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "flipscale")
    with Progress(1000, "drawing", "icons", initial=400) as bar:
        for _ in range(6):
            clock[0] += 20
            bar.update(50)
    with Progress(2_000_000_000, "tasks", "B") as bar:
        clock[0] += 30
        bar.update(500_000_000)
    assert [record.getMessage() for record in caplog.records] == [
        "drawing: 500 of 1000 icons done, about 03:20 left",
        "drawing: 600 of 1000 icons done, about 02:40 left",
        "drawing: 700 of 1000 icons done, about 02:00 left",
        "tasks: 500M of 2.00GB done, about 01:30 left",
    ]
    assert not capsys.readouterr().err


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := _Terminal())
    assert list(each(range(3), "hashing", "shards")) == [0, 1, 2]
    assert "hashing: 100%" in terminal.getvalue()
    with Progress(3, "hidden", "shards", hidden=True) as bar:
        bar.update(3)
    assert "hidden" not in terminal.getvalue()
    assert not caplog.records
