"""Room on a disk, sizes in words, and cores."""

import shlex
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from flipscale.io.paths import check_disk_space, quoted, size_text


def test_the_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage(3000, 1000, 2000))
    check_disk_space(tmp_path / "a/b", 2000, "write less")
    with pytest.raises(ValueError, match=r"2.05 kB are needed and the disk of .*b has 2 kB free; .*, or write less$"):
        check_disk_space(tmp_path / "a/b", 2048, "write less")
    assert asked == [tmp_path] * 2


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (123_456, "123 kB"), (3 * 10**15, "3000 TB")]
)
def test_sizes(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text


def test_a_path_is_one_word_of_a_shell() -> None:
    for path in ("a b", "it's", "$(x)", "*.tar", "-dash.yaml"):
        (word,) = shlex.split(quoted(path))
        assert word.removeprefix("./") == path
        assert not word.startswith("-")
    assert quoted(Path("runs/a")) == "runs/a"
