"""Random access to webdataset tar shards as img2dataset writes them: KEY.jpg|png|webp + KEY.txt|json (+ KEY.cls), and
as CLIP_benchmark's: KEY.jpg|png|webp + KEY.cls|npy|txt."""

import hashlib
import io
import json
import os
import resource
from collections import OrderedDict
from functools import cache, partial

import numpy as np

from flipscale.data.captions import captions_of_json
from flipscale.data.samples import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    BadSample,
    Fault,
    Sample,
    TruncatedSample,
    check_bytes,
)
from flipscale.data.sources.manifest import Manifest
from flipscale.data.sources.shard_index import Place, Places, places, size_and_time
from flipscale.data.sources.shard_list import ShardList
from flipscale.data.sources.tar_members import BLOCK, NotAFile, announces, open_plain
from flipscale.io.errors import UserError

# Enough for the shards that 64 lanes read, in one process.
_MAX_OPEN_SHARDS = 2048
_MAX_GAP_BYTES = 1 << 16
# Shards that are looked at when a source is opened: their size and time; and samples of a shard whose time has changed.
_SHARDS_LOOKED_AT, _SPOTS = 64, 3


class StaleManifest(UserError):
    """A shard is not as the manifest says."""


class StaleSample(BadSample):
    """Before a file of the sample is not the tar header that there was when the shard was indexed."""

    cause = "stale_index"


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
            count = min(_SHARDS_LOOKED_AT, len(manifest))
            for shard in np.linspace(0, len(manifest) - 1, count).astype(int).tolist():
                listed = manifest.table[shard]
                if size_and_time(self.shard_name(shard)) != (listed["num_bytes"], listed["mtime_ns"]):
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
        try:
            image, caption, label = _read_fields(self._opened(shard), where)
        except OSError as error:
            raise self._named(error, shard) from error
        assert image is not None
        return Sample(
            name=f"{self.manifest.name(shard).rsplit('/', 1)[-1]}#{number}",
            image=image,
            captions=captions_of_json(caption) if where.is_json and caption else (caption,) if caption else (),
            label=_label(label),
            read_array=partial(self.read_array, shard, number),
        )

    def read_captions(self, shard: int, number: int) -> tuple[bytes, ...]:
        """Return the captions of sample `number` of shard `shard`, without reading its image.

        Raises:
            BadSample: the shard was cut since it was opened, or the captions are damaged.
            StaleManifest: the shard is not as the manifest says.
            OSError: the shard cannot be read.
        """
        where = places(self._row(shard, number))
        stored = self._read(shard, where.caption) if where.caption else b""
        return captions_of_json(stored) if where.is_json and stored else (stored,) if stored else ()

    def read_label(self, shard: int, number: int) -> int | None:
        """Return the class number of sample `number` of shard `shard`, without reading its image; None if it has none.

        Raises:
            BadSample: the shard was cut since it was opened.
            StaleManifest: the shard is not as the manifest says.
            OSError: the shard cannot be read.
        """
        place = places(self._row(shard, number)).class_number
        return _label(self._read(shard, place) if place else None)

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
        stored = self._read(shard, place)
        try:
            return np.lib.format.read_array(io.BytesIO(stored), allow_pickle=False)
        except Exception as error:
            # A damaged header makes numpy raise many kinds of exceptions.
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.shard_name(shard)}#{number} has a KEY.npy that cannot be read ({reason})"
            ) from error

    def key(self, shard: int, number: int) -> str:
        """Return the name of sample `number` of shard `shard`, from the tar header before its image."""
        block = int(self._row(shard, number)[0, 0])
        try:
            header = os.pread(self._opened(shard), 100, (block - 1) * BLOCK) if block else b""
        except OSError as error:
            raise self._named(error, shard) from error
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

    def _read(self, shard: int, place: Place) -> bytes:
        """Return a text or an array of a sample."""
        check_bytes(place.size, MAX_TEXT_BYTES, "a text or an array")
        try:
            return _read(self._opened(shard), place)
        except OSError as error:
            raise self._named(error, shard) from error

    def _named(self, error: OSError, shard: int) -> OSError:
        """Return the error of a disk, or of a network's file system, with the name of the shard."""
        if error.errno is None:
            return error
        return OSError(f"shard {self.shard_name(shard)} cannot be read ({error.strerror}); start again when it can")

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
        except NotAFile as error:
            raise StaleManifest(f"shard {name} is no shard now: {error}; {self.list.stale_remedy}") from error
        state, listed = os.fstat(file), self.manifest.table[shard]
        # A server may not have said the size.
        if state.st_size != listed["num_bytes"] and listed["num_bytes"]:
            why = f"has {state.st_size} bytes, {listed['num_bytes']} when it was listed"
        # A copy may have a time of its own.
        elif state.st_mtime_ns != listed["mtime_ns"] and not self._holds_its_samples(file, shard):
            why = "was written anew since it was listed"
        else:
            return file
        os.close(file)
        raise StaleManifest(f"shard {name} {why}; {self.list.stale_remedy}")

    def _open_shard(self, name: str) -> int:
        return open_plain(name)

    def _holds_its_samples(self, file: int, shard: int) -> bool:
        """Return whether there are tar headers of the right size before the files of a few samples."""
        size = int(self.manifest.table["samples"][shard])
        numbers = np.linspace(0, size - 1, min(_SPOTS, size)).astype(int).tolist()
        found = [places(self._row(shard, number)) for number in numbers]
        files = [place for where in found for place in (where.image, where.caption, where.class_number) if place]
        return all(announces(os.pread(file, BLOCK, max(offset - BLOCK, 0)), size) for offset, size in files)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)


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
    as in most tars.

    Raises:
        BadSample: one of them is too large, or cut short.
    """
    check_bytes(where.image.size, MAX_IMAGE_BYTES, "an image")
    for text in (where.caption, where.class_number):
        check_bytes(text.size if text else 0, MAX_TEXT_BYTES, "a text")
    wanted = [where.image, where.caption, where.class_number]
    present = [place for place in wanted if place]
    first, last = min(place.offset for place in present) - BLOCK, max(offset + size for offset, size in present)
    if first < 0 or last - first > sum(size for _, size in present) + _MAX_GAP_BYTES:
        return [_read(file, place) if place else None for place in wanted]
    content = os.pread(file, last - first, first)
    return [_cut_out(content, place, first) if place else None for place in wanted]


def _read(file: int, place: Place) -> bytes:
    first = max(place.offset - BLOCK, 0)
    return _cut_out(os.pread(file, place.offset + place.size - first, first), place, first)


def _cut_out(content: bytes, place: Place, first: int) -> bytes:
    """Return the file at `place` of what was read from byte `first` on, with the tar header before the file.

    Raises:
        TruncatedSample: it goes on behind what could be read.
        StaleSample: it has another size, or there is no file: the index is not this shard's.
    """
    at = place.offset - first
    if at + place.size > len(content):
        raise TruncatedSample(f"{max(len(content) - at, 0)} of {place.size} bytes at {place.offset}")
    if at < BLOCK or not announces(content[at - BLOCK : at], place.size):
        raise StaleSample(
            f"no file of {place.size} bytes begins at byte {place.offset}, where the index has one: the shard was "
            "replaced or damaged since it was indexed"
        )
    return content[at : at + place.size]


def _label(stored: bytes | None) -> int | None:
    """Return a class number; None where there is none, or one of more digits than a number of 64 bits."""
    number = b"" if stored is None else stored.strip()
    return int(number) if number.isdigit() and len(number) < 19 else None
