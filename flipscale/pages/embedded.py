"""Pictures embedded one batch after the other on one process; those that are damaged are told and left out."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from flipscale.data.decode import UndecodableImage
from flipscale.data.faults import BadSample, told_as
from flipscale.evaluation.images import Decoder
from flipscale.io.options import usable_cores
from flipscale.pages.library import Pictures

_BATCH = 64


@dataclass(frozen=True)
class Embedded:
    """The embeddings of pictures.

    Args:
        rows: the numbers of those that could be embedded, int64 `(rows,)`.
        embeds: theirs, fp32 `(rows, dim)`, as `features` gave them.
        faults: what is wrong with each of the others, with its name.
    """

    rows: np.ndarray
    embeds: np.ndarray
    faults: list[str]


def embed_pictures(
    pictures: Pictures,
    rows: Sequence[int],
    decode: Decoder,
    features: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    seconds: float | None = None,
) -> Embedded:
    """Return the embeddings of the pictures `rows`, with a progress bar on a terminal.

    Args:
        decode: from the bytes of a picture to the columns that `features` takes a batch of.
        features: returns `(batch, dim)`.
        seconds: after so long, no other batch is begun; None does all.
    """
    kept: list[int] = []
    parts: list[np.ndarray] = []
    faults: list[str] = []
    begin = time.monotonic()
    bar = tqdm(total=len(rows), desc="embedding", unit=" pictures", disable=None, leave=False)
    with ThreadPoolExecutor(usable_cores()) as pool, bar, torch.no_grad():
        for batch in _batches(rows):
            if seconds is not None and parts and time.monotonic() - begin > seconds:
                break
            columns = []
            # Read one after the other: a source of shards is not for several threads.
            for row, found in zip(batch, pool.map(decode_one(decode), _read(pictures, batch), batch), strict=True):
                if isinstance(found, BadSample):
                    faults.append(f"{pictures.name(row)}: {found}")
                else:
                    kept.append(row)
                    columns.append(found)
            if columns:
                stacked = {name: torch.from_numpy(np.stack([one[name] for one in columns])) for name in columns[0]}
                parts.append(features(stacked).float().cpu().numpy())
            bar.update(len(batch))
    return Embedded(np.asarray(kept, np.int64), np.concatenate(parts) if parts else np.empty((0, 0), "f4"), faults)


def decode_one(decode: Decoder) -> Callable[[bytes | BadSample, int], dict[str, np.ndarray] | BadSample]:
    """Return a decoder that hands out what is wrong with a picture in place of raising it."""

    def decoded(encoded: bytes | BadSample, row: int) -> dict[str, np.ndarray] | BadSample:
        if isinstance(encoded, BadSample):
            return encoded
        try:
            with told_as(UndecodableImage):
                return decode(encoded, row)
        except BadSample as error:
            return error

    return decoded


def _batches(rows: Sequence[int]) -> Iterator[list[int]]:
    for first in range(0, len(rows), _BATCH):
        yield list(rows[first : first + _BATCH])


def _read(pictures: Pictures, batch: list[int]) -> list[bytes | BadSample]:
    found: list[bytes | BadSample] = []
    for row in batch:
        try:
            found.append(pictures.image(row))
        except BadSample as error:
            found.append(error)
    return found


def unit(features: torch.Tensor) -> torch.Tensor:
    """Return features `(batch, dim)` as fp32 of unit length."""
    return torch.nn.functional.normalize(features.float(), dim=-1)
