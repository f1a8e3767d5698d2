"""`KEY.npy` in the index of a shard, and indices of before it."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import add_member

from flipscale.data.sources.shard_index import index_path
from flipscale.data.sources.tar import TarSource


def npy(array: np.ndarray) -> bytes:
    stored = io.BytesIO()
    np.save(stored, array, allow_pickle=True)
    return stored.getvalue()


def write(path: Path, **files: bytes) -> TarSource:
    """A shard of one sample, whose files are given by their extensions."""
    with tarfile.open(path, "w") as tar:
        for extension, content in files.items():
            add_member(tar, f"s.{extension}", content)
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


@pytest.mark.parametrize("spoilt", ["truncated", "pickled", "no array"])
def test_an_array_that_cannot_be_read(tmp_path: Path, spoilt: str) -> None:
    whole = npy(np.zeros(20))
    content = {"truncated": whole[:-8], "pickled": npy(np.array([print], object)), "no array": b"1 0 1"}[spoilt]
    source = write(tmp_path / "0.tar", jpg=b"picture", npy=content)
    with pytest.raises(ValueError, match=r"0\.tar#0 has a KEY.npy that cannot be read \(.+\)"):
        source.read_array(0, 0)


def test_an_index_of_before_is_made_anew(tmp_path: Path) -> None:
    """As flipscale 0.1 wrote it, in version 1.0 and without arrays; nothing tells whether it is of this shard."""
    write(tmp_path / "0.tar", npy=npy(np.ones(2)), webp=b"picture")
    index = np.load(index_path(tmp_path / "0.tar"))
    index[:, 2] = 0
    np.save(index_path(tmp_path / "0.tar"), index)
    for manifest in tmp_path.glob("*.manifest"):
        manifest.unlink()
    assert TarSource(str(tmp_path)).read_array(0, 0).tolist() == [1, 1]
