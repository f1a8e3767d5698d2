"""Shards with smaller images: the same keys, captions and order, the same bytes by any number of processes."""

import os
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from filelock import FileLock

from flipscale.cli import main
from flipscale.data.decode import decode_whole
from flipscale.data.sources.tar import TarSource, add_member

SIDE = 24


def encoded(height: int, width: int, kind: str) -> bytes:
    image = cv2.resize(np.random.default_rng(height).integers(0, 256, (6, 8, 3), np.uint8), (width, height))
    if kind == "png":
        return cv2.imencode(".png", image)[1].tobytes()
    return simplejpeg.encode_jpeg(image, quality=95)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards: wide and high JPEGs, a large PNG, small images, one that is not an image, and other files."""
    folder = tmp_path_factory.mktemp("made") / "shards"
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number, (height, width, kind) in enumerate(
                [(48, 96, "jpg"), (100, 50, "JPG"), (72, 72, "png"), (20, 40, "jpg"), (SIDE, 90, "png")]
            ):
                key = f"{shard}{number}"
                add_member(tar, f"{key}.{kind}", encoded(height, width, kind.lower()))
                add_member(tar, f"{key}.txt", f"caption {key}".encode())
                add_member(tar, f"{key}.cls", b"3")
                add_member(tar, f"{key}.json", b'{"width": 1}')
            add_member(tar, "last.jpg", b"not an image")
            add_member(tar, "last.txt", b"the last")
    return folder


@pytest.fixture(scope="module")
def small(made: Path) -> Path:
    """The shards after one process has resized them."""
    resize(made, made.with_name("small"))
    return made.with_name("small")


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "shards")


def resize(shards: Path, out: Path, processes: int = 1) -> None:
    main(["prepare", "resize", str(shards), str(out), "--short_side", str(SIDE), "--num_workers", str(processes)])


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without the indices, which have the shards' times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".npy"}


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_images_shrink_and_all_else_stays(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resize(shards, tmp_path / "out")
    assert "18 images, 9 of them shrunk to a short side of 24" in capsys.readouterr().out
    for shard in shards.glob("*.tar"):
        before, after = members(shard), members(tmp_path / "out" / shard.name)
        assert [name.split(".")[0] for name in before] == [name.split(".")[0] for name in after]
        for old, new in zip(before, after, strict=True):
            if old.split(".")[0][-1] in "012" and not old.endswith(("txt", "cls", "json")):
                image, small = decode_whole(before[old]), decode_whole(after[new])
                assert new.endswith(".jpg")
                assert min(small.shape[:2]) == SIDE
                assert max(small.shape[:2]) == round(max(image.shape[:2]) * SIDE / min(image.shape[:2]))
                enlarged = cv2.resize(small, image.shape[1::-1]).astype(int)
                assert np.abs(enlarged - image).mean() < 12
            else:
                assert (old, before[old]) == (new, after[new])
    old, new = TarSource(str(shards)), TarSource(str(tmp_path / "out"))
    assert old.shard_sizes == new.shard_sizes
    assert [new.read(1, n).captions for n in range(5)] == [old.read(1, n).captions for n in range(5)]


def test_entries_without_content_are_left_out_and_counted(
    shards: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shard, entries in enumerate(
        [[("x.jpg", b"2", "00.jpg"), ("y.jpg", b"1", "gone.jpg")], [("z.jpg", b"1", "z.jpg")], [("folder", b"5", "")]]
    ):
        with tarfile.open(shards / f"{shard:05d}.tar", "a") as tar:
            for name, kind, target in entries:
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, target
                tar.addfile(member)
    capsys.readouterr()
    resize(shards, tmp_path / "out")
    assert "18 images, 9 of them shrunk" in (said := capsys.readouterr().out)
    assert "3 links, devices or sparse files are left out" in said
    for shard in shards.glob("*.tar"):
        assert members(tmp_path / "out" / shard.name) == members(small / shard.name)


def test_any_processes_and_an_interruption_give_the_same_bytes(made: Path, small: Path, tmp_path: Path) -> None:
    resize(made, tmp_path / "two", 2)
    expected = contents(small)
    assert contents(tmp_path / "two") == expected
    # Killed amid the second shard: a torn line, a shard that is not whole, and a part of the third.
    lines = (tmp_path / "two/resized.jsonl").read_bytes()
    (tmp_path / "two/resized.jsonl").write_bytes(lines[: lines.index(b"00001.tar") + 20])
    (tmp_path / "two/00001.tar").write_bytes(expected["00001.tar"][:512])
    (tmp_path / "two/00002.tar").unlink()
    (tmp_path / "two/.00002.tar.1.partial").write_bytes(b"x")
    resize(made, tmp_path / "two", 2)
    assert contents(tmp_path / "two") == expected


def test_a_damaged_shard_is_named_and_the_others_are_written(
    shards: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    whole = (shards / "00001.tar").read_bytes()
    (shards / "00001.tar").write_bytes(whole[:1500])
    words = ("prepare", "resize", shards, tmp_path / "out", "--short_side", SIDE, "--num_workers", 1)
    assert f"1 of 3 shards are damaged and left out: {shards}/00001.tar (" in refused(*words)
    assert {path.name for path in (tmp_path / "out").glob("*.tar")} == {"00000.tar", "00002.tar"}
    (shards / "00001.tar").write_bytes(whole)
    main([str(word) for word in words])
    assert members(tmp_path / "out/00001.tar")["10.txt"] == b"caption 10"


def test_other_options_and_other_files_are_refused(
    shards: Path, small: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert "'short_side': 30" in refused("prepare", "resize", shards, small, "--short_side", 30)
    assert f"{shards} holds something" in refused("prepare", "resize", shards, shards)
    assert "is a URL" in refused("prepare", "resize", "https://host/{0..1}.tar", tmp_path / "new")


def test_a_source_that_changes_is_resized_anew(shards: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """A shard is replaced by one of the same size and time, as by `cp -p`; another one gets more pairs."""
    out, replaced = tmp_path / "out", shards / "00000.tar"
    resize(shards, out)
    TarSource(str(out))  # leaves a manifest
    inode, state, content = (out / "00002.tar").stat().st_ino, replaced.stat(), replaced.read_bytes()
    replaced.write_bytes(content.replace(b"caption 0", b"another 0"))
    os.utime(replaced, ns=(state.st_atime_ns, state.st_mtime_ns))
    with tarfile.open(shards / "00001.tar", "a") as tar:
        add_member(tar, "new.jpg", encoded(48, 48, "jpg"))
        add_member(tar, "new.txt", b"new")
    resize(shards, out)
    assert members(out / "00000.tar")["00.txt"] == b"another 00"
    assert members(out / "00001.tar")["new.txt"] == b"new"
    assert (out / "00002.tar").stat().st_ino == inode, "an unchanged shard was written again"
    assert TarSource(str(out)).shard_sizes == [6, 7, 6]
    (shards / "00001.tar").rename(shards / "00007.tar")
    assert "1 shards" in refused("prepare", "resize", shards, out, "--short_side", SIDE)


def test_two_processes_share_the_shards(
    made: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process holds shard 1 and then dies; the other writes the rest, waits for shard 1, and writes it."""
    lock = FileLock(tmp_path / "two/.00001.tar.lock")
    seen: list[set[str]] = []

    def look(seconds: float) -> None:
        if seconds:
            seen.append({path.name for path in (tmp_path / "two").glob("*.tar")})
            lock.release()

    (tmp_path / "two").mkdir()
    lock.acquire()
    monkeypatch.setattr(time, "sleep", look)
    resize(made, tmp_path / "two")
    assert seen == [{"00000.tar", "00002.tar"}]
    assert contents(tmp_path / "two") == contents(small)
