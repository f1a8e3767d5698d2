"""Pictures of a folder or of tar shards, and their embeddings."""

import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np
import torch

from flipscale.data.decode import UndecodableImage
from flipscale.data.samples import BadSample, SampleNumbers, wrap_errors
from flipscale.data.sources.opening import open_shards
from flipscale.data.sources.raw_data import IMAGE_SUFFIXES, TABLE_SUFFIXES
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.whole_images import Decoder
from flipscale.io.cores import usable_cores
from flipscale.io.errors import UserError
from flipscale.io.paths import file_state
from flipscale.io.progress import Progress
from flipscale.preparation.lists import FileList, is_outside, open_pairs, picture_files

_BATCH = 64


@dataclass(frozen=True)
class FolderPictures:
    """Picture files in a folder and below it, by index, and captions by file of those without a text next to them."""

    files: FileList
    titles: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Return the name of a picture for messages."""
        return self.files.key(index)

    def label(self, index: int) -> str:
        """Return the label of a picture for pages: its caption, or else its name."""
        try:
            return self.files.captions(index)[0]
        except (BadSample, IndexError):
            return self.titles.get(os.path.normpath(self.files.files[index]), self.name(index))

    def image(self, index: int) -> bytes:
        """Return the encoded picture. Raise BadSample if it cannot be read."""
        return self.files.image(index)

    def state(self) -> list[list[str | int]]:
        """Return names, bytes and times of the files, which change with the pictures."""
        root = self.files.root
        return [[name, *(() if is_outside(root, name) else file_state(root / name))] for name in self.files.files]


@dataclass(frozen=True)
class ShardPictures:
    """Samples of tar shards, by row, as `FolderPictures`."""

    source: TarSource

    def __len__(self) -> int:
        return len(self.source)

    def place(self, index: int) -> tuple[int, int]:
        """Return the shard and the index within it."""
        return SampleNumbers(self.source)[index]

    def name(self, index: int) -> str:
        shard, within = self.place(index)
        return f"{self.source.shard_name(shard).rsplit('/', 1)[-1]}#{within}"

    def label(self, index: int) -> str:
        try:
            captions = self.source.read_captions(*self.place(index))
        except BadSample:
            captions = ()
        lines = [line for text in captions for line in text.decode("utf-8", "replace").splitlines() if line.strip()]
        return lines[0].strip() if lines else self.name(index)

    def image(self, index: int) -> bytes:
        return self.source.read(*self.place(index)).image

    def state(self) -> list[list[str | int]]:
        manifest, rows = self.source.manifest, list[list[str | int]]()
        for shard, sizes in enumerate(manifest.sizes.tolist()):
            rows.append([manifest.names[shard], *sizes, *file_state(self.source.shard_name(shard))])
        return rows


Pictures = FolderPictures | ShardPictures


def open_pictures(place: str) -> Pictures:
    """Return the pictures of a folder of files or shards, or of shards named by a glob, a range or a URL.

    Raise UserError if the place does not exist or has no pictures.
    """
    folder = Path(place)
    # The name of a folder of pictures may look like a glob, so the folder is tested first.
    is_shards = any(folder.glob("*.tar")) if folder.is_dir() else re.search(r"://|[*?\[{]|\.tar$", place)
    if not is_shards and not folder.is_dir():
        raise UserError(f"{place} is not a folder; name a folder of pictures, or shards named *.tar")
    pictures = (
        ShardPictures(open_shards(place)) if is_shards else FolderPictures(picture_files(folder), _titles(folder))
    )
    if not len(pictures):
        raise UserError(f"{place} has no pictures; expected files named {' '.join(IMAGE_SUFFIXES)}, or shards, *.tar")
    return pictures


def _titles(folder: Path) -> dict[str, str]:
    """Return the captions of a folder's `metadata` table by file, without its unusable rows; empty without a table."""
    titles = {}
    with suppress(UserError):
        for path in filter(Path.is_file, (folder / f"metadata{suffix}" for suffix in TABLE_SUFFIXES)):
            table = open_pairs(str(path))
            for row in range(len(table)):
                with suppress(BadSample):
                    titles[os.path.normpath(table.key(row))] = table.captions(row)[0]
    return titles


@dataclass(frozen=True)
class EmbeddedPictures:
    """Indices of the embedded pictures, int64 `(rows,)`, their embeddings, fp32 `(rows, dim)`, and faults of others."""

    rows: np.ndarray
    embeds: np.ndarray
    faults: list[str]


def embed_pictures(
    pictures: Pictures,
    rows: Sequence[int],
    decode: Decoder,
    features: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    seconds: float | None = None,
) -> EmbeddedPictures:
    """Return the embeddings of the pictures `rows`; damaged pictures are left out.

    Args:
        decode: function from the bytes of a picture to its columns.
        features: function from the columns of a batch to its embeddings `(batch, dim)`.
        seconds: time after which no other batch starts; None for no limit.
    """
    kept: list[int] = []
    parts: list[np.ndarray] = []
    faults: list[str] = []
    begin, reading = time.monotonic(), Lock()

    def decoded(row: int) -> dict[str, np.ndarray] | BadSample:
        try:
            with reading:  # because a source of shards does not allow several readers
                encoded = pictures.image(row)
            with wrap_errors(UndecodableImage):
                return decode(encoded, row)
        except BadSample as error:
            return error

    with ThreadPoolExecutor(usable_cores()) as pool, Progress(len(rows), "embedding", "pictures", leave=False) as bar:
        for first in range(0, len(rows), _BATCH):
            if seconds is not None and parts and time.monotonic() - begin > seconds:
                break
            batch, columns = rows[first : first + _BATCH], []
            for row, result in zip(batch, pool.map(decoded, batch), strict=True):
                if isinstance(result, BadSample):
                    faults.append(f"{pictures.name(row)}: {result}")
                else:
                    kept.append(row)
                    columns.append(result)
            if columns:
                stacked = {name: torch.from_numpy(np.stack([one[name] for one in columns])) for name in columns[0]}
                with torch.no_grad():
                    parts.append(features(stacked).float().cpu().numpy())
            bar.update(len(batch))
    return EmbeddedPictures(
        np.asarray(kept, np.int64), np.concatenate(parts) if parts else np.empty((0, 0), "f4"), faults
    )
