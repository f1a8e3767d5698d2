"""Digests find every change of a file, and say in which part of it."""

import json
import os
from pathlib import Path

import pytest

from flipscale.io.digests import (
    CHUNK_BYTES,
    CorruptFile,
    Digester,
    FileDigest,
    chunks_of,
    damaged_chunks,
    digest_of,
    digests_to_json,
    read_bytes,
    read_digests,
)


@pytest.fixture(scope="module")
def content() -> bytes:
    """Two chunks and a bit."""
    return os.urandom(2 * CHUNK_BYTES + 1000)


def damaged(file: Path, digest: FileDigest) -> list[int]:
    digests = {file.name: digest}
    return [number for _, number in damaged_chunks(file.parent, digests, chunks_of(digests), num_threads=2)]


def test_a_file_is_as_written_however_it_was_cut(content: bytes, tmp_path: Path) -> None:
    digester = Digester()
    for piece in (content[:7], content[7:CHUNK_BYTES], b"", memoryview(content)[CHUNK_BYTES:]):
        digester.update(piece)
    digest = digester.digest()
    assert digest == digest_of(content)
    assert digest.num_bytes == len(content)
    assert len(digest.chunks) == 3
    (tmp_path / "file").write_bytes(content)
    assert damaged(tmp_path / "file", digest) == []

    file = tmp_path / "file"
    for position, chunk in ((0, 0), (CHUNK_BYTES - 1, 0), (CHUNK_BYTES, 1), (len(content) - 1, 2)):
        changed = bytearray(content)
        changed[position] ^= 1
        file.write_bytes(changed)
        assert damaged(file, digest) == [chunk]


def test_digests_are_read_back(tmp_path: Path) -> None:
    digests = {"one": digest_of(b"1"), "none": digest_of(b"")}
    (tmp_path / "digests.json").write_text(digests_to_json(digests))
    assert read_digests(tmp_path / "digests.json") == digests


GOOD = json.loads(digests_to_json({"one": digest_of(b"1")}))


@pytest.mark.parametrize(
    "content",
    [
        "", "null", "[" * 100_000, json.dumps({**GOOD, "chunk_bytes": 1}), json.dumps({**GOOD, "files": []}),
        json.dumps({**GOOD, "files": {"one": {"bytes": 1, "xxh3_64": []}}}),
        json.dumps({**GOOD, "files": {"one": {"bytes": "1", "xxh3_64": ["a"]}}}),
    ],
)  # fmt: skip
def test_other_content_is_no_digests(content: str, tmp_path: Path) -> None:
    (tmp_path / "digests.json").write_text(content)
    with pytest.raises(CorruptFile, match=r"digests\.json is unreadable"):
        read_digests(tmp_path / "digests.json")


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "large").write_bytes(b"12345")
    for name, fault in {
        "pipe": "pipe is not a regular file",
        "loop": "loop is missing",
        "absent": "absent is missing",
        ".": "not a regular file",
        "large/under": "under is missing",
        "large": "large has 5 bytes; expected at most 4",
    }.items():
        with pytest.raises(CorruptFile, match=fault):
            read_bytes(tmp_path / name, most=4)


def test_an_error_of_the_disk_is_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(PermissionError):
        read_bytes(tmp_path / "file")
