"""Whole images: some rows of a source, decoded in batches by worker processes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from flipscale.data.decode import UndecodableImage, decode_processed, visible_patches
from flipscale.data.loader import LOST, ErrorsInPlace, PackedBatch, dead_workers, loader_of, start_workers
from flipscale.data.pairs import InputShape
from flipscale.data.samples import BadSample, Sample, SampleNumbers, wrap_errors
from flipscale.data.sources.tar import TarSource
from flipscale.io.errors import UserError

# Placeholder image.
GREY = cv2.imencode(".png", np.full((8, 8, 3), 128, np.uint8))[1].tobytes()
# Turns the bytes of an image and its row into the columns that the model takes; it may raise `UndecodableImage`.
Decoder = Callable[[bytes, int], dict[str, np.ndarray]]


class ChosenRows(TarSource):
    """Some rows of a source in a new order, as one shard."""

    def __init__(self, source: TarSource, rows: np.ndarray):
        if isinstance(source, ChosenRows):
            rows, source = source.rows[rows], source.source
        self.source: TarSource = source
        self.rows: np.ndarray = rows
        self._places = SampleNumbers(source)
        super().__init__(source.list, manifest=source.manifest)
        self.faults, self.shard_sizes = source.faults, [len(rows)]

    def read(self, shard: int, number: int) -> Sample:
        return self.source.read(*self._place(number))

    def read_captions(self, shard: int, number: int) -> tuple[bytes, ...]:
        return self.source.read_captions(*self._place(number))

    def read_label(self, shard: int, number: int) -> int | None:
        return self.source.read_label(*self._place(number))

    def read_array(self, shard: int, number: int) -> np.ndarray | None:
        return self.source.read_array(*self._place(number))

    def shard_name(self, shard: int) -> str:
        """Return the name of all shards of the source, because the rows may come from any of them."""
        return self.source.list.shards

    def _place(self, number: int) -> tuple[int, int]:
        return self._places[self.rows[number]]

    def _row(self, shard: int, number: int) -> np.ndarray:
        raise NotImplementedError  # the base's other methods would read rows of the first shard


class WholeImages(Dataset):
    """Every image of a source, decoded, in batches."""

    def __init__(self, source: TarSource, decode: Decoder):
        self.source, self.decode = source, decode
        self.where = SampleNumbers(source)

    def __len__(self) -> int:
        return len(self.where)

    def __getitems__(self, rows: Sequence[int]) -> PackedBatch:
        return packed((self.decoded(row) for row in rows), len(rows))

    def decoded(self, row: int) -> dict[str, np.ndarray]:
        shard, number = self.where[row]
        try:
            sample = self.source.read(shard, number)
            with wrap_errors(UndecodableImage):
                return self.decode(sample.image, row)
        except BadSample as error:
            name = f"{self.source.shard_name(shard).rsplit('/', 1)[-1]}#{number}"
            raise UserError(
                f"evaluation image {name} cannot be decoded: {error}; an evaluation needs its whole set: mend it or "
                "fetch it again"
            ) from error


def decoded_batches(dataset: Dataset, batches: Iterable[range], num_workers: int) -> Iterator[Any]:
    """Yield what `dataset` makes of each batch of rows, and raise its errors."""
    loaded = start_workers(loader_of(ErrorsInPlace(dataset), batches, num_workers))
    try:
        for batch in loaded:
            if isinstance(batch, Exception):
                raise batch
            yield batch
    except LOST as error:
        if not (dead := dead_workers(loaded)):
            raise
        raise OSError(
            f"a worker that decoded images died (pid {', '.join(map(str, dead))}); give it more memory, or set "
            "num_workers or eval.num_workers to 0"
        ) from error
    finally:
        del loaded  # ends the workers, for which the exit of the process would wait


def dummy_batch(decode: Decoder) -> PackedBatch:
    """Return a batch of one grey image, for a process without a batch left."""
    return packed([decode(GREY, 0)], 1)


def packed(images: Iterable[dict[str, np.ndarray]], count: int) -> PackedBatch:
    """Return the columns of `count` images; each image is written into the batch's memory as soon as it is decoded."""
    batch: PackedBatch | None = None
    for place, columns in enumerate(images):
        if batch is None:
            like = {name: torch.from_numpy(column) for name, column in columns.items()}
            batch = PackedBatch.empty({name: (one.dtype, (count, *one.shape)) for name, one in like.items()})
        for name, column in columns.items():
            if batch[name].shape[1:] != column.shape:
                raise UserError(
                    f"the model's image processor gives {name} of shape {column.shape} and "
                    f"{tuple(batch[name].shape[1:])}; set do_center_crop and crop_size in its preprocessor_config.json"
                )
            batch[name][place] = torch.from_numpy(column)
    assert batch is not None
    return batch


def whole_square(shape: InputShape, encoded: bytes, row: int) -> dict[str, np.ndarray]:
    """Return the patches of an image in a model's size: `patches` uint8 `(num_patches, 3 * p * p)`."""
    square = decode_processed(encoded, shape.image_size, shape.squashes)
    return {"patches": visible_patches(square, shape.patch_size, None)}
