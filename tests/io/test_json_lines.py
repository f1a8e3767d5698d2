"""JSON lines: a torn line of one writer spoils no record of the next."""

import os
from pathlib import Path

import pytest

from flipscale.io import json_lines


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert json_lines.read(path) == []
    json_lines.append(path, [{"step": 1}])
    json_lines.append(path, [])
    json_lines.append(path, [{"step": 2}, {"step": 3, "name": "ä"}])
    assert json_lines.read(path) == [{"step": 1}, {"step": 2}, {"step": 3, "name": "ä"}]
    assert len(path.read_text().splitlines()) == 3


def test_a_line_cut_off_and_appended_to_loses_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "starts.jsonl"
    json_lines.append(path, [{"step": 1}, {"step": 2}])
    whole = path.read_bytes()
    for cut in range(len(whole) // 2 + 1, len(whole)):
        path.write_bytes(whole[:cut])
        json_lines.append(path, [{"step": 3}])
        steps = [record["step"] for record in json_lines.read(path)]
        assert steps in ([1, 3], [1, 2, 3]), whole[:cut]


def test_a_line_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "name": "\xc3')
    assert json_lines.read(path) == [{"step": 1}]
    json_lines.rewrite(path, [{"step": 7}])
    assert path.read_text() == '{"step": 7}\n'


def test_records_go_to_disk_in_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(json_lines.os, "fsync", synced.append)
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"torn')
    json_lines.append(path, [{"step": number, "text": "x" * 9000} for number in range(3)], is_synced=True)
    assert len(synced) == 1
    json_lines.append(tmp_path / "new.jsonl", [{"step": 1}], is_synced=True)
    assert len(synced) == 3, "a new file's name is to be on disk too"
    assert [record["step"] for record in json_lines.read(path)] == [0, 1, 2]


def test_lines_that_are_no_records_are_skipped_and_counted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\n\0\xff\n[1]\n{}\n{"step": 3}\n{"step": 4')
    for _ in range(2):
        assert [record["step"] for record in json_lines.read(path, "step")] == [1, 3]
    assert caplog.messages == [f"{path}: 3 of 7 lines are no records of it and are skipped"]
    json_lines.append(path, [{"step": 5}])
    assert [record["step"] for record in json_lines.read(path, "step")] == [1, 3, 5]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a.jsonl is not a plain file"):
        json_lines.read(tmp_path / "a.jsonl")
