"""What a test set holds beside its images: class names, labels and captions, read without reading an image."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import torch

from flipscale.data.sources.tar_source import TarSource
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.images import SampleNumbers

Value = TypeVar("Value")


@dataclass(frozen=True)
class TestSet:
    """An opened test set, which the tasks of the same data share."""

    __test__: ClassVar[bool] = False  # pytest would take it for tests

    data: str
    source: TarSource

    @classmethod
    def open(cls, data: str) -> "TestSet":
        """Return the test set of a folder.

        Raises:
            ValueError: a shard is missing.
        """
        return cls(data, TarSource(data))


def read_lines(path: Path, what: str) -> list[str]:
    """Return the lines of a text file that are not blank.

    Raises:
        ValueError: the file is missing.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; it lists {what}, one a line")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_class_names(folder: str | Path) -> list[str]:
    """Return the names of a classification set's classes, in the order of their numbers.

    Raises:
        ValueError: `classnames.txt` is missing.
    """
    return read_lines(Path(folder) / "classnames.txt", "the class names")


def read_labels(embedder: Embedder, source: TarSource, num_classes: int) -> torch.Tensor:
    """Collective. Return the class numbers of this process's rows of `source`, int64 `(rows,)`.

    Raises:
        ValueError: a sample of any process has no class number below `num_classes`.
    """

    def label(shard: int, number: int) -> int:
        found = source.read_label(shard, number)
        if found is None or not 0 <= found < num_classes:
            raise ValueError(f"{source.shard_name(shard)}#{number} has class {found}; {num_classes} names are listed")
        return found

    return torch.tensor(_of_my_rows(embedder, source, label), dtype=torch.int64)


def read_captions(embedder: Embedder, source: TarSource) -> list[list[str]]:
    """Collective. Return the captions of every image of `source`, the lines of its `KEY.txt`.

    Raises:
        ValueError: an image has no caption.
    """

    def captions(shard: int, number: int) -> list[str]:
        stored = source.read_captions(shard, number)
        lines = [line.strip() for line in (stored[0] if stored else b"").decode("utf-8").splitlines() if line.strip()]
        if not lines:
            raise ValueError(
                f"{source.shard_name(shard)}#{number} has no caption; retrieval needs a KEY.txt for every image"
            )
        return lines

    from accelerate.utils import gather_object

    mine = _of_my_rows(embedder, source, captions)
    pairs = gather_object(list(zip(embedder.rows(len(source)).tolist(), mine, strict=True)))
    return [lines for _, lines in sorted(pairs)]


def _of_my_rows(embedder: Embedder, source: TarSource, read: Callable[[int, int], Value]) -> list[Value]:
    """Collective. Return what `read` says of this process's rows.

    Raises:
        ValueError: on every process, if `read` raised it on any: a process that left alone would leave the others
            waiting.
    """
    where = SampleNumbers(source)
    if not where:
        raise ValueError(f"the test set is empty: 0 samples in {len(source.shard_sizes)} shards ({source.list.shards})")
    found: list[Value] = []
    faults: list[tuple[int, str]] = []
    for row in embedder.rows(len(where)).tolist():
        embedder.alive()
        try:
            found.append(read(*where[row]))
        except ValueError as error:
            faults.append((row, str(error)))
            break
    from accelerate.utils import gather_object

    faults = gather_object(faults)
    if faults:
        raise ValueError(min(faults)[1])
    return found
