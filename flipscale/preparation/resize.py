"""Shrink the images of tar shards, so that a training run decodes fewer pixels.

A process claims a shard by a lock, writes it aside and renames it. So a killed run resumes with the shards that are
missing, and any number of processes share them. The bytes of a shard depend only on its source and the options.
A shard whose source has changed is written anew.
"""

import os
import tarfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flipscale.data.samples import BadSample
from flipscale.data.sources.manifest import ShardList
from flipscale.data.sources.raw_data import IMAGE_SUFFIXES, no_shards
from flipscale.data.sources.shard_index import Damaged, NotAFile, load_index, open_plain, size_and_time, tar_members
from flipscale.data.sources.tar import add_member
from flipscale.io import json_lines
from flipscale.io.atomic import atomic_write, sync, unique_partial_path
from flipscale.io.errors import UserError
from flipscale.io.paths import file_state
from flipscale.io.progress import each
from flipscale.preparation.shard_writer import ShardOptions, stored_image
from flipscale.preparation.worker_pool import worker_pool

_DECIDING, _COUNTED = ("short_side", "jpeg_quality"), ("images", "shrunk", "redrawn", "left_out", "before", "after")
_LINES = "resized.jsonl"  # the options, then the counts of each finished shard


def resize_shards(shards: str, out_dir: Path, options: ShardOptions, processes: int) -> Counter[str]:
    """Write each shard to `out_dir` under its own name, with smaller images.

    Keys, captions, other files and their order stay. So do images that are small enough or cannot be decoded. A shrunk
    image becomes a JPEG. A small one that other readers would show otherwise, such as a transparent one, becomes a PNG.

    Args:
        shards: as in `data.shards` of a recipe, on this machine.
        options: `short_side` and `jpeg_quality`.

    Returns:
        Counts over all shards: `images`, `shrunk` images, `redrawn` ones (see `stored_image`), entries `left_out`
        because they are links, devices or sparse files, and bytes `before` and `after`.

    Raises:
        UserError: the shards are at a URL, `out_dir` has other files, shards of other options or shards whose source is
            gone, or, after all others are written, a shard is damaged.
        OSError: a worker died, or the disk is full.
    """
    if "://" in shards:
        raise UserError(f"{shards!r} is a URL; copy the shards here first")
    listed = ShardList(shards)
    names, about = listed.names(), {"source": shards, **{name: getattr(options, name) for name in _DECIDING}}
    if not names:
        raise no_shards(shards)
    out_dir.mkdir(parents=True, exist_ok=True)
    if any(not path.name.startswith(".") for path in out_dir.iterdir()) and not (out_dir / _LINES).is_file():
        raise UserError(f"{out_dir} holds something that `prepare resize` did not write; name a new folder")
    damaged, is_first = dict[str, str](), True
    with (lock := FileLock(out_dir / ".resized.lock")):  # held while the lines are read or changed
        done = _finished(out_dir, about, listed)
    if gone := sorted(done.keys() - set(names)):
        raise UserError(
            f"{out_dir} has {len(gone)} shards that {shards!r} lacks, such as {gone[0]}; "
            "fetch them again, or name a new folder"
        )
    with worker_pool(min(processes, len(names)), remedy="the same command resumes") as pool:
        while todo := [name for name in names if name not in done.keys() | damaged.keys()]:
            time.sleep(0.0 if is_first else 5.0)  # other processes write the rest
            places = (map(listed.path, todo), (out_dir / name for name in todo))
            lines = pool.map(partial(_resize, options=options, skips_written=is_first), *places)
            for name, line in zip(todo, each(lines, "resizing", "shards", len(todo)), strict=True):
                if isinstance(line, str):
                    damaged[name] = line
                elif line:
                    with lock:
                        json_lines.append(out_dir / _LINES, [{"shard": name, **line}])
            with lock:
                done, is_first = _finished(out_dir, about, listed), False
    for line in damaged.values():
        raise UserError(
            f"{len(damaged)} of {len(names)} shards are damaged and left out: {line}; fetch them again and run "
            "the same command, or go on without them"
        )
    return sum((Counter({name: line.get(name, 0) for name in _COUNTED}) for line in done.values()), Counter())


def _finished(out_dir: Path, about: dict[str, Any], listed: ShardList) -> dict[str, dict[str, Any]]:
    """Return the lines of the finished shards by name, and write `resized.jsonl` with these lines only, by name. Remove
    shards whose source has changed since."""
    lines = json_lines.iterate(out_dir / _LINES)
    if (begun := next(lines, about)) != about:
        raise UserError(f"{out_dir} was begun with {begun}, now {about}; use the same options, or name a new folder")
    whole = {line["shard"]: line for line in lines if size_and_time(out_dir / line["shard"])[0] == line["after"]}
    for name, line in [*whole.items()]:
        if (state := file_state(listed.path(name))) and [*state] != line.get("state"):
            del whole[name]
            (out_dir / name).unlink()
            # A manifest would find the old places in a new shard of the same size.
            for manifest in out_dir.glob("*.manifest"):
                manifest.unlink()
    json_lines.rewrite(out_dir / _LINES, [about, *(whole[name] for name in sorted(whole))])
    return whole


def _resize(source: Path, target: Path, options: ShardOptions, skips_written: bool) -> dict[str, Any] | str | None:
    """Write a shard and its index, and return its counts, or what is wrong with it. Return None if another process is
    writing it, or has written it and this one `skips_written` shards."""
    if skips_written and target.exists():
        return None
    counts: Counter[str] = Counter(dict.fromkeys(_COUNTED, 0))
    state = file_state(source)  # before it is read, so that a later change is noticed
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(target.with_name(f".{target.name}.lock"), timeout=0) as lock:
            for left in target.parent.glob(f".{target.name}.*partial*"):
                left.unlink()
            # Under a name of this process, because a worker of a killed run may live a little into the next run.
            with atomic_write(target, unique_partial_path(target)) as written:
                with os.fdopen(open_plain(source), "rb") as old, tarfile.open(written, mode="w") as new:
                    for name, offset, size, trouble in tar_members(old):
                        if trouble:
                            counts["left_out"] += "." in name.rpartition("/")[2]  # others are folders
                            continue
                        old.seek(offset)
                        content = old.read(size)
                        if name.lower().endswith(IMAGE_SUFFIXES):
                            name, content = _smaller(name, content, options, counts)
                        add_member(new, name, content)
                sync(written)
            Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout:
        return None
    except (Damaged, NotAFile) as error:
        return f"{source} ({error})"
    load_index(target)
    return {**counts, "before": source.stat().st_size, "after": target.stat().st_size, "state": state}


def _smaller(name: str, content: bytes, options: ShardOptions, counts: Counter[str]) -> tuple[str, bytes]:
    counts["images"] += 1
    try:
        stored, extension, sizes, is_redrawn = stored_image(content, options)
    except BadSample:
        return name, content
    is_shrunk = sizes["width"] != sizes["original_width"]
    if not (is_shrunk or is_redrawn):
        return name, content
    counts.update(shrunk=is_shrunk, redrawn=is_redrawn)
    return f"{name.rpartition('.')[0]}.{extension}", stored
