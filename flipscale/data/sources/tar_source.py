"""Random access to webdataset tar shards as img2dataset writes them: KEY.jpg|png|webp + KEY.txt|json (+ KEY.cls)."""

import glob
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from flipscale.data.faults import Fault, TruncatedSample, UndecodableCaption
from flipscale.data.sources.shard_index import (
    BLOCK,
    JSON_CAPTION,
    ShardSummary,
    load_index,
    load_summaries,
    load_summary,
)
from flipscale.data.sources.source import Sample

# Enough for a block of every source of a mixture. Each takes two file descriptors.
_MAX_OPEN_SHARDS = 256
_MAX_GAP_BYTES = 1 << 16


def expand_range(shards: str) -> list[str] | None:
    """Return the names that a range such as `{00000..00041}.tar` stands for; None if `shards` has no range."""
    numbered = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", shards)
    if numbered is None:
        return None
    head, first, last, tail = numbered.groups()
    return [f"{head}{number:0{len(first)}d}{tail}" for number in range(int(first), int(last) + 1)]


def expand_shards(shards: str) -> list[Path]:
    """Return the shard files that `shards` names, sorted: a folder, a glob, or a range such as `{00000..00041}.tar`.

    Raises:
        ValueError: there is none, or one of a range is missing.
    """
    if not shards:
        raise ValueError("data.shards is empty; name a folder of *.tar, a glob, or a range like {00000..00041}.tar")
    numbered = expand_range(shards)
    if numbered is not None:
        paths = [Path(path) for path in numbered]
    elif Path(shards).is_dir():
        paths = sorted(Path(shards).glob("*.tar"))
    else:
        paths = sorted(Path(path) for path in glob.glob(shards))
    if not paths:
        raise ValueError(
            f"no shards at {shards!r}; name a folder of *.tar, a glob, or a range like {{00000..00041}}.tar"
        )
    for path in paths:
        if not path.is_file():
            raise ValueError(f"shard {path} does not exist; check data.shards")
    return paths


class TarSource:
    """The samples of tar shards by (shard, number), found by indices of offsets; there is no stream and no position.

    A truncated shard has the samples that can be read, an unreadable one has none. `faults` names both.

    Raises:
        ValueError: a shard is missing.
    """

    def __init__(self, shards: str):
        self.paths = expand_shards(shards)
        self._describe([str(path) for path in self.paths], load_summaries(self.paths, load_summary))
        self._open: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()

    def _describe(self, names: list[str], summaries: list[ShardSummary]) -> None:
        self.names = names
        # Only the sizes stay in memory: the indices of two billion samples are 48 GB.
        self.shard_sizes = [summary.num_samples for summary in summaries]
        self.faults = [
            Fault(None, name, None, None, "truncated_shard" if size else "unreadable_shard", damage)
            for name, (size, damage) in zip(names, summaries, strict=True)
            if damage
        ]

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def shard_name(self, shard: int) -> str:
        """Return the path or URL of shard `shard`."""
        return self.names[shard]

    def read(self, shard: int, number: int) -> Sample:
        """Return sample `number` of shard `shard`, its bytes as stored.

        Raises:
            BadSample: the shard was cut since it was indexed, or the caption is damaged.
            OSError: the shard cannot be read.
        """
        with self._opened(shard) as (file, index):
            if number >= len(index):
                raise TruncatedSample(f"{len(index)} samples are left")
            image, caption, label = _read_fields(file, index[number])
            is_json = bool(index[number, 1, 1] & JSON_CAPTION)
        assert image is not None
        return Sample(
            name=f"{self.names[shard].rsplit('/', 1)[-1]}#{number}",
            image=image,
            captions=_captions(caption) if is_json and caption else (caption,) if caption else (),
            label=_label(label),
        )

    def read_captions(self, shard: int, number: int) -> tuple[bytes, ...]:
        """Return the captions of sample `number` of shard `shard`, without reading its image.

        Raises:
            BadSample: the shard was cut since it was indexed, or the captions are damaged.
            OSError: the shard cannot be read.
        """
        with self._opened(shard) as (file, index):
            block, size = index[number, 1].tolist()
            stored = _read(file, block * BLOCK, size & ~JSON_CAPTION) if block else b""
        return _captions(stored) if size & JSON_CAPTION and stored else (stored,) if stored else ()

    def read_label(self, shard: int, number: int) -> int | None:
        """Return the class number of sample `number` of shard `shard`, without reading its image; None if it has none.

        Raises:
            BadSample: the shard was cut since it was indexed.
            OSError: the shard cannot be read.
        """
        with self._opened(shard) as (file, index):
            block, size = index[number, 2].tolist()
            return _label(_read(file, block * BLOCK, size) if block else None)

    def key(self, shard: int, number: int) -> str:
        """Return the name of sample `number` of shard `shard`, from the tar header before its image."""
        with self._opened(shard) as (file, index):
            header = os.pread(file, 100, (int(index[number, 0, 0]) - 1) * BLOCK)
        return header.split(b"\0", 1)[0].decode("utf-8", "replace").partition(".")[0]

    def fetch_ahead(self, shards: list[int]) -> None:
        """Do nothing, because the shards are on this machine."""

    @contextmanager
    def _opened(self, shard: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the file descriptor and index of a shard; the last few stay open."""
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            if len(self._open) >= _MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1][0])
            self._open[shard] = (os.open(self.paths[shard], os.O_RDONLY), load_index(self.paths[shard]))
        yield self._open[shard]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}


def _read_fields(file: int, row: np.ndarray) -> list[bytes | None]:
    """Return the fields of a sample, None for those it lacks. One read gets all if they are close, as in most tars."""
    places = [(block * BLOCK, size & ~JSON_CAPTION) for block, size in row.tolist()]
    present = [place for place in places if place[0]]
    first, last = min(offset for offset, _ in present), max(offset + size for offset, size in present)
    if last - first > sum(size for _, size in present) + _MAX_GAP_BYTES:
        return [_read(file, *place) if place[0] else None for place in places]
    content = _read(file, first, last - first)
    return [content[offset - first : offset - first + size] if offset else None for offset, size in places]


def _read(file: int, offset: int, size: int) -> bytes:
    content = os.pread(file, size, offset)
    if len(content) < size:
        raise TruncatedSample(f"{len(content)} of {size} bytes at {offset}")
    return content


def _label(stored: bytes | None) -> int | None:
    return int(stored) if stored is not None and stored.strip().isdigit() else None


def _captions(encoded: bytes) -> tuple[bytes, ...]:
    """Return the captions of a sample's JSON object: its list `captions`, else its `caption`."""
    try:
        fields = json.loads(encoded)
        captions = fields.get("captions") or [fields.get("caption") or ""]
        return tuple(str(caption).encode() for caption in captions)
    except (ValueError, AttributeError, TypeError) as error:
        raise UndecodableCaption(f"KEY.json: {error}") from error
