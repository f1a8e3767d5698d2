"""Write tar shards from image-text pairs, in parallel. The shards depend only on the pairs and the options.

Shard s holds the usable pairs among [s * n, (s + 1) * n), so any process can write it at any time. A shard is written
aside and renamed; then, in the order of the shards, `manifest.jsonl` gets a line with its contents and the pairs that
were left out. A killed run continues with the shards that have no line, and ends with an uninterrupted run's bytes. A
shard whose files or rows have changed since is written anew.
"""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import simplejpeg
from filelock import FileLock, Timeout
from PIL import Image

from flipscale.data.decode import UndecodableImage, decode_whole, is_shown_alike
from flipscale.data.samples import BadSample
from flipscale.data.sources.shard_index import load_index
from flipscale.data.sources.tar import add_member
from flipscale.io import json_lines
from flipscale.io.atomic import atomic_write, sync, unique_partial_path, write_text
from flipscale.io.errors import UserError
from flipscale.io.options import Count, Range, check_ranges
from flipscale.io.paths import file_state
from flipscale.io.progress import Progress, each
from flipscale.preparation.lists import PairSource, list_digest
from flipscale.preparation.worker_pool import shared, worker_pool

PARTS = ("train", "test")
_MANIFEST, _REPORT, _LEFT_OUT = "manifest.jsonl", "report.json", "left_out.jsonl"
_LOCK, _PARTIAL = ".lock", ".*.partial*"
_DUPLICATE = "duplicate"  # cause of a pair whose image file an earlier one has
_MAX_SHOWN = 300  # characters of a name or a detail
KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_COUNTED = ("written", "shrunk", "redrawn", "image_bytes")
_HASH_BYTES = 16
REDRAWN = "transparent parts on white, upright, 8 bits: alike in all readers"
_SPLIT_KEY = b"flipscale prepare shards --split"
_REMEDIES = {
    "missing_caption": "put KEY.txt next to KEY.jpg, or name the captions' column with --caption_column",
    "undecodable_caption": "save texts as UTF-8, or name the captions' column with --caption_column",
    "unreadable_file": "paths are relative to the folder of the list; correct them, or name the images' column with "
    "--image_column",
    "outside_folder": "move the files there, or read them all the same with --allow_outside",
    "undecodable_image": "save them as JPEG, PNG or WebP, or name the images' column with --image_column",
    "malformed_row": "save the table as UTF-8, with fields that have a delimiter in quotes",
    "missing_label": "name the classes' column with --labels, or leave --labels out",
}


@dataclass(frozen=True)
class ShardOptions:
    """How pairs become shards: the options of `flipscale.cli.prepare.Shards`. The paper stored a `short_side` of 480.

    Args:
        held_out: share of the images that is held out of the training data (`split`).
        part: part that is written: `train`, or `test`, the images that are held out.
    """

    short_side: Annotated[int, Range(at_least=1, at_most=65_500)] = 256
    jpeg_quality: Annotated[int, Range(at_least=1, at_most=100)] = 90
    pairs_per_shard: Count = 10_000
    drop_duplicates: bool = False
    allow_outside: bool = False
    labels: str | None = None
    held_out: float = 0.0
    part: str = "train"

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class _Job:
    """All that a worker needs to write any shard."""

    pairs: PairSource
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
        # CLIP_benchmark numbers the shards of a labelled set without zeros in front.
        return self.out_dir / (f"{shard}.tar" if self.options.labels else f"{shard:05d}.tar")


def write_set(
    pairs: PairSource, source: str, out_dir: Path, options: ShardOptions, processes: int
) -> dict[Path, dict[str, Any]]:
    """Write pairs to `out_dir`, or to its folders `train` and `test` if a share is held out; return their reports.

    With `options.labels`, `out_dir` is a labelled set in CLIP_benchmark's layout, with `classnames.txt` and a prompt.
    Raises as `class_names` and `write_shards`.
    """
    names = class_names(pairs, source, options.labels) if options.labels else []
    parts = {out_dir: options}
    if options.held_out:
        is_whole = (out_dir / _MANIFEST).exists()
        is_used = out_dir.is_dir() and any(out_dir.iterdir())
        if is_whole or (is_used and not any((out_dir / part / _MANIFEST).exists() for part in PARTS)):
            what = "was written without --split" if is_whole else "holds something else"
            raise UserError(f"{out_dir} {what}; name a new folder for {' and '.join(PARTS)}")
        parts = {out_dir / part: replace(options, part=part) for part in PARTS}
    reports = {folder: write_shards(pairs, source, folder, part, processes, names) for folder, part in parts.items()}
    if names:
        write_classes(out_dir, names)
    return reports


def write_classes(folder: Path, names: Iterable[str]) -> None:
    """Write the class names of a labelled set in CLIP_benchmark's layout, and a prompt without other words."""
    write_text(folder / "classnames.txt", "".join(f"{name}\n" for name in names))
    write_text(folder / "zeroshot_classification_templates.txt", "{c}\n")


def class_names(pairs: PairSource, source: str, labels: str) -> list[str]:
    """Return the names of all classes in alphabetical order, or in the order of their numbers if all are numbers. Raise
    UserError if no pair has a class."""
    names: set[str] = set()
    why = ""
    for number in range(len(pairs)):
        try:
            names.add(pairs.label(number))
        except BadSample as error:
            why = why or f"{pairs.place(number)}: {error}"
    if not names:
        raise UserError(f"--labels {labels}: no pair of {source} has a class ({why}); name another column")
    return sorted(names, key=(lambda name: (int(name), name)) if all(map(str.isdecimal, names)) else None)


def write_shards(
    pairs: PairSource,
    source: str,
    out_dir: Path,
    options: ShardOptions,
    processes: int,
    class_names: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the shards of `pairs` with their indices, and return the report that is written next to them.

    Raise UserError if `out_dir` was begun with other pairs or options, has other files, or has another writer.

    Args:
        class_names: names of all classes in the order of their numbers, with `options.labels`.
    """
    job = _Job(pairs, out_dir, options, {name: number for number, name in enumerate(class_names)})
    begun = {"source": source, "pairs": len(pairs), "fingerprint": pairs.fingerprint(), **asdict(options)}
    out_dir.mkdir(parents=True, exist_ok=True)
    with _only_writer(out_dir):
        whole = _open_manifest(job, begun)
        with worker_pool(min(processes, job.num_shards), job, "the same command resumes") as pool:
            same_as = _duplicates(job, pool) if options.drop_duplicates else {}
            inputs = pool.map(_inputs, whole, (same_as.get(shard, {}) for shard in whole))
            changed = [shard for shard, now in zip(whole, inputs, strict=True) if whole[shard].get("inputs") != now]
            if changed:
                print(
                    f"{out_dir}: {len(changed)} of {job.num_shards} shards are written anew; their pairs have changed"
                )
                # A manifest would find the old places in a new shard of the same size.
                for manifest in out_dir.glob("*.manifest"):
                    manifest.unlink()
            kept = [line for shard, line in whole.items() if shard not in changed]
            json_lines.rewrite(out_dir / _MANIFEST, [begun, *kept])
            todo = [shard for shard in range(job.num_shards) if shard in changed or shard not in whole]
            lines = pool.map(_write_shard, todo, (same_as.get(shard, {}) for shard in todo))
            left = sum(len(job.numbers(shard)) for shard in todo)
            with Progress(len(pairs), "shards", "pairs", initial=len(pairs) - left) as progress:
                for line in lines:
                    json_lines.append(out_dir / _MANIFEST, [line])
                    kept.append(line)
                    progress.update(len(job.numbers(line["shard"])))
        json_lines.rewrite(out_dir / _MANIFEST, [begun, *sorted(kept, key=lambda line: line["shard"])])
        if options.labels:
            write_text(out_dir / "nshards.txt", f"{job.num_shards}\n")
        return _write_report(job, begun)


@contextmanager
def _only_writer(out_dir: Path) -> Iterator[None]:
    """Hold the lock of a folder that has a manifest, or nothing, and remove what killed processes left there. Raise
    UserError if the folder has other files, or another process writes to it."""
    others = [path for path in out_dir.iterdir() if path.name != _LOCK and not path.match(_PARTIAL)]
    if others and not (out_dir / _MANIFEST).is_file():
        raise UserError(f"{out_dir} holds something that `prepare shards` did not write; name a new folder")
    try:
        with FileLock(out_dir / _LOCK, timeout=0):
            for left in out_dir.glob(_PARTIAL):
                left.unlink()
            yield
            # Removed while held, so that no other process waits for a removed file.
            (out_dir / _LOCK).unlink(missing_ok=True)
    except Timeout:
        raise UserError(f"another process writes to {out_dir}; wait for it to end, or name another folder") from None


def _open_manifest(job: _Job, begun: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the lines of the finished shards by number."""
    path = job.out_dir / _MANIFEST
    lines = json_lines.iterate(path)
    before = next(lines, begun)
    differing = [name for name, value in begun.items() if before.get(name) != value]
    report = job.out_dir / _REPORT
    # After a run that wrote no pair, other options may be tried in the same folder.
    if differing and report.is_file() and json.loads(report.read_text(encoding="utf-8"))["written"] == 0:
        for number in [line["shard"] for line in lines if isinstance(line.get("shard"), int)]:
            for shard in (*job.out_dir.glob(f"{number}.tar*"), *job.out_dir.glob(f"{number:05d}.tar*")):
                shard.unlink()
    elif differing:
        said = {name: f"{name} {before.get(name)} (now {begun[name]})" for name in differing}
        if "fingerprint" in said:
            said["fingerprint"] = "other files or columns"
        other = ", ".join(said.values())
        raise UserError(f"{job.out_dir} was begun with {other}; use the same source and options, or another folder")
    written = {line["shard"]: line for line in lines if line.get("shard") in range(job.num_shards)}
    sizes = {shard: file_state(job.path(shard))[:1] for shard in written}
    return {shard: written[shard] for shard in sorted(written) if sizes[shard] == (written[shard].get("tar_bytes"),)}


def _inputs(shard: int, same_as: dict[int, int]) -> str:
    """Return a digest of the state of a shard's pairs, classes and duplicates."""
    job: _Job = shared()
    return list_digest([job.class_numbers, same_as, [job.pairs.state(number) for number in job.numbers(shard)]])


def _duplicates(job: _Job, pool: ProcessPoolExecutor) -> dict[int, dict[int, int]]:
    """Return, by shard, the pairs whose image an earlier pair has, with that pair."""
    parts = pool.map(_hash_shard, range(job.num_shards))
    digests = np.concatenate(list(each(parts, "hashing", "shards", job.num_shards)))
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    same_as: dict[int, dict[int, int]] = {}
    earliest = first[inverse]
    for number in np.flatnonzero(earliest != np.arange(len(earliest))).tolist():
        same_as.setdefault(number // job.options.pairs_per_shard, {})[number] = int(earliest[number])
    return same_as


def _hash_shard(shard: int) -> np.ndarray:
    """Return the digest of each image of a shard. An unreadable pair, which has no copies, gets a digest of
    its number."""
    job: _Job = shared()
    digests = []
    for number in job.numbers(shard):
        try:
            _about(job, number)
            content = job.pairs.image(number)
        except BadSample:
            content = f"unreadable {number}".encode()
        digests.append(hashlib.blake2b(content, digest_size=_HASH_BYTES).digest())
    return np.frombuffer(b"".join(digests), dtype=f"S{_HASH_BYTES}")


def _about(job: _Job, number: int) -> tuple[list[str], int | None, np.ndarray | None]:
    """Return a pair's captions, its class number with `--labels`, and its votes. Raise BadSample if it lacks one."""
    captions = job.pairs.captions(number)
    label = job.class_numbers[job.pairs.label(number)] if job.options.labels else None
    return captions, label, job.pairs.votes(number)


def _write_shard(shard: int, same_as: dict[int, int]) -> dict[str, Any]:
    """Write a shard and its index, and return its line of the manifest."""
    job: _Job = shared()
    pairs, options, path = job.pairs, job.options, job.path(shard)
    line: dict[str, Any] = {"shard": shard, **dict.fromkeys(_COUNTED, 0), "left_out": []}
    line["inputs"] = _inputs(shard, same_as)  # before they are read, so that a later change is noticed
    # Under a name of this process, because a worker of a killed run may live a little into the next run.
    with atomic_write(path, unique_partial_path(path)) as partial:
        with tarfile.open(partial, mode="w") as tar:
            for number in job.numbers(shard):
                try:
                    if not _is_of_part(job, number):
                        continue
                    if number in same_as:
                        raise BadSample(f"the same bytes as {pairs.place(same_as[number])}", _DUPLICATE)
                    captions, label, votes = _about(job, number)
                    image, extension, sizes, is_redrawn = stored_image(pairs.image(number), options)
                except BadSample as error:
                    fault = {"key": pairs.key(number), "cause": error.cause, "detail": str(error)}
                    line["left_out"].append({name: text[:_MAX_SHOWN] for name, text in fault.items()})
                    continue
                name, about = f"{number:09d}", {"key": pairs.key(number), **sizes}
                if len(captions) > 1:
                    about["captions"] = captions
                add_member(tar, f"{name}.{extension}", image)
                add_member(tar, f"{name}.txt", captions[0].encode())
                if label is not None:
                    add_member(tar, f"{name}.cls", str(label).encode())
                if votes is not None:
                    np.save(stored := io.BytesIO(), votes, allow_pickle=False)
                    add_member(tar, f"{name}.npy", stored.getvalue())
                add_member(tar, f"{name}.json", json.dumps(about, ensure_ascii=False).encode())
                line["written"] += 1
                line["shrunk"] += sizes["width"] != sizes["original_width"]
                line["redrawn"] += is_redrawn
                line["image_bytes"] += len(image)
        sync(partial)
    load_index(path)
    return {**line, "tar_bytes": path.stat().st_size}


def _is_of_part(job: _Job, number: int) -> bool:
    """Return whether an image belongs to the part that is written.

    The hash of its bytes decides, so copies of an image are in the same part. An unreadable image counts as `train`.
    """
    options = job.options
    if not options.held_out:
        return True
    try:
        digest = hashlib.blake2b(job.pairs.image(number), digest_size=8, key=_SPLIT_KEY).digest()
    except BadSample:
        return options.part == "train"
    return (int.from_bytes(digest, "big") < options.held_out * 2**64) == (options.part == "test")


def stored_image(encoded: bytes, options: ShardOptions) -> tuple[bytes, str, dict[str, int], bool]:
    """Return the bytes to store, their extension, the sizes before and after, and whether other readers would show the
    image otherwise. Such an image is drawn anew, as training sees it. Raise BadSample if the image cannot be decoded or
    stored."""
    image = decode_whole(encoded)
    is_redrawn = not is_shown_alike(encoded, image)
    height, width = image.shape[:2]
    sizes = {"width": width, "height": height, "original_width": width, "original_height": height}
    scale = options.short_side / min(height, width)
    try:
        extension = KEPT_FORMATS.get(Image.open(io.BytesIO(encoded)).format or "")
        if scale >= 1 and is_redrawn:
            return png_of(Image.fromarray(image)), "png", sizes, True
        if scale >= 1 and extension:
            return encoded, extension, sizes, False
        if scale < 1:
            sizes["width"], sizes["height"] = (max(1, round(side * scale)) for side in (width, height))
            image = cv2.resize(image, (sizes["width"], sizes["height"]), interpolation=cv2.INTER_AREA)
        image = np.ascontiguousarray(image)
        jpeg = simplejpeg.encode_jpeg(image, quality=options.jpeg_quality, colorspace="RGB", colorsubsampling="420")
    except (OSError, ValueError, cv2.error, Image.DecompressionBombError) as error:
        # Pillow may not know an image of another decoder; a JPEG has at most 65,535 pixels on a side.
        raise UndecodableImage(f"{width} x {height} pixels cannot be stored: {error}") from error
    return jpeg, "jpg", sizes, is_redrawn


def png_of(image: Image.Image) -> bytes:
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def _write_report(job: _Job, begun: dict[str, Any]) -> dict[str, Any]:
    """Write `report.json` with counts, and `left_out.jsonl` with all pairs that were left out."""
    totals: Counter[str] = Counter()
    causes: Counter[str] = Counter()
    first: dict[str, Any] = {}

    def left_out() -> Iterator[dict[str, Any]]:
        for line in islice(json_lines.iterate(job.out_dir / _MANIFEST), 1, None):
            totals.update({name: line.get(name, 0) for name in (*_COUNTED, "tar_bytes")})
            for fault in line["left_out"]:
                causes[fault["cause"]] += 1
                first.setdefault(fault["cause"], fault)
                yield fault

    json_lines.rewrite(job.out_dir / _LEFT_OUT, left_out())
    counts = {"shards": job.num_shards, **totals, "left_out": dict(causes.most_common()), "first_left_out": first}
    write_text(job.out_dir / _REPORT, json.dumps({**begun, **counts}, indent=2) + "\n")
    return {**begun, **counts}


def report_table(report: dict[str, Any], out_dir: Path) -> str:
    """Return a report as text to print."""
    written, num_left_out = report["written"], sum(report["left_out"].values())
    shards = f"in {report['shards']:,} shard{'s' * (report['shards'] != 1)}"
    shrunk = f"to a short side of {report['short_side']}, JPEG {report['jpeg_quality']}"
    rows = [("pairs read", written + num_left_out, ""), ("written", written, shards)]
    rows += [("  shrunk", report["shrunk"], shrunk)]
    rows += [("  redrawn", report["redrawn"], REDRAWN)] if report["redrawn"] else []
    rows += [("left out", num_left_out, f"each in {out_dir / _LEFT_OUT}" if num_left_out else "")]
    rows += [(f"  {cause}", count, f"such as {_first(report, cause)}") for cause, count in report["left_out"].items()]
    mean = report["image_bytes"] / written / 1000 if written else 0
    lines = [f"{name:<24}{count:>14,}  {remark}".rstrip() for name, count, remark in rows]
    return "\n".join([*lines, f"{'bytes':<24}{report['tar_bytes']:>14,}  {mean:.1f} kB an image"])


def _first(report: dict[str, Any], cause: str) -> str:
    fault = report["first_left_out"][cause]
    return " ".join(f"{fault['key']}: {fault['detail']}".split())


def check_reports(reports: dict[Path, dict[str, Any]], max_bad_fraction: float) -> None:
    """Check that enough pairs of each folder can be used, and that no part is empty; duplicates can be used. Raise
    UserError if nothing was written, or more than `max_bad_fraction` of the pairs are unusable, or a part is empty."""
    for folder, report in reports.items():
        unusable = {cause: count for cause, count in report["left_out"].items() if cause != _DUPLICATE}
        written, bad = report["written"], sum(unusable.values())
        pairs = written + sum(report["left_out"].values())
        if bad and not (written and bad <= max_bad_fraction * pairs):
            cause = max(unusable, key=lambda cause: unusable[cause])
            many = f"more than --max_bad_fraction {max_bad_fraction:g}" if written else "which leaves none"
            remedy = _REMEDIES.get(cause, "correct the list") + (", and name a new folder" if written else "")
            raise UserError(
                f"{bad:,} of {pairs:,} pairs of {report['source']} cannot be used, {many}: {unusable[cause]:,} for "
                f"{cause}, such as {_first(report, cause)}; {remedy} (all are in {folder / _LEFT_OUT})"
            )
    for folder, report in reports.items():
        if not report["written"] and not report["left_out"]:
            other = "smaller" if folder.name == PARTS[0] else "larger"
            raise UserError(
                f"--split {report['held_out']:g} leaves no image for {folder}, of {report['pairs']:,}; name a {other} "
                "share and a new folder"
            )
