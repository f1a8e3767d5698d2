"""Random access to shards through the index beside them."""

import os
import pickle
import tarfile
from pathlib import Path

import pytest
from conftest import add_member, write_shards

from flipscale.data.tar_source import TarSource, expand_shards, index_path


def test_reads_what_the_tar_holds(shards: Path) -> None:
    source = TarSource(str(shards))
    assert source.shard_sizes == [30, 17, 1, 48]
    with tarfile.open(shards / "00001.tar") as tar:
        image = tar.extractfile("000033.png").read()
        caption, label = (tar.extractfile(f"000033.{field}").read() for field in ("txt", "cls"))
    sample = source.read(1, 3)
    assert (sample.image, sample.caption, sample.label) == (image, caption, int(label))
    assert sample.name == "00001.tar#3"
    again = pickle.loads(pickle.dumps(source)).read(1, 3)
    assert again == sample


def test_names_as_img2dataset_writes_them(tmp_path: Path) -> None:
    """Subfolders, dots in the extension, upper case, files of no interest, samples without an image."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_member(tar, "x/1.JPG", b"one")
        add_member(tar, "x/1.txt", b"first")
        add_member(tar, "x/1.json", b"{}")
        add_member(tar, "y/1.jpg", b"two")
        add_member(tar, "lonely.txt", b"no picture")
        add_member(tar, "p" * 150 + "/3.webp", b"three")
    source = TarSource(str(tmp_path))
    assert [source.read(0, n).image for n in range(len(source))] == [b"one", b"two", b"three"]
    assert [source.read(0, n).caption for n in range(3)] == [b"first", None, None]


def test_index_is_written_once_and_again_when_the_shard_is_newer(tmp_path: Path) -> None:
    write_shards(tmp_path, [3])
    TarSource(str(tmp_path))
    index = index_path(tmp_path / "00000.tar")
    written = index.stat().st_mtime_ns
    TarSource(str(tmp_path))
    assert index.stat().st_mtime_ns == written
    write_shards(tmp_path, [5])
    os.utime(tmp_path / "00000.tar", ns=(written + 10**9, written + 10**9))
    assert len(TarSource(str(tmp_path))) == 5


def test_a_damaged_index_is_rebuilt(tmp_path: Path) -> None:
    write_shards(tmp_path, [3])
    TarSource(str(tmp_path))
    index_path(tmp_path / "00000.tar").write_bytes(b"junk")
    assert len(TarSource(str(tmp_path))) == 3


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, [6])
    shard = tmp_path / "00000.tar"
    os.truncate(shard, shard.stat().st_size // 2 - 200)
    with pytest.raises(ValueError, match=r"00000.tar cannot be read .*; fetch it again or remove it"):
        TarSource(str(tmp_path))


def test_shard_names(shards: Path) -> None:
    every = sorted(shards.glob("*.tar"))
    assert expand_shards(str(shards)) == expand_shards(f"{shards}/*.tar") == every
    assert expand_shards(f"{shards}/{{00001..00002}}.tar") == every[1:3]


def test_more_shards_than_may_stay_open(tmp_path: Path) -> None:
    write_shards(tmp_path, [1] * 70)
    source = TarSource(str(tmp_path))
    assert all(source.read(shard, 0).image for shard in (*range(70), *range(70)))
