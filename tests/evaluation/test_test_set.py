"""Test sets: their layouts, and one line for each fault."""

from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from evaluation.made_up_sets import npy, write_samples, write_set

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.test_set import TestSet


class Reader(Embedder):
    image_size = 32


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Reader(None, None, Accelerator(cpu=True))


def one_hot(number: int, label: int) -> dict[str, bytes]:
    return {"npy": npy((np.arange(16) == label).astype(np.uint8))}


def labels_of(folder: Path, embedder: Embedder) -> list[int]:
    return TestSet.open(str(folder)).labels(embedder, 16).tolist()


def test_shards_are_in_the_order_of_their_numbers(tmp_path: Path, embedder: Embedder) -> None:
    folder = write_set(tmp_path / "set", 11, 2, lambda number, label: {"cls": str(number % 16).encode()})
    assert labels_of(folder, embedder) == [number % 16 for number in range(22)]
    # Shards beyond the count are no part of the set.
    (folder / "test" / "nshards.txt").write_text("3\n")
    assert labels_of(folder, embedder) == list(range(6))
    # Without a count, and with the shards beside the text files.
    (folder / "test" / "nshards.txt").unlink()
    assert labels_of(folder, embedder) == labels_of(folder / "test", embedder) == [n % 16 for n in range(22)]
    # Other names are sorted as text.
    (folder / "test" / "10.tar").rename(folder / "test" / "1b.tar")
    assert labels_of(folder, embedder)[4:6] == [4, 5]


@pytest.mark.parametrize(
    ("count", "message"), [("12", r"11 of the 12 shards.*11.tar.*half downloaded"), ("many", "'many'"), ("0", "'0'")]
)
def test_half_downloaded(tmp_path: Path, count: str, message: str) -> None:
    folder = write_set(tmp_path / "set", 11, 1, one_hot)
    (folder / "test" / "nshards.txt").write_text(count)
    with pytest.raises(ValueError, match=message):
        TestSet.open(str(folder))


def test_names_and_prompts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_set(tmp_path / "set", 1, 1, one_hot)
    test_set = TestSet.open(f"{folder}/")
    names, prompts = "classnames.txt", "zeroshot_classification_templates.txt"
    for read, name in ((test_set.class_names, names), (test_set.templates, prompts)):
        with pytest.raises(ValueError, match=f"set/{name} is missing.*flipscale prepare shards --labels"):
            read()
        (folder / name).write_text("\n\n")
        with pytest.raises(ValueError, match=f"set/{name} is empty"):
            read()
        (folder / name).write_bytes("caf\xe9".encode("latin-1"))
        with pytest.raises(ValueError, match=f"set/{name} is not UTF-8"):
            read()
        (folder / name).write_bytes("one\ntwo\n".encode("utf-16-be"))
        with pytest.raises(ValueError, match=f"set/{name} is UTF-16"):
            read()
    (folder / prompts).write_text("\ufeffone \r\n\ntwo\n", encoding="utf-8")  # with the mark of an editor
    assert test_set.templates() == ["one", "", "two"], "a blank prompt counts"
    (folder / names).write_text("one \r\ntwo\none\n\n\n")
    assert test_set.class_names() == ["one", "two", "one"], "blank lines at the end do not"
    assert "classnames.txt has 1 names more than once, such as 'one'" in caplog.text
    (folder / names).write_text("one\n \ntwo\n")
    with pytest.raises(ValueError, match=r"line 2 of .*classnames.txt is blank"):
        test_set.class_names()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(15), r"labels of shape \(15,\); 16"),
        (np.full(16, 2), "a label 2;"),
        (None, r"unreadable KEY.npy \(.+\)"),
    ],
)
def test_label_sets_that_cannot_be(tmp_path: Path, array: np.ndarray | None, message: str) -> None:
    content = npy(np.ones(16))[:-1] if array is None else npy(array)
    folder = write_set(tmp_path / "set", 1, 1, lambda number, label: {"npy": content})
    with pytest.raises(ValueError, match=f"0.tar#0 has a?.*{message}"):
        TestSet.open(str(folder)).label_set(16, 0, 0)


def test_arrays(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", 1, 2, lambda number, label: {"npy": npy(np.array([number, 1.0]))})
    test_set = TestSet.open(str(folder))
    assert [test_set.array(("region", "country"), 0, number).tolist() for number in (0, 1)] == [[0, 1], [1, 1]]
    assert test_set.label_set(2, 0, 0).tolist() == [False, True]
    with pytest.raises(ValueError, match=r"0.tar#0 has \[0.0, 1.0\] .* a, b, c"):
        test_set.array(("a", "b", "c"), 0, 0)
    folder = write_set(tmp_path / "half", 1, 1, lambda number, label: {"npy": npy(np.array([0.5]))})
    with pytest.raises(ValueError, match=r"0.tar#0 has \[0.5\] .* region"):
        TestSet.open(str(folder)).array(("region",), 0, 0)


def test_labels_and_captions(tmp_path: Path, embedder: Embedder) -> None:
    folder = write_set(tmp_path / "set", 1, 1, lambda number, label: {"cls": b" 16\n"})
    with pytest.raises(ValueError, match=r"0.tar#0 has class 16; 16"):
        labels_of(folder, embedder)
    folder = write_set(tmp_path / "blank", 1, 1, lambda number, label: {"txt": b" \n\n"})
    with pytest.raises(ValueError, match=r"0.tar#0 has no caption"):
        TestSet.open(str(folder)).captions(embedder)
    folder = write_set(tmp_path / "several", 1, 1, lambda number, label: {"txt": b"a\n\n b \n"})
    assert TestSet.open(str(folder)).captions(embedder) == [["a", "", " b "]], "unchanged"
    write_samples(tmp_path, [{"png": b"picture", "json": b'{"captions": ["a disc", "a ring"]}'}])
    assert TestSet.open(str(tmp_path)).captions(embedder) == [["a disc", "a ring"]]
