"""Random access to webdataset tar shards.

Of img2dataset: KEY.jpg|png|webp + KEY.txt|json (+ KEY.cls). Of CLIP_benchmark: KEY.jpg|png|webp + KEY.cls|npy|txt.
"""

import hashlib
import io
import json
import os
import resource
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import xxhash

from flipscale.data.captions import captions_of_json, encoded_captions, fields_of_json
from flipscale.data.samples import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    BadSample,
    Fault,
    Sample,
    Source,
    UndecodableCaption,
    check_bytes,
    evenly,
    wrap_errors,
)
from flipscale.data.sources.manifest import Manifest, ShardList
from flipscale.data.sources.shard_index import (
    BLOCK,
    NotAFile,
    Place,
    Places,
    is_header_of,
    open_plain,
    places,
    size_and_time,
)
from flipscale.io.errors import UserError
from flipscale.io.paths import file_state
from flipscale.io.urls import without_secrets

_MAX_GAP_BYTES = 1 << 16
# Number of shards whose size and time are checked at opening, and of samples checked in a shard with a new time.
_CHECKED_SHARDS, _CHECKED_SAMPLES = 64, 3


class StaleManifest(UserError):
    """A shard differs from its entry in the manifest."""


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a file with time and owner 0, so that the bytes do not depend on the writer."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


class TarSource(Source):
    """The samples of tar shards by (shard, number), read at indexed offsets.

    A truncated shard has its readable samples, and an unreadable shard is empty. `faults` names both.
    """

    # Most shards that stay open, if the process may open as many files. Enough for those of 64 lanes.
    _most_kept = 2048

    def __init__(self, shards: str | ShardList, anew: bool = False, manifest: Manifest | None = None):
        self._open: OrderedDict[int, int] = OrderedDict()
        self.list = ShardList(shards) if isinstance(shards, str) else shards
        self._describe(manifest or self.list.open(self._is_good, anew))

    def _describe(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.shard_sizes: list[int] = manifest.num_samples.tolist()
        self.faults = [
            Fault(None, self.shard_name(shard), None, None, cause, damage)
            for shard, damage in manifest.damage.items()
            for cause in ["truncated_shard" if self.shard_sizes[shard] else "unreadable_shard"]
        ]

    def _is_good(self, manifest: Manifest) -> bool:
        """Return whether a few of the shards agree with the manifest."""
        self._describe(manifest)
        try:
            for shard in evenly(len(manifest), _CHECKED_SHARDS):
                if size_and_time(self.shard_name(shard)) != tuple(manifest.sizes[shard, 1:]):
                    os.close(self._open_checked(shard))
        except (StaleManifest, OSError):
            return False
        return True

    @property
    def shard_bytes(self) -> list[int]:
        return self.manifest.num_bytes.tolist()

    def shard_name(self, shard: int) -> str:
        return without_secrets(str(self.list.path(self.manifest.names[shard])))

    def read(self, shard: int, number: int) -> Sample:
        """Return sample `number` of shard `shard`, its bytes as stored. Raise BadSample if it is damaged, StaleManifest
        if the shard differs from its entry in the manifest, OSError if it cannot be read."""
        where = places(self._row(shard, number))
        check_bytes(where.image.size, MAX_IMAGE_BYTES, "an image")
        image, caption, label = self._read(shard, where.image, where.caption, where.class_number)
        assert image is not None
        kinds = self._by_kind(shard, where, caption) if self.kinds else {}
        captions = tuple(text for texts in kinds.values() for text in texts) if kinds else _captions(caption, where)
        return Sample(
            name=f"{self.manifest.names[shard].rsplit('/', 1)[-1]}#{number}",
            image=image,
            captions=captions,
            label=_label(label),
            kinds=kinds,
            read_array=partial(self.read_array, shard, number),
        )

    def _by_kind(self, shard: int, where: Places, caption: bytes | None) -> dict[str, tuple[bytes, ...]]:
        """Return the captions of a sample by kind: the text file as `txt`, and fields of its JSON file."""
        text, fields = None if where.is_json else caption, self._fields(shard, where, caption)
        kinds = {kind: encoded_captions(fields.get(kind), f"KEY.json: {kind!r}") for kind in self.kinds}
        return {**kinds, "txt": (text,)} if text is not None and "txt" in self.kinds else kinds

    def _fields(self, shard: int, where: Places, caption: bytes | None) -> dict[str, Any]:
        stored = caption if where.is_json else self._json_beside(shard, where)
        return fields_of_json(stored) if stored else {}

    def _json_beside(self, shard: int, where: Places) -> bytes | None:
        """Return the JSON file directly after one of a sample's files, or before them. An index has no place for it
        next to a text file."""
        present = [place for place in (where.image, where.caption, where.class_number, where.array) if place]
        with self._naming_shard(shard):
            file, start = self._opened(shard), min(present).offset - BLOCK
            name = os.pread(file, 100, where.image.offset - BLOCK).split(b"\0", 1)[0]
            header = name[: name.find(b".", name.rfind(b"/") + 1)] + b".json\0"
            after = [place.offset + -(-place.size // BLOCK) * BLOCK for place in present]
            for at in (*after, *range(start - BLOCK, max(start - _MAX_GAP_BYTES, 0) - 1, -BLOCK)):
                block = os.pread(file, BLOCK, at)
                if block.startswith(header):
                    with wrap_errors(UndecodableCaption):
                        size = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
                    check_bytes(size, MAX_TEXT_BYTES, "KEY.json")
                    return os.pread(file, max(size, 0), at + BLOCK)
        return None

    def read_captions(self, shard: int, number: int) -> tuple[bytes, ...]:
        """Return the captions of sample `number` of shard `shard`, without reading its image."""
        where = places(self._row(shard, number))
        return _captions(self._read(shard, None, where.caption)[1], where)

    def read_fields(self, shard: int, number: int) -> dict[str, Any]:
        """Return the fields of `KEY.json` of sample `number` of shard `shard`, without reading its image."""
        where = places(self._row(shard, number))
        return self._fields(shard, where, self._read(shard, None, where.caption)[1])

    def read_label(self, shard: int, number: int) -> int | None:
        """Return the class number of sample `number` of shard `shard`, or None, without reading its image."""
        return _label(self._read(shard, None, places(self._row(shard, number)).class_number)[1])

    def read_array(self, shard: int, number: int) -> np.ndarray | None:
        """Return the array in `KEY.npy` of a sample, without reading its image; None if the index lists no array. Raise
        UserError if the file is not an array of numbers, or cut short. Pickled objects are not read."""
        stored = self._read(shard, None, places(self._row(shard, number)).array)[1]
        if stored is None:
            return None
        try:
            return np.lib.format.read_array(io.BytesIO(stored), allow_pickle=False)
        except Exception as error:  # numpy raises many kinds for a damaged header
            reason = " ".join(str(error).split())
            raise UserError(f"{self.shard_name(shard)}#{number} has an unreadable KEY.npy ({reason})") from error

    def key(self, shard: int, number: int) -> str:
        """Return the key of sample `number` of shard `shard`, from the tar header before its image."""
        block = int(self._row(shard, number)[0, 0])
        with self._naming_shard(shard):
            header = os.pread(self._opened(shard), 100, (block - 1) * BLOCK) if block else b""
        return header.split(b"\0", 1)[0].decode("utf-8", "replace").partition(".")[0]

    def contents_digest(self, in_order: bool = False) -> str:
        """Return a digest of the shards' names, sizes and numbers of samples, whatever their folder, and their order
        unless `in_order`."""
        names = [name.rsplit("/", 1)[-1] for name in self.manifest.names]
        shards = list(zip(names, self.manifest.num_bytes.tolist(), self.shard_sizes, strict=True))
        return hashlib.blake2b(json.dumps(shards if in_order else sorted(shards)).encode(), digest_size=16).hexdigest()

    def shard_state(self, shard: int) -> list[int | str]:
        """Return values that change with a shard's file. They differ in a copy too."""
        return [*file_state(self.shard_name(shard))]

    def shard_digest(self, shard: int, anew: bool = False) -> str:
        """Return a digest of a shard's bytes. `anew` fetches a shard at a URL again."""
        with os.fdopen(self._open_checked(shard), "rb") as file:
            return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()

    def sample_digest(self, shard: int, number: int) -> str:
        """Return a digest of a sample's files, whatever their names and their place."""
        where, digest = places(self._row(shard, number)), hashlib.blake2b(digest_size=16)
        for content in self._read(shard, where.image, where.caption, where.class_number, where.array):
            digest.update(b"none" if content is None else b"%d:" % len(content) + content)
        return digest.hexdigest()

    def outline(self) -> list[int]:
        """Return the lengths of all shards, and the places of some samples of the first one."""
        shard = next((shard for shard, size in enumerate(self.shard_sizes) if size), 0)
        places = [self._row(shard, number).flatten() for number in evenly(self.shard_sizes[shard], _CHECKED_SHARDS)]
        return np.concatenate([self.manifest.num_bytes, *places]).tolist()

    def _row(self, shard: int, number: int) -> np.ndarray:
        return self.manifest.row(shard, number)

    def _read(self, shard: int, image: Place | None, *texts: Place | None) -> list[bytes | None]:
        """Return the content of an image, texts and arrays of a sample, None for None."""
        if not any((image, *texts)):
            return [None] * (1 + len(texts))
        for text in texts:
            check_bytes(text.size if text else 0, MAX_TEXT_BYTES, "a text or an array")
        with self._naming_shard(shard):
            return _read_places(self._opened(shard), [image, *texts])

    @contextmanager
    def _naming_shard(self, shard: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno is None:
                raise
            raise OSError(f"shard {self.shard_name(shard)} cannot be read ({error.strerror}); start again") from error

    def _opened(self, shard: int) -> int:
        """Return the file descriptor of a shard. The last used shards stay open."""
        if shard not in self._open:
            if len(self._open) >= _most_open(self._most_kept):
                self._close(next(iter(self._open)))
            self._open[shard] = self._open_checked(shard)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _close(self, shard: int) -> None:
        os.close(self._open.pop(shard))

    def _open_checked(self, shard: int) -> int:
        """Open a shard, and compare the open file with its entry in the manifest."""
        name = self.shard_name(shard)
        try:
            file = self._open_shard(shard)
        except FileNotFoundError as error:
            raise self._gone(shard) from error
        except NotAFile as error:
            raise StaleManifest(f"shard {name} is no shard now: {error}; {self.list.stale_remedy}") from error
        state, (size, mtime_ns) = os.fstat(file), self.manifest.sizes[shard, 1:].tolist()
        # 0 is unknown: any time at a URL, and the size of a shard whose server does not give it.
        if size and state.st_size != size:
            why = f"has {state.st_size} bytes, {size} when it was listed"
        # Another time may be that of a copy.
        elif mtime_ns and state.st_mtime_ns != mtime_ns and not self._holds_its_samples(file, shard):
            why = "was rewritten since it was listed"
        else:
            return file
        os.close(file)
        raise StaleManifest(f"shard {name} {why}; {self.list.stale_remedy}")

    def _gone(self, shard: int) -> StaleManifest:
        words = "is gone, but its manifest lists it"
        return StaleManifest(f"shard {self.shard_name(shard)} {words}; {self.list.stale_remedy}")

    def _open_shard(self, shard: int) -> int:
        return open_plain(self.list.path(self.manifest.names[shard]))

    def _holds_its_samples(self, file: int, shard: int) -> bool:
        """Return whether a few samples have their tar headers before their files."""
        numbers = evenly(self.shard_sizes[shard], _CHECKED_SAMPLES)
        rows = [places(self._row(shard, number)) for number in numbers]
        files = [place for where in rows for place in (where.image, where.caption, where.class_number) if place]
        return all(is_header_of(os.pread(file, BLOCK, max(offset - BLOCK, 0)), size) for offset, size in files)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)


@cache
def _most_open(most: int) -> int:
    """Return the limit of open shards: `most`, or half of the process's limit of open files after raising that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * most
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return most if soft == resource.RLIM_INFINITY else min(most, soft // 2)


def _read_places(file: int, wanted: list[Place | None]) -> list[bytes | None]:
    """Return the content at each place, None for None. Places that are close, as in most tars, are read at once."""
    present = [place for place in wanted if place]
    first = max(min(place.offset for place in present) - BLOCK, 0)
    last = max(offset + size for offset, size in present)
    if len(present) > 1 and last - first > sum(size for _, size in present) + _MAX_GAP_BYTES:
        return [_read_places(file, [place])[0] if place else None for place in wanted]
    content = os.pread(file, last - first, first)
    return [_cut_out(content, place, first) if place else None for place in wanted]


def _cut_out(content: bytes, place: Place, first: int) -> bytes:
    """Return the file at `place` from content that begins at byte `first`, after a check of its tar header. Raise
    BadSample if the content ends inside the file, or the header is missing or gives another size, because the index
    belongs to another shard."""
    at = place.offset - first
    if at + place.size > len(content):
        raise BadSample(f"{max(len(content) - at, 0)} of {place.size} bytes at {place.offset}", "truncated_shard")
    if at < BLOCK or not is_header_of(content[at - BLOCK : at], place.size):
        raise BadSample(
            f"no file of {place.size} bytes begins at byte {place.offset}, where the index has one: the shard was "
            "replaced or damaged since it was indexed",
            "stale_index",
        )
    return content[at : at + place.size]


def _captions(stored: bytes | None, where: Places) -> tuple[bytes, ...]:
    return captions_of_json(stored) if where.is_json and stored else (stored,) if stored else ()


def _label(stored: bytes | None) -> int | None:
    """Return a class number; None if there is none, or it exceeds 64 bits."""
    number = b"" if stored is None else stored.strip()
    return int(number) if number.isdigit() and len(number) < 19 else None
