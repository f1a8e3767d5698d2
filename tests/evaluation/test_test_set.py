"""Test sets: their layouts, and what is wrong with them in one line each."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from conftest import add_member
from evaluation.made_up_sets import npy, write_set

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.test_set import TestSet


class Reader(Embedder):
    """Reads labels; embeds nothing."""

    image_size = 32


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Reader(None, None, Accelerator(cpu=True))


def one_hot(number: int, label: int) -> dict[str, bytes]:
    return {"npy": npy((np.arange(16) == label).astype(np.uint8))}


def labels_of(folder: Path, embedder: Embedder) -> list[int]:
    return TestSet.open(str(folder)).labels(embedder, 16).tolist()


def test_shards_of_eleven_are_in_the_order_of_their_numbers(tmp_path: Path, embedder: Embedder) -> None:
    folder = write_set(tmp_path / "set", 11, 2, lambda number, label: {"cls": str(number % 16).encode()})
    assert labels_of(folder, embedder) == [number % 16 for number in range(22)]
    # Shards that the count leaves out are no part of the set.
    (folder / "test" / "nshards.txt").write_text("3\n")
    assert labels_of(folder, embedder) == list(range(6))
    # Without a count, and with the shards beside the text files.
    (folder / "test" / "nshards.txt").unlink()
    assert labels_of(folder, embedder) == labels_of(folder / "test", embedder) == [n % 16 for n in range(22)]
    # Other names are sorted as text.
    (folder / "test" / "10.tar").rename(folder / "test" / "1b.tar")
    assert labels_of(folder, embedder)[4:6] == [4, 5]


@pytest.mark.parametrize(
    ("count", "message"),
    [
        ("12", r"test has 11 of the 12 shards that its nshards.txt says, without 11.tar: it is half downloaded; fetch"),
        ("many", r"test/nshards.txt says 'many'; it must be the number of shards"),
        ("0", r"test/nshards.txt says '0'; it must be the number of shards"),
    ],
)
def test_a_half_downloaded_set(tmp_path: Path, count: str, message: str) -> None:
    folder = write_set(tmp_path / "set", 11, 1, one_hot)
    (folder / "test" / "nshards.txt").write_text(count)
    with pytest.raises(ValueError, match=message):
        TestSet.open(str(folder))


def test_a_cut_shard(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", 1, 3, one_hot)
    shard = folder / "test" / "0.tar"
    shard.write_bytes(shard.read_bytes()[:-11_000])
    with pytest.raises(ValueError, match=r"0.tar is damaged \(it ends at byte .*\); an evaluation needs it whole"):
        TestSet.open(str(folder))


def test_names_and_prompts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_set(tmp_path / "set", 1, 1, one_hot)
    test_set = TestSet.open(f"{folder}/")
    for lines, what in ((test_set.class_names, "class names"), (test_set.templates, "prompts, {c} for the name")):
        name = {"class names": "classnames.txt"}.get(what, "zeroshot_classification_templates.txt")
        with pytest.raises(ValueError, match=rf"set/{name} is missing; it lists the {what}, one a line"):
            lines()
        (folder / name).write_text("\n\n")
        with pytest.raises(ValueError, match=rf"set/{name} is empty; it lists the {what}, one a line"):
            lines()
        (folder / name).write_bytes("caf\xe9".encode("latin-1"))
        with pytest.raises(ValueError, match=rf"set/{name} is not UTF-8 \(unexpected end of data\); write it anew"):
            lines()
        (folder / name).write_text("one \r\n\ntwo\n")
        assert lines() == ["one", "", "two"]
    assert "line 2 of" in caplog.text
    assert "classnames.txt is blank, and counts as one of the class names" in caplog.text


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(15), r"0.tar#0 has labels of shape \(15,\); 16 names are listed"),
        (np.ones((1, 16)), r"0.tar#0 has labels of shape \(1, 16\); 16 names are listed"),
        (np.full(16, 2), r"0.tar#0 has a label 2; KEY.npy holds 1 for each class of the image, else 0"),
        (np.full(16, -1.0), r"0.tar#0 has a label -1.0; KEY.npy holds 1 for each class"),
        (np.array(["yes"] * 16), r"0.tar#0 has values of type <U3 in KEY.npy; it must hold numbers"),
        (np.array([print] * 16), r"0.tar#0 has a KEY.npy that cannot be read \(Object arrays cannot be loaded"),
    ],
)
def test_label_sets_that_cannot_be(tmp_path: Path, embedder: Embedder, array: np.ndarray, message: str) -> None:
    folder = write_set(tmp_path / "set", 1, 1, lambda number, label: {"npy": npy(array)})
    with pytest.raises(ValueError, match=message):
        TestSet.open(str(folder)).label_sets(embedder, 16)


def test_label_sets(tmp_path: Path, embedder: Embedder) -> None:
    folder = write_set(tmp_path / "set", 2, 3, one_hot)
    assert TestSet.open(str(folder)).label_sets(embedder, 16).sum(dim=1).tolist() == [1] * 6
    cut = write_set(tmp_path / "cut", 1, 1, lambda number, label: {"npy": npy(np.ones(16))[:-1]})
    with pytest.raises(ValueError, match=r"0.tar#0 has a KEY.npy that cannot be read \(.+\)"):
        TestSet.open(str(cut)).label_sets(embedder, 16)


def test_arrays_of_groups(tmp_path: Path, embedder: Embedder) -> None:
    folder = write_set(tmp_path / "set", 1, 2, lambda number, label: {"npy": npy(np.array([number, 1.0]))})
    assert TestSet.open(str(folder)).arrays(embedder, ("region", "country")).tolist() == [[0, 1], [1, 1]]
    with pytest.raises(ValueError, match=r"0.tar#0 has \[0.0, 1.0\] in KEY.npy; it must hold numbers of a, b, c"):
        TestSet.open(str(folder)).arrays(embedder, ("a", "b", "c"))
    folder = write_set(tmp_path / "half", 1, 1, lambda number, label: {"npy": npy(np.array([0.5]))})
    with pytest.raises(ValueError, match=r"0.tar#0 has \[0.5\] in KEY.npy; it must hold numbers of region"):
        TestSet.open(str(folder)).arrays(embedder, ("region",))


def test_an_index_of_before_arrays(tmp_path: Path, embedder: Embedder) -> None:
    folder = write_set(tmp_path / "set", 1, 1, one_hot)
    test_set = TestSet.open(str(folder))
    # The manifest was made of such an index; its rows follow its 64 bytes of head.
    content = bytearray(test_set.source.manifest.path.read_bytes())
    content[64 + 16 : 64 + 24] = bytes(8)
    test_set.source.manifest.path.write_bytes(content)
    fix = r"run `flipscale prepare index '.*set/test/\{0..0\}.tar'`"
    with pytest.raises(ValueError, match=rf"0.tar#0 has no KEY.npy in the shard's index; .*: {fix}"):
        TestSet.open(str(folder)).label_sets(embedder, 16)


def test_labels_and_captions_that_cannot_be(tmp_path: Path, embedder: Embedder) -> None:
    folder = write_set(tmp_path / "set", 1, 1, lambda number, label: {"cls": b" 16\n"})
    with pytest.raises(ValueError, match=r"0.tar#0 has class 16; 16 names are listed"):
        labels_of(folder, embedder)
    folder = write_set(tmp_path / "blank", 1, 1, lambda number, label: {"txt": b" \n\n"})
    with pytest.raises(ValueError, match=r"0.tar#0 has no caption; every image needs a KEY.txt"):
        TestSet.open(str(folder)).captions(embedder)
    folder = write_set(tmp_path / "several", 1, 1, lambda number, label: {"txt": b"a\n\n b \n"})
    assert TestSet.open(str(folder)).captions(embedder) == [["a", "", " b "]], "as they are"


def test_captions_of_json(tmp_path: Path, embedder: Embedder) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add_member(tar, "0.png", b"picture")
        add_member(tar, "0.json", b'{"captions": ["a disc", "a ring"]}')
    assert TestSet.open(str(tmp_path)).captions(embedder) == [["a disc", "a ring"]]
