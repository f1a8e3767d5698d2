"""Write tar shards from image-text pairs, in parallel. The result depends on the pairs and the options only.

Shard s holds the usable ones of pairs [s * n, (s + 1) * n), so any process can write it at any time. A shard is written
aside and renamed; then a line of `manifest.jsonl` says what is in it and what was left out. A run that was killed
continues with the shards that have no line, and ends with the same bytes as an uninterrupted one.
"""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

from flipscale.data.decode import UndecodableImage, decode_whole
from flipscale.data.faults import BadSample
from flipscale.data.sources.shard_index import load_index
from flipscale.data.sources.tar_file import add_member
from flipscale.io import json_lines
from flipscale.io.atomic import atomic_write, sync, unique_partial_path
from flipscale.io.errors import UserError
from flipscale.preparation.lists.pair_list import PairList, VotedPairs
from flipscale.preparation.shard_report import DUPLICATE, MANIFEST, REPORT, write_report
from flipscale.preparation.worker_pool import worker_pool

HASHES = ".hashes.npy"
LOCK, _ASIDE = ".lock", ".*.partial*"  # what a kill may leave
# Of a line of the manifest.
_LINE = {"shard", "written", "shrunk", "image_bytes", "left_out", "tar_bytes"}
_SHOWN = 300  # characters of a name or a detail
_KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_HASH_BYTES = 16
_SPLIT_KEY = b"flipscale prepare shards --split"
_job: "ShardJob"  # set in each worker


@dataclass(frozen=True)
class ShardOptions:
    """How pairs become shards.

    Args:
        short_side: the short side to which larger images are shrunk (the original stored 480); others are kept.
        jpeg_quality: the quality of images that are shrunk, or converted from a format that shards do not hold.
        pairs_per_shard: how many pairs are read for each shard.
        drop_duplicates: keep only the first of several images whose files have the same bytes.
        allow_outside: read also files outside the folder of the list.
        labels: the column of classes, or `folder`; with it, each sample has its class in KEY.cls.
        held_out: the share of the images that is no part of the training data.
        part: which images are written: those of `train`, or the `test` that is held out.
    """

    short_side: int = 256
    jpeg_quality: int = 90
    pairs_per_shard: int = 10_000
    drop_duplicates: bool = False
    allow_outside: bool = False
    labels: str | None = None
    held_out: float = 0.0
    part: str = "train"

    def __post_init__(self) -> None:
        for name, most in (("short_side", 65_500), ("jpeg_quality", 100), ("pairs_per_shard", 10**9)):
            if not 1 <= getattr(self, name) <= most:
                raise UserError(f"{name} is {getattr(self, name)}; it must be from 1 to {most}")


class DuplicateImage(BadSample):
    """An earlier pair has the same image file."""

    cause = DUPLICATE


@dataclass(frozen=True)
class ShardJob:
    """What is needed to write any shard of a set."""

    pairs: PairList
    out_dir: Path
    options: ShardOptions
    class_numbers: dict[str, int]

    @property
    def num_shards(self) -> int:
        return -(-len(self.pairs) // self.options.pairs_per_shard)

    def numbers(self, shard: int) -> range:
        """Return the numbers of the pairs that are read for a shard."""
        first = shard * self.options.pairs_per_shard
        return range(first, min(first + self.options.pairs_per_shard, len(self.pairs)))

    def path(self, shard: int) -> Path:
        """Return the path of a shard."""
        return self.out_dir / f"{shard:05d}.tar"


def write_shards(
    pairs: PairList,
    source: str,
    out_dir: Path,
    options: ShardOptions,
    processes: int,
    class_names: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the shards of `pairs` and their indices to `out_dir`, and return the report that is written beside them.

    Args:
        class_names: with `options.labels`, the names of all classes, in the order of their numbers.

    Raises:
        ValueError: `out_dir` was begun from other pairs or with other options, has other files, or another process
            writes to it.
        OSError: a worker died, or the disk is full.
    """
    if processes < 1:
        raise UserError(f"num_workers is {processes}; it must be at least 1")
    job = ShardJob(pairs, out_dir, options, {name: number for number, name in enumerate(class_names)})
    begun = {"source": source, "pairs": len(pairs), "fingerprint": pairs.fingerprint(), **asdict(options)}
    _check_folder(out_dir)
    try:
        with FileLock(out_dir / LOCK, timeout=0):
            report = _write_locked(job, begun, processes)
            # Held, so that nobody waits for a file that is gone.
            (out_dir / LOCK).unlink(missing_ok=True)
    except Timeout:
        raise UserError(f"another process writes to {out_dir}; wait for it to end, or name another folder") from None
    return report


def _write_locked(job: ShardJob, begun: dict[str, Any], processes: int) -> dict[str, Any]:
    """Write the shards that are not whole yet, and the report of all."""
    for left in job.out_dir.glob(_ASIDE):
        left.unlink()
    done = _open_manifest(job, begun)
    todo = [shard for shard in range(job.num_shards) if shard not in done]
    if todo:
        with worker_pool(
            min(processes, len(todo)), _receive, (job,), "the same command goes on where it stopped"
        ) as pool:
            _write_all(job, todo, done, pool)
    (job.out_dir / HASHES).unlink(missing_ok=True)
    return write_report(job.out_dir, begun, [done[shard] for shard in sorted(done)])


def _write_all(job: ShardJob, todo: list[int], done: dict[int, dict[str, Any]], pool: ProcessPoolExecutor) -> None:
    """Write the shards `todo`, and add their lines to the manifest and to `done` as they are finished."""
    same_as = _duplicates(job, pool) if job.options.drop_duplicates else {}
    futures = {pool.submit(_write_shard, shard, same_as.get(shard, {})) for shard in todo}
    kept = sum(len(job.numbers(shard)) for shard in done)
    with tqdm(total=len(job.pairs), initial=kept, unit="pair", desc="shards", disable=None) as bar:
        for future in as_completed(futures):
            futures.remove(future)  # which holds its line
            line = future.result()
            json_lines.append(job.out_dir / MANIFEST, [line])
            done[line["shard"]] = _counted(line)
            bar.update(len(job.numbers(line["shard"])))


def _check_folder(out_dir: Path) -> None:
    """Make the folder, unless it holds what is none of ours.

    Raises:
        ValueError: it does, or is no folder.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir} is no folder; name a new one")
    out_dir.mkdir(parents=True, exist_ok=True)
    if not (out_dir / MANIFEST).is_file() and any(
        path.name != LOCK and not path.match(_ASIDE) for path in out_dir.iterdir()
    ):
        raise UserError(f"{out_dir} holds something that `prepare shards` did not write; name a new folder")


def _open_manifest(job: ShardJob, begun: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the manifest's lines of finished shards, by shard, what was left out counted. Only these stay in it."""
    path = job.out_dir / MANIFEST
    lines = json_lines.each(path)
    before = {**asdict(ShardOptions()), **next(lines, begun)}
    was = {name: value for name, value in before.items() if begun.get(name) != value}
    if was and _is_empty(job.out_dir):
        for shard in job.out_dir.glob("*.tar*"):
            shard.unlink()
        lines = iter(())
    elif was:
        other = ", ".join(f"{name} {value} (now {begun.get(name)})" for name, value in was.items())
        raise UserError(f"{job.out_dir} was begun with {other}; use the same source and options, or another folder")
    done: dict[int, dict[str, Any]] = {}

    def whole() -> Iterator[dict[str, Any]]:
        yield begun
        for line in lines:
            if _is_whole(job, line) and line["shard"] not in done:
                yield line
                done[line["shard"]] = _counted(line)

    json_lines.rewrite(path, whole())
    return done


def _is_empty(out_dir: Path) -> bool:
    """Return whether a run ended in a folder and wrote no pair, so that other options may be tried there."""
    try:
        report = json.loads((out_dir / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and report.get("written") == 0


def _is_whole(job: ShardJob, line: dict[str, Any]) -> bool:
    """Return whether a line of the manifest is one, and its shard is as it says."""
    if line.keys() != _LINE or line["shard"] not in range(job.num_shards):
        return False
    shard = job.path(line["shard"])
    return shard.is_file() and shard.stat().st_size == line["tar_bytes"]


def _counted(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line of the manifest without what was left out, of which the counts by cause and the first are kept."""
    causes = Counter(fault["cause"] for fault in line["left_out"])
    first = {fault["cause"]: fault for fault in reversed(line["left_out"])}
    return {**line, "left_out": causes, "first": first}


def _receive(job: ShardJob) -> None:
    """Keep a worker's copy of the job, so that it is sent once and not with each shard."""
    global _job
    _job = job


def _duplicates(job: ShardJob, pool: ProcessPoolExecutor) -> dict[int, dict[int, int]]:
    """Return, by shard, the pairs whose image an earlier pair has, and which pair that is."""
    stored = job.out_dir / HASHES
    if not stored.exists():
        parts = pool.map(_hash_shard, range(job.num_shards))
        digests = np.concatenate(list(tqdm(parts, "hash", job.num_shards, unit="shard", disable=None)))
        with atomic_write(stored) as partial, open(partial, "wb") as file:
            np.save(file, digests)
    _, first, inverse = np.unique(np.load(stored), return_index=True, return_inverse=True)
    same_as: dict[int, dict[int, int]] = {}
    earliest = first[inverse]
    for number in np.flatnonzero(earliest != np.arange(len(earliest))).tolist():
        same_as.setdefault(number // job.options.pairs_per_shard, {})[number] = int(earliest[number])
    return same_as


def _hash_shard(shard: int) -> np.ndarray:
    """Return the digest of each image file of a shard; of an unreadable one, a digest of its number."""
    digests = []
    for number in _job.numbers(shard):
        try:
            content = _job.pairs.image(number)
        except BadSample:
            content = f"unreadable {number}".encode()
        digests.append(hashlib.blake2b(content, digest_size=_HASH_BYTES).digest())
    return np.frombuffer(b"".join(digests), dtype=f"S{_HASH_BYTES}")


def _write_shard(shard: int, same_as: dict[int, int]) -> dict[str, Any]:
    """Write a shard and its index, and return its line of the manifest."""
    pairs, path = _job.pairs, _job.path(shard)
    line: dict[str, Any] = {"shard": shard, "written": 0, "shrunk": 0, "image_bytes": 0, "left_out": []}
    # By a name of its own: a worker whose parent was killed may live a little into the next run.
    with atomic_write(path, unique_partial_path(path)) as partial:
        with tarfile.open(partial, mode="w") as tar:
            for number in _job.numbers(shard):
                try:
                    if not _is_of_part(number):
                        continue
                    if number in same_as:
                        raise DuplicateImage(f"the same bytes as {pairs.place(same_as[number])}")
                    captions = pairs.captions(number)
                    label = _job.class_numbers[pairs.label(number)] if _job.options.labels else None
                    votes = pairs.votes(number) if isinstance(pairs, VotedPairs) else None
                    image, extension, about = _stored_image(pairs.image(number), _job.options)
                except BadSample as error:
                    fault = {"key": pairs.key(number), "cause": error.cause, "detail": str(error)}
                    line["left_out"].append({name: _cut(text) for name, text in fault.items()})
                    continue
                about_pair = {"key": pairs.key(number), **about}
                _add_pair(tar, number, image, extension, captions, label, votes, about_pair)
                line["written"] += 1
                line["shrunk"] += about["width"] != about["original_width"]
                line["image_bytes"] += len(image)
        sync(partial)
    load_index(path)
    return {**line, "tar_bytes": path.stat().st_size}


def _is_of_part(number: int) -> bool:
    """Return whether an image is of the part that is written: by a hash of its bytes, so that it is the same whoever
    asks, and that copies of an image are on one side. An image that cannot be read counts as one of `train`."""
    options = _job.options
    if not options.held_out:
        return True
    try:
        digest = hashlib.blake2b(_job.pairs.image(number), digest_size=8, key=_SPLIT_KEY).digest()
    except BadSample:
        return options.part == "train"
    return (int.from_bytes(digest, "big") < options.held_out * 2**64) == (options.part == "test")


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _add_pair(
    tar: tarfile.TarFile,
    number: int,
    image: bytes,
    extension: str,
    captions: list[str],
    label: int | None,
    votes: np.ndarray | None,
    about: dict[str, Any],
) -> None:
    """Append KEY.jpg, KEY.txt with the first caption, KEY.cls with the class and KEY.npy with the votes if there are
    any, and KEY.json with `about` and, if several, all captions."""
    name = f"{number:09d}"
    if len(captions) > 1:
        about = {**about, "captions": captions}
    add_member(tar, f"{name}.{extension}", image)
    add_member(tar, f"{name}.txt", captions[0].encode())
    if label is not None:
        add_member(tar, f"{name}.cls", str(label).encode())
    if votes is not None:
        np.save(stored := io.BytesIO(), votes, allow_pickle=False)
        add_member(tar, f"{name}.npy", stored.getvalue())
    add_member(tar, f"{name}.json", json.dumps(about, ensure_ascii=False).encode())


def _stored_image(encoded: bytes, options: ShardOptions) -> tuple[bytes, str, dict[str, int]]:
    """Return the bytes to store, their extension, and the image's sizes before and after.

    Raises:
        BadSample: the image cannot be decoded.
    """
    image = decode_whole(encoded)
    try:
        return _stored(image, encoded, options)
    except Exception as error:
        # Pillow may not know what another decoder read; a JPEG has at most 65,535 pixels on a side.
        raise UndecodableImage(f"{image.shape[1]} x {image.shape[0]} pixels cannot be stored: {error}") from error


def _stored(image: np.ndarray, encoded: bytes, options: ShardOptions) -> tuple[bytes, str, dict[str, int]]:
    height, width = image.shape[:2]
    about = {"width": width, "height": height, "original_width": width, "original_height": height}
    scale = options.short_side / min(height, width)
    extension = _KEPT_FORMATS.get(Image.open(io.BytesIO(encoded)).format or "")
    if scale >= 1 and extension:
        return encoded, extension, about
    if scale < 1:
        about["width"], about["height"] = (max(1, round(side * scale)) for side in (width, height))
        image = cv2.resize(image, (about["width"], about["height"]), interpolation=cv2.INTER_AREA)
    image = np.ascontiguousarray(image)
    jpeg = simplejpeg.encode_jpeg(image, quality=options.jpeg_quality, colorspace="RGB", colorsubsampling="420")
    return jpeg, "jpg", about
