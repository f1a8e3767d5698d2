"""Random access to webdataset tar shards as img2dataset writes them: KEY.jpg|png|webp + KEY.txt|json (+ KEY.cls), and
as CLIP_benchmark's: KEY.jpg|png|webp + KEY.cls|npy|txt."""

import hashlib
import io
import json
import os
import resource
from collections import OrderedDict
from functools import cache

import numpy as np

from flipscale.data.faults import Fault, TruncatedSample, UndecodableCaption
from flipscale.data.sources.manifest import Manifest
from flipscale.data.sources.shard_index import BLOCK, Place, Places, checked_size, places
from flipscale.data.sources.shard_list import ShardList
from flipscale.data.sources.source import Sample

# Enough for the shards that 64 lanes read, in one process.
_MAX_OPEN_SHARDS = 2048
_MAX_GAP_BYTES = 1 << 16
# Shards that are looked at when a source is opened, and samples of a shard whose time has changed.
_SPOTS = 3


class StaleManifest(ValueError):
    """A shard is not as the manifest says."""


class TarSource:
    """The samples of tar shards by (shard, number), found by indices of offsets; there is no stream and no position.

    A truncated shard has the samples that can be read, an unreadable one has none. `faults` names both.

    Raises:
        ValueError: a shard is missing.
    """

    def __init__(self, shards: str, anew: bool = False):
        self._open: OrderedDict[int, int] = OrderedDict()
        self.list = self._listed(shards)
        self._describe(self.list.open(self._is_good, anew))

    def _listed(self, shards: str) -> ShardList:
        return ShardList(shards)

    def _describe(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.shard_sizes: list[int] = manifest.table["samples"].tolist()
        self.faults = [
            Fault(None, self.shard_name(shard), None, None, cause, damage)
            for shard, damage in manifest.damage.items()
            for cause in ["truncated_shard" if self.shard_sizes[shard] else "unreadable_shard"]
        ]

    def _is_good(self, manifest: Manifest) -> bool:
        """Return whether a few of the shards are as the manifest says."""
        self.manifest = manifest
        try:
            for shard in np.linspace(0, len(manifest) - 1, _SPOTS).astype(int).tolist():
                os.close(self._open_checked(shard))
        except (StaleManifest, OSError):
            return False
        return True

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def shard_name(self, shard: int) -> str:
        """Return the path or URL of shard `shard`."""
        return str(self.list.path(self.manifest.name(shard)))

    def read(self, shard: int, number: int) -> Sample:
        """Return sample `number` of shard `shard`, its bytes as stored.

        Raises:
            BadSample: the shard was cut since it was opened, or the caption is damaged.
            StaleManifest: the shard is not as the manifest says.
            OSError: the shard cannot be read.
        """
        where = places(self._row(shard, number))
        image, caption, label = _read_fields(self._opened(shard), where)
        assert image is not None
        return Sample(
            name=f"{self.manifest.name(shard).rsplit('/', 1)[-1]}#{number}",
            image=image,
            captions=_captions(caption) if where.is_json and caption else (caption,) if caption else (),
            label=_label(label),
        )

    def read_captions(self, shard: int, number: int) -> tuple[bytes, ...]:
        """Return the captions of sample `number` of shard `shard`, without reading its image.

        Raises:
            BadSample: the shard was cut since it was opened, or the captions are damaged.
            StaleManifest: the shard is not as the manifest says.
            OSError: the shard cannot be read.
        """
        where = places(self._row(shard, number))
        stored = _read(self._opened(shard), where.caption) if where.caption else b""
        return _captions(stored) if where.is_json and stored else (stored,) if stored else ()

    def read_label(self, shard: int, number: int) -> int | None:
        """Return the class number of sample `number` of shard `shard`, without reading its image; None if it has none.

        Raises:
            BadSample: the shard was cut since it was opened.
            StaleManifest: the shard is not as the manifest says.
            OSError: the shard cannot be read.
        """
        place = places(self._row(shard, number)).class_number
        return _label(_read(self._opened(shard), place) if place else None)

    def read_array(self, shard: int, number: int) -> np.ndarray | None:
        """Return the array in `KEY.npy` of sample `number` of shard `shard`, without reading its image; None if it has
        none that the index knows.

        Raises:
            ValueError: it is no array of numbers, or cut short. Pickled objects are not read.
            BadSample: the shard was cut since it was opened.
            StaleManifest: the shard is not as the manifest says.
            OSError: the shard cannot be read.
        """
        place = places(self._row(shard, number)).array
        if place is None:
            return None
        stored = _read(self._opened(shard), place)
        try:
            return np.lib.format.read_array(io.BytesIO(stored), allow_pickle=False)
        except Exception as error:
            # A damaged header makes numpy raise many kinds of exceptions.
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{self.shard_name(shard)}#{number} has a KEY.npy that cannot be read ({reason})"
            ) from error

    def key(self, shard: int, number: int) -> str:
        """Return the name of sample `number` of shard `shard`, from the tar header before its image."""
        header = os.pread(self._opened(shard), 100, (int(self._row(shard, number)[0, 0]) - 1) * BLOCK)
        return header.split(b"\0", 1)[0].decode("utf-8", "replace").partition(".")[0]

    def contents_digest(self) -> str:
        """Return a digest of the shards' names, sizes and numbers of samples, the same wherever the folder lies."""
        table = self.manifest.table
        names = [self.shard_name(shard).rsplit("/", 1)[-1] for shard in range(len(self.shard_sizes))]
        shards = sorted(zip(names, table["num_bytes"].tolist(), self.shard_sizes, strict=True))
        return hashlib.blake2b(json.dumps(shards).encode(), digest_size=16).hexdigest()

    def fetch_ahead(self, shards: list[int]) -> None:
        """Do nothing, because the shards are on this machine."""

    def _row(self, shard: int, number: int) -> np.ndarray:
        """Return where the files of a sample are, uint32 `(3, 2)`."""
        return self.manifest.row(shard, number)

    def _opened(self, shard: int) -> int:
        """Return the file descriptor of a shard; those that were read last stay open."""
        if shard not in self._open:
            if len(self._open) >= _most_open():
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = self._open_checked(shard)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _open_checked(self, shard: int) -> int:
        """Open a shard and look, in the open file, whether it is the one that the manifest lists.

        Raises:
            StaleManifest: it is not.
        """
        name = self.shard_name(shard)
        try:
            file = self._open_shard(name)
        except FileNotFoundError as error:
            raise StaleManifest(f"shard {name} is gone, but its manifest lists it; {self.list.stale_remedy}") from error
        state, listed = os.fstat(file), self.manifest.table[shard]
        if state.st_size != listed["num_bytes"]:
            why = f"has {state.st_size} bytes, {listed['num_bytes']} when it was listed"
        # A copy may have a time of its own.
        elif state.st_mtime_ns != listed["mtime_ns"] and not self._holds_its_samples(file, shard):
            why = "was written anew since it was listed"
        else:
            return file
        os.close(file)
        raise StaleManifest(f"shard {name} {why}; {self.list.stale_remedy}")

    def _open_shard(self, name: str) -> int:
        return os.open(name, os.O_RDONLY)

    def _holds_its_samples(self, file: int, shard: int) -> bool:
        """Return whether there is a tar header of the right size before the images of a few samples."""
        size = int(self.manifest.table["samples"][shard])
        numbers = np.linspace(0, size - 1, min(_SPOTS, size)).astype(int).tolist()
        images = [self._row(shard, number)[0].tolist() for number in numbers]
        return all(checked_size(os.pread(file, BLOCK, (block - 1) * BLOCK)) == size for block, size in images)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}


@cache
def _most_open() -> int:
    """Return how many shards may be open: half of the files that the system lets a process open, once it is asked for
    as many as it may give."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * _MAX_OPEN_SHARDS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return _MAX_OPEN_SHARDS if soft == resource.RLIM_INFINITY else min(_MAX_OPEN_SHARDS, soft // 2)


def _read_fields(file: int, where: Places) -> list[bytes | None]:
    """Return image, caption and class number of a sample, None for those it lacks. One read gets all if they are close,
    as in most tars."""
    wanted = [where.image, where.caption, where.class_number]
    present = [place for place in wanted if place]
    first, last = min(offset for offset, _ in present), max(offset + size for offset, size in present)
    if last - first > sum(size for _, size in present) + _MAX_GAP_BYTES:
        return [_read(file, place) if place else None for place in wanted]
    content = _read(file, Place(first, last - first))
    return [content[place.offset - first : place.offset - first + place.size] if place else None for place in wanted]


def _read(file: int, place: Place) -> bytes:
    content = os.pread(file, place.size, place.offset)
    if len(content) < place.size:
        raise TruncatedSample(f"{len(content)} of {place.size} bytes at {place.offset}")
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
