"""A test set in CLIP_benchmark's layout: its shards, and what it holds beside its images, read without reading one."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
import torch

from flipscale.data.recipe import DataRecipe
from flipscale.data.samples import BadSample
from flipscale.data.sources.manifest import no_shards
from flipscale.data.sources.opening import open_shards
from flipscale.data.sources.remote import ShardCache
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.images import SampleNumbers, named
from flipscale.io.errors import UserError

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
NUM_SHARDS = "nshards.txt"
# The longest texts beside test sets have a megabyte: captions of images, not of a set.
_MOST_BYTES, _MOST_LINE = 20 << 20, 10_000
# Evaluations read shard after shard.
READ = DataRecipe(lanes=1, shards_per_block=1)

Value = TypeVar("Value")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TestSet:
    """The images of a test set with their labels or captions, the names of its classes and its prompts.

    Args:
        data: what the recipe names.
        source: its samples; of `{0..N}.tar` in the order of their numbers.
    """

    __test__: ClassVar[bool] = False  # pytest would take it for tests

    data: str
    source: TarSource

    @classmethod
    def open(cls, data: str, part: str = "test") -> "TestSet":
        """Return the test set at `data`, a folder or a URL such as `hf://datasets/clip-benchmark/wds_cars`.

        It has shards in `test/`, as many as `test/nshards.txt` says, and text files beside that folder, as
        CLIP_benchmark lays them out; or all in one folder. Shards at a URL come through the cache of training.

        Args:
            data: the folder or URL.
            part: another folder than `test`, such as `train`.

        Raises:
            ValueError: there are no shards, fewer than `nshards.txt` says, or a damaged one; or the URL cannot be read.
            OSError: a shard cannot be fetched.
        """
        data = str(data).rstrip("/")
        for folder in (f"{data}/{part}", data):
            stored = read_text(folder, NUM_SHARDS)
            if stored is not None:
                source = _opened(_counted(folder, stored))
                break
        else:
            source = _opened(_listed(data, part))
        if source.faults:
            fault = source.faults[0]
            raise UserError(
                f"shard {fault.shard} is damaged ({fault.detail}); an evaluation needs it whole: fetch it again"
            )
        return cls(data, source)

    def __len__(self) -> int:
        return len(self.source)

    def lines(self, name: str, what: str) -> list[str]:
        """Return the lines of a text file of the set, as `read_lines` does.

        Raises:
            ValueError: the file is missing or empty.
        """
        return read_lines(self.data, name, what)

    def class_names(self) -> list[str]:
        """Return the names of the classes, in the order of their numbers.

        Raises:
            ValueError: `classnames.txt` is missing or empty.
        """
        return read_class_names(self.data)

    def templates(self) -> list[str]:
        """Return the set's own prompts, with `{c}` for the name.

        Raises:
            ValueError: `zeroshot_classification_templates.txt` is missing or empty.
        """
        return self.lines(TEMPLATES, "the prompts, {c} for the name")

    def labels(self, embedder: Embedder, num_classes: int) -> torch.Tensor:
        """Collective. Return the class numbers of this process's rows, int64 `(rows,)`.

        Raises:
            ValueError: a sample of any process has no class number below `num_classes`.
        """
        return read_labels(embedder, self.source, num_classes)

    def label_sets(self, embedder: Embedder, num_classes: int) -> torch.Tensor:
        """Collective. Return which classes each of this process's rows has, of its `KEY.npy`: bool `(rows, classes)`.

        Raises:
            ValueError: a sample of any process has no array of `num_classes` zeros and ones.
        """
        found = of_my_rows(embedder, self.source, partial(self.label_set, num_classes))
        return torch.from_numpy(np.array(found, bool).reshape(len(found), num_classes))

    def arrays(self, embedder: Embedder, columns: Sequence[str]) -> torch.Tensor:
        """Collective. Return the numbers in `KEY.npy` of each of this process's rows, int64 `(rows, columns)`.

        Raises:
            ValueError: a sample of any process has no array of so many whole numbers from 0.
        """
        found = of_my_rows(embedder, self.source, partial(self.array, columns))
        return torch.from_numpy(np.array(found, np.int64).reshape(len(found), len(columns)))

    def captions(self, embedder: Embedder) -> list[list[str]]:
        """Collective. Return the captions of every image: the lines of its `KEY.txt` as they are, blank ones too, as in
        CLIP_benchmark.

        Raises:
            ValueError: an image has no caption.
        """
        from accelerate.utils import gather_object

        mine = of_my_rows(embedder, self.source, self.captions_of)
        pairs = gather_object(list(zip(embedder.rows(len(self)).tolist(), mine, strict=True)))
        return [lines for _, lines in sorted(pairs)]

    def label(self, num_classes: int, shard: int, number: int) -> int:
        """Return the class number of a sample.

        Raises:
            ValueError: it has none below `num_classes`.
        """
        return read_label(self.source, num_classes, shard, number)

    def label_set(self, num_classes: int, shard: int, number: int) -> np.ndarray:
        """Return which classes a sample has, bool `(num_classes,)`.

        Raises:
            ValueError: as `label_sets`.
        """
        found, where = _array(self.source, shard, number)
        if found.shape != (num_classes,):
            raise UserError(f"{where} has labels of shape {found.shape}; {num_classes} names are listed")
        if not ((found == 0) | (found == 1)).all():
            odd = found[(found != 0) & (found != 1)][0]
            raise UserError(f"{where} has a label {odd}; KEY.npy holds 1 for each class of the image, else 0")
        return found.astype(bool)

    def array(self, columns: Sequence[str], shard: int, number: int) -> np.ndarray:
        """Return the numbers in a sample's `KEY.npy`, int64 `(columns,)`.

        Raises:
            ValueError: as `arrays`.
        """
        found, where = _array(self.source, shard, number)
        if found.shape != (len(columns),) or not ((found >= 0) & (found == np.trunc(found))).all():
            raise UserError(f"{where} has {found.tolist()} in KEY.npy; it must hold numbers of {', '.join(columns)}")
        return found.astype(np.int64)

    def captions_of(self, shard: int, number: int) -> list[str]:
        """Return the captions of a sample.

        Raises:
            ValueError: it has none.
        """
        stored = self.source.read_captions(shard, number)
        where = f"{self.source.shard_name(shard)}#{number}"
        try:
            lines = [line for text in stored for line in text.decode("utf-8").splitlines()]
        except UnicodeDecodeError as error:
            raise UserError(f"{where} has a caption that is not UTF-8 ({error.reason})") from error
        if not any(line.strip() for line in lines):
            raise UserError(f"{where} has no caption; every image needs a KEY.txt")
        return lines


def read_lines(data: str | Path, name: str, what: str) -> list[str]:
    """Return the lines of a text file of a set, without the spaces around them. A blank line counts, as in
    CLIP_benchmark: other lines keep their numbers.

    Args:
        data: the set's folder or URL.
        what: the lines are, for the error.

    Raises:
        ValueError: the file is missing or empty, or a line is far too long.
    """
    text = read_text(str(data), name)
    if text is None or not text.strip():
        state = "missing" if text is None else "empty"
        raise UserError(f"{data}/{name} is {state}; it lists {what}, one a line")
    lines = [line.strip() for line in text.splitlines()]
    longest = max(range(len(lines)), key=lambda number: len(lines[number]))
    if len(lines[longest]) > _MOST_LINE:
        raise UserError(
            f"line {longest + 1} of {data}/{name} has {len(lines[longest]):,} characters, more than {_MOST_LINE:,}; it "
            f"lists {what}, one a line"
        )
    if "" in lines:
        _log.warning("line %d of %s/%s is blank, and counts as one of %s", lines.index("") + 1, data, name, what)
    return lines


def read_class_names(data: str | Path) -> list[str]:
    """Return the names of a set's classes, in the order of their numbers. A name that stands there twice is told: the
    second of its classes is never the nearest.

    Raises:
        ValueError: `classnames.txt` is missing or empty.
    """
    names = read_lines(data, CLASS_NAMES, "the class names")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        _log.warning("%s/%s has %d names more than once, such as %r", data, CLASS_NAMES, len(twice), twice[0])
    return names


def read_labels(embedder: Embedder, source: TarSource, num_classes: int) -> torch.Tensor:
    """Collective. Return the class numbers of this process's rows of `source`, int64 `(rows,)`.

    Raises:
        ValueError: a sample of any process has no class number below `num_classes`.
    """
    return torch.tensor(of_my_rows(embedder, source, partial(read_label, source, num_classes)), dtype=torch.int64)


def read_label(source: TarSource, num_classes: int, shard: int, number: int) -> int:
    """Return the class number of a sample.

    Raises:
        ValueError: it has none below `num_classes`.
    """
    found = source.read_label(shard, number)
    if found is None or not 0 <= found < num_classes:
        raise UserError(f"{source.shard_name(shard)}#{number} has class {found}; {num_classes} names are listed")
    return found


def _array(source: TarSource, shard: int, number: int) -> tuple[np.ndarray, str]:
    """Return the numbers in a sample's `KEY.npy`, and what the sample is called.

    Raises:
        ValueError: there is none that the index knows, or it holds no numbers.
    """
    where = f"{source.shard_name(shard)}#{number}"
    found = source.read_array(shard, number)
    if found is None:
        raise UserError(
            f"{where} has no KEY.npy in the shard's index; if it has one in the shard, the index is older than such "
            f"files: run `flipscale prepare index '{source.list.shards}'`"
        )
    if found.dtype.kind not in "biuf":
        raise UserError(f"{where} has values of type {found.dtype} in KEY.npy; it must hold numbers")
    return found, where


def of_my_rows(embedder: Embedder, source: TarSource, read: Callable[[int, int], Value]) -> list[Value]:
    """Collective. Return what `read` says of this process's rows.

    Raises:
        ValueError: on every process, if `read` failed on any: a process that left alone would leave the others waiting.
    """
    where = SampleNumbers(source)
    if not where:
        raise UserError(f"the test set is empty: 0 samples in {len(source.shard_sizes)} shards ({source.list.shards})")
    found: list[Value] = []
    faults: list[tuple[int, str]] = []
    for row in embedder.rows(len(where)).tolist():
        embedder.alive()
        try:
            found.append(read(*where[row]))
        except BadSample as error:
            shard, number = where[row]
            faults.append((row, f"{source.shard_name(shard)}#{number} cannot be read: {error}"))
        except ValueError as error:
            faults.append((row, str(error)))
        except OSError as error:
            faults.append((row, str(error)))
            break
    from accelerate.utils import gather_object

    faults = sorted(gather_object(faults))
    if faults:
        raise UserError(named([fault for _, fault in faults], len(where)))
    return found


def _counted(folder: str, stored: str) -> str:
    """Return the range of shards that `nshards.txt` stands for: the whole set, in the order of the numbers.

    Raises:
        ValueError: it holds no count, or shards are missing on this machine.
    """
    count = stored.strip()
    if not count.isdigit() or int(count) < 1:
        raise UserError(f"{folder}/{NUM_SHARDS} says {count[:40]!r}; it must be the number of shards")
    names = [f"{number}.tar" for number in range(int(count))]
    missing = [] if "://" in folder else [name for name in names if not Path(folder, name).is_file()]
    if missing:
        raise UserError(
            f"{folder} has {len(names) - len(missing)} of the {len(names)} shards that its {NUM_SHARDS} says, without "
            f"{missing[0]}: it is half downloaded; fetch the rest"
        )
    return f"{folder}/{{0..{len(names) - 1}}}.tar"


def _listed(data: str, part: str) -> str:
    """Return the name of the shards of a set without `nshards.txt`: those in its `part`, else those of `data` itself.

    Raises:
        ValueError: the folder does not exist.
    """
    if "://" in data:
        return data
    folder = f"{data}/{part}" if any(Path(data, part).glob("*.tar")) else data
    names = {path.name for path in Path(folder).glob("*.tar")}
    if names and names == {f"{number}.tar" for number in range(len(names))}:
        return f"{folder}/{{0..{len(names) - 1}}}.tar"  # 10.tar comes after 9.tar
    return folder


def _opened(shards: str) -> TarSource:
    """Return the source of shards, on this machine or at a URL.

    Raises:
        ValueError: there is none, or the URL cannot be read.
    """
    try:
        return open_shards(shards, READ)
    except FileNotFoundError as error:
        raise no_shards(shards) from error
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise _unreadable(shards, error) from error


def read_text(folder: str, name: str) -> str | None:
    """Return the content of a text file, on this machine or at a URL; None if there is none.

    Raises:
        ValueError: it is no file, too long or not UTF-8, or the URL cannot be read.
        OSError: it cannot be fetched.
    """
    path = f"{folder}/{name}"
    try:
        if "://" not in folder:
            if Path(path).exists() and not Path(path).is_file():
                raise UserError(f"{path} is no file; put the text there")
            if Path(path).is_file() and (size := Path(path).stat().st_size) > _MOST_BYTES:
                raise UserError(f"{path} has {size:,} bytes, more than {_MOST_BYTES:,}; is it another file?")
            content = Path(path).read_bytes()
        else:
            file = ShardCache(Path(READ.cache_dir).expanduser(), READ.cache_bytes).open(path)
            with os.fdopen(file, "rb") as opened:
                content = opened.read()
        return content.decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}); write it anew") from error
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(url: str, error: Exception) -> UserError:
    """Return the error that a URL cannot be read; every protocol raises exceptions of its own."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{url} cannot be read ({reason}); check the address and the connection")
