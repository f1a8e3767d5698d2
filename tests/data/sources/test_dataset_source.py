"""The rows of a Dataset: each is a sample or is counted, and no file is read but the dataset's own."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from data.conftest import encoded
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature

from flipscale.data.samples import BadSample
from flipscale.data.sources.dataset import DatasetSource, load_rows

FOREIGN = ("/etc/passwd", "{here}/../../etc/passwd", "/dev/zero", "")
PNG = encoded(np.zeros((8, 8, 3), np.uint8))
NO_FILES = ("{here}", "{here}/pipe", "{here}/none", "{here}/a\0b", "{here}/" + "x" * 300)


def source(images: list[Any], captions: list[Any], image: Any, caption: Any, name: str = "x") -> DatasetSource:
    rows = Dataset.from_dict({"image": images, "text": captions}, features=Features({"image": image, "text": caption}))
    return DatasetSource(rows, name, "image", ["text"])


def test_a_folder_of_images_is_read_under_any_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/0.png").write_bytes(PNG)
    (tmp_path / "real/metadata.jsonl").write_text('{"file_name": "0.png", "text": "a cat"}\n')
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("real", "link"):
        rows = load_rows(str(tmp_path / name), None, "train")
        sample = DatasetSource(rows, str(tmp_path / name), "image", ["text"]).read(0, 0)
        assert (sample.image, sample.captions) == (PNG, (b"a cat",))


@pytest.mark.parametrize("path", [*FOREIGN, *NO_FILES])
def test_a_path_that_is_no_file_of_the_dataset_is_counted(path: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    stored = {"path": path.format(here=tmp_path), "bytes": None}
    rows = source([stored], ["a cat"], ImageFeature(decode=False), Value("string"), str(tmp_path))
    with pytest.raises(BadSample) as raised:
        rows.read(0, 0)
    assert raised.value.cause == "missing_image"


@pytest.mark.parametrize(
    ("image", "caption", "cause"),
    [
        (None, ["a"], "missing_image"),
        (b"x", None, "missing_caption"),
        (b"x", [None], "missing_caption"),
        (b"x", [], "missing_caption"),
    ],
)
def test_a_row_without_image_or_caption_is_counted(image: Any, caption: Any, cause: str) -> None:
    with pytest.raises(BadSample) as raised:
        source([image], [caption], Value("binary"), List(Value("string"))).read(0, 0)
    assert raised.value.cause == cause


def test_a_list_has_several_captions_and_nulls_are_none() -> None:
    rows = source([b"x"], [["a", None, "b"]], Value("binary"), List(Value("string")))
    assert rows.read(0, 0).captions == (b"a", b"b")


def test_a_text_that_is_no_utf_8_is_counted() -> None:
    buffers = [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    table = pa.table({"image": pa.array([b"x"]), "text": pa.Array.from_buffers(pa.string(), 1, buffers)})
    with pytest.raises(BadSample, match="codec") as raised:
        DatasetSource(Dataset(table), "x", "image", ["text"]).read(0, 0)
    assert raised.value.cause == "unreadable_row"


@pytest.mark.parametrize(
    ("image", "caption", "says"),
    [
        (Value("string"), Value("string"), "no images in column 'image'"),
        (Value("binary"), Value("int64"), "no captions in column 'text'"),
        (Value("binary"), ClassLabel(names=["cat"]), "no captions in column 'text'"),
        (Value("binary"), List(List(Value("string"))), "no captions in column 'text'"),
    ],
)
def test_columns_of_another_kind_are_refused(image: Any, caption: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        source([], [], image, caption)
