"""Download a set of pairs from the Hub.

`FOLDER/train` gets the shards, and `FOLDER/validation` the held-out ones. A shard appears under its name when it is
whole. `FOLDER/source.json` has the repository and the commit, so that a later start continues with the same one.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout

from flipscale.data.sources.pair_set import PairSet
from flipscale.data.sources.tar import TarSource
from flipscale.io.atomic import remove, write_text
from flipscale.io.errors import UserError
from flipscale.io.model_folder import read_object
from flipscale.io.paths import check_disk_space, size_text
from flipscale.io.progress import Progress
from flipscale.preparation.hub_files import HubFile, download, list_files

SOURCE = "source.json"
_DOWNLOAD = ".download"
_AT_ONCE = 8  # files; a single one rarely fills the line


def download_pairs(pairs: PairSet, folder: Path) -> TarSource:
    """Download a set into `folder`, and return the source of its training shards. A second call continues.

    Raises:
        UserError: the set is missing, gated or not as its file says, the disk is too small, or `folder` is another's.
        OSError: the Hub cannot be read, or a file did not arrive whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / f"{_DOWNLOAD}.lock", timeout=0):
            _download_all(_files(pairs, folder), folder)
    except Timeout:
        raise UserError(f"another process downloads into {folder}; wait for it to end") from None
    source = TarSource(str(folder / "train"))
    for fault in source.faults:
        raise UserError(f"{fault.shard} cannot be read ({fault.detail}); the source has changed")
    return source


def _files(pairs: PairSet, folder: Path) -> list[HubFile]:
    """Return the files of a set, each with its path in the folder, and write `source.json`."""
    place, about = folder / SOURCE, {"repo": pairs.repo, "revision": pairs.revision}
    begun = read_object(place) if place.exists() else {}
    if begun and {name: begun.get(name) for name in about} != about:
        raise UserError(f"{folder} has pairs of {begun.get('repo')}, not of {pairs.repo}; name another folder")
    listed = list_files(pairs.repo, begun.get("commit", pairs.revision))
    files = list[HubFile]()
    for part, pattern in {"train": pairs.train, "validation": pairs.validation}.items():
        shards = [file for file in listed if fnmatch(file.name, pattern)]
        if pattern and not shards:
            raise UserError(f"data set {pairs.repo} has no shards of its part {part}; the source has changed")
        files += [replace(file, path=f"{part}/{Path(file.name).name}") for file in shards]
    if not begun:
        write_text(place, json.dumps(about | {"commit": files[0].commit}) + "\n")
    return files


def _download_all(files: list[HubFile], folder: Path) -> None:
    missing = [file for file in files if not file.has_size(folder / file.path)]
    total, left = (sum(file.size for file in some) for some in (files, missing))
    check_disk_space(folder, left, "name a folder on a larger one, or train from the Hub by the set's name")
    print(f"{len(files):,} shards, {size_text(total)}, of {files[0].repo} at {files[0].commit[:12]}", end="; ")
    print(f"{size_text(left)} to download into {folder}" if left else f"all are in {folder}", flush=True)

    def fetch(file: HubFile) -> int:
        download(file, folder / file.path, folder / _DOWNLOAD / file.name)
        return file.size

    with Progress(total, files[0].repo, "B", initial=total - left) as progress, ThreadPoolExecutor(_AT_ONCE) as pool:
        for size in pool.map(fetch, missing):
            progress.update(size)
    remove(folder / _DOWNLOAD)
