"""The images of a test set: which process takes which rows, and their decoding in workers, a batch at a time."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from flipscale.data.decode import UndecodableImage, open_image
from flipscale.data.loader import PackedBatch, settle_worker, start_workers, worker_context
from flipscale.data.samples import BadSample, Sample, wrap_errors
from flipscale.data.sources.tar import TarSource
from flipscale.io.errors import UserError

# From the bytes of an image and its row to what the model takes of it, by name; it may raise `UndecodableImage`.
Decoder = Callable[[bytes, int], dict[str, np.ndarray]]


# Of the samples that are wrong, so many are named.
_MOST_NAMED = 10


class DamagedImage(UserError):
    """An image of a test set cannot be read or decoded."""


def named(faults: Sequence[str], count: int) -> str:
    """Return one sentence of what is wrong with samples of a test set.

    Args:
        faults: of each sample, the first one's first.
        count: the samples of the set.
    """
    others = [fault.split(" has ")[0].split(" cannot ")[0] for fault in faults[1 : 1 + _MOST_NAMED]]
    dots = ", ..." if len(faults) > 1 + _MOST_NAMED else ""
    more = f"; {len(faults) - 1} more of {count} are wrong too: {', '.join(others)}{dots}" if others else ""
    return f"{faults[0]}{more}; an evaluation needs its whole set: mend it or fetch it again"


@dataclass(frozen=True)
class Share:
    """The rows of `count` that process `rank` of `world` takes: every `world`th batch of `size` rows.

    A row stands in the same batch beside the same rows however many processes there are, so its embedding is the same
    to the last bit.
    """

    count: int
    size: int
    rank: int
    world: int

    @property
    def rounds(self) -> int:
        """How many batches the first process has; others may have one less."""
        return -(-self.count // (self.size * self.world))

    def batches(self) -> list[range]:
        """Return this process's rows, a batch each."""
        firsts = range(self.rank * self.size, self.count, self.size * self.world)
        return [range(first, min(first + self.size, self.count)) for first in firsts]

    def rows(self) -> np.ndarray:
        """Return this process's rows, int64 `(rows,)`."""
        rows = np.arange(self.count)
        return rows[rows // self.size % self.world == self.rank]

    @property
    def most(self) -> int:
        """How many rows the first process has; none has more."""
        last = (self.rounds - 1) * self.size * self.world
        return (self.rounds - 1) * self.size + min(self.size, self.count - last) if self.count else 0

    def places(self) -> torch.Tensor:
        """Return where each row stands among the rows of all processes, `most` of each one after the other."""
        rows = torch.arange(self.count)
        batch = rows // self.size
        return batch % self.world * self.most + batch // self.world * self.size + rows % self.size


class SampleNumbers(Sequence[tuple[int, int]]):
    """(shard, number) of every row of a source, in shard order; it costs eight bytes a shard."""

    def __init__(self, source: TarSource):
        self._ends = np.cumsum(source.shard_sizes, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return shard, int(row) - (int(self._ends[shard - 1]) if shard else 0)


class ChosenRows(TarSource):
    """Some rows of a source in an order of their own, as one shard.

    Args:
        source: has the samples.
        rows: of `source`, int64 `(rows,)`.
    """

    def __init__(self, source: TarSource, rows: np.ndarray):
        self._open = OrderedDict()  # it is the source that opens shards
        self.source, self.list, self.faults = source, source.list, source.faults
        self.shard_sizes = [len(rows)]
        self.rows, self._places = rows, SampleNumbers(source)

    def read(self, shard: int, number: int) -> Sample:
        return self.source.read(*self._place(number))

    def read_captions(self, shard: int, number: int) -> tuple[bytes, ...]:
        return self.source.read_captions(*self._place(number))

    def read_label(self, shard: int, number: int) -> int | None:
        return self.source.read_label(*self._place(number))

    def read_array(self, shard: int, number: int) -> np.ndarray | None:
        return self.source.read_array(*self._place(number))

    def key(self, shard: int, number: int) -> str:
        return self.source.key(*self._place(number))

    def shard_name(self, shard: int) -> str:
        """Return what the source was opened by: the rows of this one shard may come from any of its shards."""
        return self.source.list.shards

    def _place(self, number: int) -> tuple[int, int]:
        return self._places[self.rows[number]]


def decoded_batches(source: TarSource, decode: Decoder, batches: list[range], num_workers: int) -> Iterator[Any]:
    """Yield the decoded images of each batch of rows, as tensors by name.

    Raises:
        ValueError: an image cannot be decoded.
        OSError: a shard cannot be read, or a worker died.
    """
    workers = min(num_workers, len(batches) if len(batches) > 1 else 0)
    loader = DataLoader(
        WholeImages(source, decode),
        batch_sampler=cast(Any, batches),  # a range serves as the list of its rows
        collate_fn=_as_is,
        num_workers=workers,
        worker_init_fn=settle_worker,
        multiprocessing_context=worker_context() if workers else None,
    )
    try:
        for batch in start_workers(loader):
            if isinstance(batch, Exception):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(
            f"a worker that decoded evaluation images died ({' '.join(str(error).split())}); give it more memory "
            "or set eval.num_workers to 0"
        ) from error


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """Let torch compute on one thread meanwhile, if that is wanted: threads that wait for a small operation's other
    threads take the cores from the workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if wanted else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def made_up(decode: Decoder) -> PackedBatch:
    """Return a batch of one grey image, for the process that has no batch left while others compute theirs."""
    png = cv2.imencode(".png", np.full((8, 8, 3), 128, np.uint8))[1].tobytes()
    return _packed([decode(png, 0)], 1)


def rgb_image(encoded: bytes) -> Image.Image:
    """Return an image as Pillow reads it, in RGB: what other models' processors and clip-benchmark start from.

    Raises:
        UndecodableImage: the bytes are no image or a damaged one.
    """
    with wrap_errors(UndecodableImage):
        return open_image(encoded).convert("RGB")


def _as_is(batch: Any) -> Any:
    return batch


class WholeImages(Dataset):
    """Every image of a source, decoded, in batches; what goes wrong is handed out in place of a batch, since raising
    it would wrap a worker's error in its traceback."""

    def __init__(self, source: TarSource, decode: Decoder):
        self.source = source
        self.decode = decode
        self.where = SampleNumbers(source)

    def __len__(self) -> int:
        return len(self.where)

    def __getitems__(self, rows: Sequence[int]) -> PackedBatch | Exception:
        try:
            return _packed((self._decoded(row) for row in rows), len(rows))
        except (ValueError, OSError) as error:
            return error

    def damage(self, row: int) -> str | None:
        """Return what is wrong with an image; None if nothing is."""
        try:
            self._decoded(row)
        except DamagedImage as error:
            return str(error)
        return None

    def _decoded(self, row: int) -> dict[str, np.ndarray]:
        shard, number = self.where[row]
        try:
            sample = self.source.read(shard, number)
            with wrap_errors(UndecodableImage):
                return self.decode(sample.image, row)
        except BadSample as error:
            name = f"{self.source.shard_name(shard).rsplit('/', 1)[-1]}#{number}"
            raise DamagedImage(f"evaluation image {name} cannot be decoded: {error}") from error


def _packed(images: Iterable[dict[str, np.ndarray]], count: int) -> PackedBatch:
    """Return the columns of `count` images, each written where it travels as soon as it is decoded."""
    batch: PackedBatch | None = None
    for place, columns in enumerate(images):
        if batch is None:
            like = {name: torch.from_numpy(column) for name, column in columns.items()}
            batch = PackedBatch.empty({name: (one.dtype, (count, *one.shape)) for name, one in like.items()})
        for name, column in columns.items():
            batch[name][place] = torch.from_numpy(column)
    assert batch is not None
    return batch
