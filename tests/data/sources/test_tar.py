"""Random access to shards through the index next to them."""

import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import add_member, write_shards
from data.conftest import write_tar
from evaluation.made_up_sets import npy

from flipscale.data.samples import BadSample
from flipscale.data.sources import tar as tar_source
from flipscale.data.sources.shard_index import index_path
from flipscale.data.sources.tar import TarSource


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
    files = {"x/1.JPG": b"one", "x/1.txt": b"first", "x/1.json": b"{}", "y/1.jpg": b"two", "lonely.txt": b"no picture"}
    write_tar(tmp_path / "a.tar", {**files, "p" * 150 + "/3.webp": b"three"})
    source = TarSource(str(tmp_path))
    assert [source.read(0, n).image for n in range(len(source))] == [b"one", b"two", b"three"]
    assert [source.read(0, n).caption for n in range(3)] == [b"first", None, None]


def test_a_truncated_shard_keeps_what_can_be_read(tmp_path: Path) -> None:
    """Cut anywhere: the samples before it are there and whole, by the index that is built and by the one loaded."""
    write_shards(tmp_path, [6])
    shard = tmp_path / "00000.tar"
    whole = [TarSource(str(tmp_path)).read(0, number) for number in range(6)]
    for size in range(shard.stat().st_size - 10240, 0, -2500):
        os.truncate(shard, size)
        index_path(shard).unlink()
        for _ in ("built", "loaded"):
            source = TarSource(str(tmp_path))
            assert [fault.cause for fault in source.faults] == [
                "truncated_shard" if len(source) else "unreadable_shard"
            ]
            assert source.faults[0].detail.startswith(f"it ends at byte {size}")
            read = [source.read(0, number) for number in range(len(source))]
            assert [sample.image for sample in read] == [sample.image for sample in whole[: len(read)]]
    assert len(source) == 0


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_dialect_of_tar(tmp_path: Path, kind: int) -> None:
    names = ["a.jpg", "folder/b.jpg", "x" * 80 + "/" + "y" * 90 + ".jpg", "\u00e9.jpg"]
    names += [] if kind == tarfile.USTAR_FORMAT else ["z" * 300 + ".jpg"]
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
        tar.addfile(tarfile.TarInfo("folder"))
        for name in names:
            add_member(tar, name, name.encode())
    source = TarSource(str(tmp_path))
    assert [source.read(0, number).image.decode() for number in range(len(source))] == names
    assert source.faults == []


def test_several_captions(tmp_path: Path) -> None:
    """A list in the JSON object wins over the text, its single `caption` only stands in for it."""
    fields = [
        b'{"captions": ["one", "two"], "caption": "x"}', b'{"caption": "other"}', b'{"caption": "alone"}',
        b'{"captions": "no list", "url": 1',
    ]  # fmt: skip
    files = {f"{number}.json": content for number, content in enumerate(fields)}
    files |= {f"{number}.jpg": b"picture" for number in range(4)}
    write_tar(tmp_path / "a.tar", {**files, "0.txt": b"text", "1.txt": b"text"})
    source = TarSource(str(tmp_path))
    assert [source.read(0, number).captions for number in range(3)] == [(b"one", b"two"), (b"text",), (b"alone",)]
    with pytest.raises(BadSample, match=r"KEY.json"):
        source.read(0, 3)


def test_a_tar_that_is_not_grouped_by_sample(tmp_path: Path) -> None:
    """All pictures first, the captions far behind them; in between a file that no sample has."""
    files = {f"{number}.jpg": b"picture %d" % number for number in range(3)} | {"readme.md": bytes(10**5)}
    write_tar(tmp_path / "a.tar", files | {f"{number}.txt": b"caption %d" % number for number in range(3)})
    source = TarSource(str(tmp_path))
    samples = [source.read(0, number) for number in range(3)]
    assert [sample.image for sample in samples] == [b"picture 0", b"picture 1", b"picture 2"]
    assert [sample.caption for sample in samples] == [b"caption 0", b"caption 1", b"caption 2"]


def test_a_shard_that_was_cut_since_it_was_indexed(tmp_path: Path) -> None:
    write_shards(tmp_path, [3])
    source = TarSource(str(tmp_path))
    source.read(0, 0)
    shard = tmp_path / "00000.tar"
    os.truncate(shard, 9000)
    os.utime(shard, ns=(shard.stat().st_mtime_ns + 10**9,) * 2)
    assert source.read(0, 0).image
    with pytest.raises(BadSample, match=r"\d+ of \d+ bytes at"):
        source.read(0, 2)


def test_more_shards_than_may_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, [1] * 70)
    monkeypatch.setattr(tar_source, "_most_open", lambda most: 64)
    source = TarSource(str(tmp_path))
    assert all(source.read(shard, 0).image for shard in (*range(70), *range(70)))
    assert len(source._open) == 64


def write(path: Path, **files: bytes) -> TarSource:
    """A shard of one sample, whose files are given by their extensions."""
    write_tar(path, {f"s.{extension}": content for extension, content in files.items()})
    return TarSource(str(path))


def test_labels_are_numbers_or_arrays_or_both(tmp_path: Path) -> None:
    array = np.array([0, 1, 1], np.uint8)
    only = write(tmp_path / "0.tar", npy=npy(array), webp=b"picture")
    assert only.read_array(0, 0).tolist() == [0, 1, 1]
    assert only.read_label(0, 0) is None
    assert only.read(0, 0).label is None

    both = write(tmp_path / "1.tar", cls=b"7\n", jpg=b"picture", npy=npy(array))
    assert both.read_array(0, 0).tolist() == [0, 1, 1]
    assert both.read_label(0, 0) == both.read(0, 0).label == 7
    assert both.read_captions(0, 0) == both.read(0, 0).captions == ()
    assert both.read(0, 0).image == b"picture"

    captioned = write(tmp_path / "2.tar", jpg=b"picture", npy=npy(array), txt=b"a disc")
    assert captioned.read_array(0, 0).tolist() == [0, 1, 1]
    assert captioned.read_captions(0, 0) == (b"a disc",)

    # There is no place for four files; training's come first.
    all_four = write(tmp_path / "3.tar", cls=b"7", jpg=b"picture", npy=npy(array), json=b'{"caption": "a disc"}')
    assert (all_four.read_label(0, 0), all_four.read_captions(0, 0)) == (7, (b"a disc",))
    assert all_four.read_array(0, 0) is None
    for shard in range(4):
        assert np.load(index_path(tmp_path / f"{shard}.tar")).nbytes == 24


def test_of_several_images_the_one_that_clip_benchmark_takes(tmp_path: Path) -> None:
    assert write(tmp_path / "0.tar", jpg=b"jpg", webp=b"webp", png=b"png").read(0, 0).image == b"webp"
    assert write(tmp_path / "1.tar", jpeg=b"jpeg", jpg=b"jpg").read(0, 0).image == b"jpg"


def test_an_array_that_cannot_be_read(tmp_path: Path) -> None:
    for number, content in enumerate((npy(np.zeros(20))[:-8], npy(np.array([print], object)))):
        source = write(tmp_path / f"{number}.tar", jpg=b"picture", npy=content)
        with pytest.raises(ValueError, match=rf"{number}\.tar#0 has an unreadable KEY.npy \(.+\)"):
            source.read_array(0, 0)
