"""A test set in CLIP_benchmark's layout: shards, labels, captions, class names and prompts; and a run's classes."""

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from flipscale.data.samples import BadSample, SampleNumbers
from flipscale.data.sources.opening import READ, open_shards
from flipscale.data.sources.raw_data import no_shards
from flipscale.data.sources.remote import ShardCache
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import Embedder, Value, agreed
from flipscale.evaluation.whole_images import ChosenRows
from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.io.paths import is_utf16
from flipscale.process.world import gather_objects
from flipscale.recipe.data import DataRecipe

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
NUM_SHARDS = "nshards.txt"
# The longest text files of test sets have a megabyte; more is a list of captions.
_MOST_BYTES, _MOST_LINE = 20 << 20, 10_000

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TestSet:
    """The images of a test set with their labels or captions, its class names and its prompts. Shards `0.tar` to
    `N.tar` are in the order of their numbers."""

    __test__: ClassVar[bool] = False  # pytest would collect it

    data: str
    source: TarSource

    @classmethod
    def open(cls, data: str, part: str = "test") -> "TestSet":
        """Return the test set at `data`, a folder or a URL such as `hf://datasets/clip-benchmark/wds_cars`.

        CLIP_benchmark puts the shards into `test/` with their number in `test/nshards.txt`, and text files above that
        folder. All files may also be in one folder. Shards at a URL come through the training's cache."""
        data = str(data).rstrip("/")
        counts = ((folder, read_text(folder, NUM_SHARDS)) for folder in (f"{data}/{part}", data))
        counted = next((_counted(folder, count) for folder, count in counts if count is not None), None)
        shards = counted or _listed(data, part)
        try:
            with _reading(shards):
                source = open_shards(shards)
        except FileNotFoundError as error:
            raise no_shards(shards) from error
        if source.faults:
            fault = source.faults[0]
            raise UserError(f"shard {fault.shard} is damaged ({fault.detail}); an evaluation needs it whole: fetch it")
        return cls(data, source)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def row_numbers(self) -> list[int]:
        """Numbers of the images in the whole set, in shard order."""
        return self.source.rows.tolist() if isinstance(self.source, ChosenRows) else list(range(len(self)))

    def class_names(self) -> list[str]:
        return read_class_names(self.data)

    def templates(self) -> list[str]:
        return read_lines(self.data, TEMPLATES, "the prompts, {c} for the name")

    def labels(self, embedder: Embedder, num_classes: int) -> torch.Tensor:
        """Collective. Return the class numbers of this process's rows, int64 `(rows,)`."""
        return torch.tensor(self.of_my_rows(embedder, partial(self.label, num_classes)), dtype=torch.int64)

    def captions(self, embedder: Embedder) -> list[list[str]]:
        """Collective. Return the captions of every image: the lines of its `KEY.txt`, blank ones too."""
        return self.gathered(embedder, self.captions_of)

    def gathered(self, embedder: Embedder, read: Callable[[int, int], Value]) -> list[Value]:
        """Collective. Return `read(shard, number)` of every image in shard order."""
        mine = self.of_my_rows(embedder, read)
        pairs = gather_objects(list(zip(embedder.rows(len(self)).tolist(), mine, strict=True)))
        return [value for _, value in sorted(pairs)]

    def digest(self, embedder: Embedder) -> str:
        """Collective. Return a digest of all samples in shard order and of the class names, whatever the folder."""
        content = [*self.gathered(embedder, self.source.sample_digest), read_text(self.data, CLASS_NAMES)]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()

    def of_my_rows(self, embedder: Embedder, read: Callable[[int, int], Value]) -> list[Value]:
        """Collective. Return `read(shard, number)` of each of this process's rows. All processes raise the error of
        any."""
        where = SampleNumbers(self.source)
        if not where:
            shards = f"{len(self.source.shard_sizes)} shards ({self.source.list.shards})"
            raise UserError(f"the test set is empty: 0 samples in {shards}")

        def values() -> Iterator[Value]:
            for row in embedder.rows(len(where)):
                embedder.alive()
                try:
                    yield read(*where[row])
                except BadSample as error:
                    raise UserError(f"{self.place(*where[row])} cannot be read: {error}") from error

        return agreed(embedder.accelerator, lambda: list(values()))

    def place(self, shard: int, number: int) -> str:
        """Return the name of a sample's place, for messages."""
        return f"{self.source.shard_name(shard)}#{number}"

    def label(self, num_classes: int, shard: int, number: int) -> int:
        label = self.source.read_label(shard, number)
        if label is None or not 0 <= label < num_classes:
            raise UserError(f"{self.place(shard, number)} has class {label}; {num_classes} are listed")
        return label

    def label_set(self, num_classes: int, shard: int, number: int) -> np.ndarray:
        """Return the classes of a sample by its `KEY.npy`, bool `(num_classes,)`."""
        array, where = self._array(shard, number), self.place(shard, number)
        if array.shape != (num_classes,):
            raise UserError(f"{where} has labels of shape {array.shape}; {num_classes} names are listed")
        if not ((array == 0) | (array == 1)).all():
            odd = array[(array != 0) & (array != 1)][0]
            raise UserError(f"{where} has a label {odd}; KEY.npy holds 1 for each class of the image, else 0")
        return array.astype(bool)

    def array(self, columns: Sequence[str], shard: int, number: int) -> np.ndarray:
        """Return the numbers in a sample's `KEY.npy`, int64 `(columns,)`."""
        array, where = self._array(shard, number), self.place(shard, number)
        if array.shape != (len(columns),) or not ((array >= 0) & (array == np.trunc(array))).all():
            raise UserError(f"{where} has {array.tolist()} in KEY.npy; it must hold numbers of {', '.join(columns)}")
        return array.astype(np.int64)

    def _array(self, shard: int, number: int) -> np.ndarray:
        array, where = self.source.read_array(shard, number), self.place(shard, number)
        if array is None:
            raise UserError(f"{where} has no KEY.npy; fetch the set again")
        if array.dtype.kind not in "biuf":
            raise UserError(f"{where} has values of type {array.dtype} in KEY.npy; it must hold numbers")
        return array

    def captions_of(self, shard: int, number: int) -> list[str]:
        stored, where = self.source.read_captions(shard, number), self.place(shard, number)
        if any(map(is_utf16, stored)):
            raise UserError(f"{where} has a caption in UTF-16; save it as UTF-8")
        try:
            lines = [line for text in stored for line in text.decode("utf-8-sig").splitlines()]
        except UnicodeDecodeError as error:
            raise UserError(f"{where} has a caption that is not UTF-8 ({error.reason})") from error
        if not any(line.strip() for line in lines):
            raise UserError(f"{where} has no caption; every image needs a KEY.txt")
        return lines


def read_lines(data: str | Path, name: str, what: str) -> list[str]:
    """Return the lines of a text file of a set, stripped. A blank line counts, as in CLIP_benchmark."""
    text = read_text(str(data), name)
    if text is None or not text.strip():
        state = "missing" if text is None else "empty"
        raise UserError(
            f"{data}/{name} is {state}; it lists {what}, one a line. Fix: write this file, or make the set "
            "anew, such as by `flipscale prepare shards --labels`"
        )
    lines = [line.strip() for line in text.splitlines()]
    longest = max(range(len(lines)), key=lambda number: len(lines[number]))
    if len(lines[longest]) > _MOST_LINE:
        raise UserError(
            f"line {longest + 1} of {data}/{name} has {len(lines[longest]):,} characters, more than {_MOST_LINE:,}; it "
            f"lists {what}, one a line"
        )
    return lines


def read_class_names(data: str | Path) -> list[str]:
    """Return the class names in the order of their numbers, and warn of duplicates: only the first is ever nearest."""
    names = read_lines(data, CLASS_NAMES, "the class names")
    while not names[-1]:
        names.pop()
    if "" in names:
        raise UserError(
            f"line {names.index('') + 1} of {data}/{CLASS_NAMES} is blank, and would be a class without a name. Fix: "
            "remove the line, because the classes after it are numbered by their lines"
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        _log.warning("%s/%s has %d names more than once, such as %r", data, CLASS_NAMES, len(twice), twice[0])
    return names


def training_class_names(recipe: DataRecipe, num_classes: int) -> list[str]:
    """Return the class names of a recipe's shards: `classnames.txt` in their folder, or in the one above it."""
    names: list[str] = []
    where = ""
    for shards in [source.shards for source in recipe.sources] or [recipe.shards]:
        if shards is None:
            raise UserError(
                "data.sources names a dataset, whose classes have no numbers here; loss.kind 'classify' takes shards, "
                "which `flipscale prepare shards --labels` makes"
            )
        folder = _folder_with_names(shards)
        theirs = read_class_names(folder)
        if names and theirs != names:
            raise UserError(f"{folder}/{CLASS_NAMES} and {where} name other classes; give all sources the same file")
        names, where = theirs, f"{folder}/{CLASS_NAMES}"
    if len(names) < 2:
        raise UserError(f"{where} names {len(names)} class; a classifier has two or more to choose from")
    if len(names) != num_classes:
        raise UserError(f"{where} names {len(names)} classes, loss.options says {num_classes}; set it to {len(names)}")
    return names


def keep_class_names(run_dir: Path, names: Sequence[str]) -> None:
    write_text(run_dir / CLASS_NAMES, "".join(f"{name}\n" for name in names))


def refuse_other_class_names(run_dir: Path, names: Sequence[str]) -> None:
    """Raise UserError if a resumed run has learned other classes."""
    kept = kept_class_names(run_dir, len(names)) if (run_dir / CLASS_NAMES).exists() else list(names)
    for number, (name, learned) in enumerate(zip(names, kept, strict=True)):
        if name != learned:
            raise UserError(
                f"class {number} is {name!r} next to the training shards, and {learned!r} in {run_dir}/{CLASS_NAMES}, "
                "which the run has learned; use the same classes or another output_dir"
            )


def kept_class_names(run_dir: Path, num_classes: int) -> list[str]:
    """Return the class names of a run; without the file, LABEL_0, LABEL_1, ... and a warning."""
    if not (run_dir / CLASS_NAMES).exists():
        _log.warning("%s has no %s: the model's classes have no names", run_dir, CLASS_NAMES)
        return [f"LABEL_{number}" for number in range(num_classes)]
    names = read_class_names(run_dir)
    if len(names) != num_classes:
        raise UserError(f"{run_dir}/{CLASS_NAMES} names {len(names)} classes, and the run learned {num_classes}")
    return names


def read_text(folder: str, name: str) -> str | None:
    """Return the content of a text file, on this machine or at a URL; None if there is no file."""
    path = f"{folder}/{name}"
    try:
        if "://" not in folder:
            if Path(path).exists() and not Path(path).is_file():
                raise UserError(f"{path} is not a file; put the text there")
            if Path(path).is_file() and (size := Path(path).stat().st_size) > _MOST_BYTES:
                raise UserError(f"{path} has {size:,} bytes, more than {_MOST_BYTES:,}; is it another file?")
            content = Path(path).read_bytes()
        else:
            cache = ShardCache(READ.cache_dir, READ.cache_bytes)
            with _reading(path), os.fdopen(cache.open(path), "rb") as file:
                content = file.read()
        if is_utf16(content):
            raise UserError(f"{path} is UTF-16; save it as UTF-8")
        return content.decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}); write it anew") from error


def read_list(data: str, name: str, what: str) -> list[Any]:
    """Return the list in a JSON file of a set, of `what`."""
    try:
        rows = json.loads(read_text(data, name) or "null")
    except ValueError as error:
        raise UserError(f"{data}/{name} is not JSON ({error}); write it anew") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{data}/{name} has no list of {what}; write it anew")
    return rows


@contextmanager
def _reading(url: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:  # every protocol of fsspec raises its own types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{url} cannot be read ({reason}); check the address and the connection") from error


def _counted(folder: str, num_shards: str) -> str:
    count = num_shards.strip()
    if not count.isdigit() or int(count) < 1:
        raise UserError(f"{folder}/{NUM_SHARDS} says {count[:40]!r}; it must be the number of shards")
    names = [f"{number}.tar" for number in range(int(count))]
    missing = [] if "://" in folder else [name for name in names if not Path(folder, name).is_file()]
    if missing:
        raise UserError(
            f"{folder} has {len(names) - len(missing)} of the {len(names)} shards in its {NUM_SHARDS}, without "
            f"{missing[0]}: it is half downloaded; fetch the rest"
        )
    return f"{folder}/{{0..{len(names) - 1}}}.tar"


def _listed(data: str, part: str) -> str:
    """Return the name of the shards of a set without `nshards.txt`: those in its `part`, else those in `data`."""
    if "://" in data:
        return data
    folder = f"{data}/{part}" if any(Path(data, part).glob("*.tar")) else data
    names = {path.name for path in Path(folder).glob("*.tar")}
    if names and names == {f"{number}.tar" for number in range(len(names))}:
        return f"{folder}/{{0..{len(names) - 1}}}.tar"  # 10.tar comes after 9.tar
    return folder


def _folder_with_names(shards: str) -> str:
    """Return the folder of shards, or the one above it, whichever has `classnames.txt`."""
    folder = shards.rstrip("/")
    if re.search(r"[*?\[{]|\.tar$", folder.rpartition("/")[2]):
        folder = folder.rpartition("/")[0] or "."
    above = folder.rpartition("/")[0] or "."
    return next((place for place in (folder, above) if read_text(place, CLASS_NAMES) is not None), folder)
