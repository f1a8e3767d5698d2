"""The bytes of an index or a manifest beside a good shard: its first byte says which, and whether its digest is made
right, so that what is in it is read."""

import functools
import hashlib
import os
import struct
import tempfile
from contextlib import suppress
from pathlib import Path

from fuzz.shards import tar

from flipscale.data.samples import BadSample
from flipscale.data.sources.shard_index import index_path
from flipscale.data.sources.tar import StaleManifest, TarSource

_FILES = [(f"{n}.{kind}", b"%d %s" % (n, kind.encode())) for n in range(3) for kind in ("jpg", "txt", "cls")]
_TAIL, _TIME = 24, 10**18


@functools.cache
def _made() -> tuple[bytes, bytes, bytes]:
    """The shard, its index and its manifest."""
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder, "0.tar")
        shard.write_bytes(tar(0, *_FILES))
        os.utime(shard, ns=(_TIME, _TIME))
        TarSource(folder)
        return shard.read_bytes(), index_path(shard).read_bytes(), Path(folder, "shards.manifest").read_bytes()


def seeds() -> list[bytes]:
    """The index and the manifest that are right."""
    _, index, manifest = _made()
    return [bytes([kind]) + content for kind, content in ((0, index), (1, index), (2, manifest), (3, manifest))]


def attack(data: bytes, folder: Path) -> None:
    """Open the shard and read all its samples: each is as in the shard, or told to be bad; or all is refused."""
    kind, content = data[:1] or b"\0", data[1:]
    shard = folder / "0.tar"
    shard.write_bytes(_made()[0])
    os.utime(shard, ns=(_TIME, _TIME))
    if kind[0] & 1:
        content = redigested(content, bool(kind[0] & 2))
    (folder / "shards.manifest" if kind[0] & 2 else index_path(shard)).write_bytes(content)
    with suppress(StaleManifest, ValueError):
        source = TarSource(str(folder))
        for number in range(min(source.shard_sizes[0], 100)):
            with suppress(BadSample):
                sample = source.read(0, number)
                # Whoever forges a digest can name another file, but no part of one.
                assert {sample.image, *sample.captions} <= {content for _, content in _FILES}


def redigested(content: bytes, is_manifest: bool) -> bytes:
    """The bytes with the digest that fits them."""
    if not is_manifest:
        return content[:-16] + hashlib.blake2b(content[:-16], digest_size=16).digest()
    if len(content) < _TAIL:
        return content
    (start,) = struct.unpack("<q", content[-_TAIL:-16])
    digest = hashlib.blake2b(content[max(start, 0) : -_TAIL], digest_size=16).digest()
    return content[:-_TAIL] + struct.pack("<q16s", start, digest)
