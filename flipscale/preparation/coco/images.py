"""The images of COCO 2014, unpacked on this machine, and the texts that another file gives them."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flipscale.io.errors import UserError
from flipscale.preparation.lists.files import MissingLabel, digest_of, read_file
from flipscale.preparation.shard_writer import ShardOptions, write_shards

FOLDERS = ("train2014", "val2014")
PAIRS_PER_SHARD = 2000  # 300 MB of whole images
_IMAGE = re.compile(r"(train2014|val2014)/COCO_\1_\d{12}\.jpg")
_WHERE = "http://images.cocodataset.org/zips"


@dataclass(frozen=True)
class CocoList:
    """Images of COCO with texts, as `write_shards` takes pairs.

    Args:
        root: the folder that has train2014/ and val2014/; they may be links.
        keys: what each pair is called in its source.
        files: the image of each, such as train2014/COCO_train2014_000000000009.jpg.
        texts: of each.
    """

    root: Path
    keys: tuple[str, ...]
    files: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]

    @property
    def layout(self) -> str:
        return f"{len(self):,} pairs of {self.root}"

    @property
    def usual_labels(self) -> str | None:
        return None

    def __len__(self) -> int:
        return len(self.files)

    def key(self, number: int) -> str:
        return self.keys[number]

    def place(self, number: int) -> str:
        return self.files[number]

    def image(self, number: int) -> bytes:
        return read_file(self.root, self.files[number], allow_outside=True)

    def captions(self, number: int) -> list[str]:
        return list(self.texts[number])

    def label(self, number: int) -> str:
        raise MissingLabel("there is none")

    def fingerprint(self) -> str:
        return digest_of([self.keys, self.files, self.texts])


def image_file(folder: str, name: str) -> str:
    """Return the path of an image in COCO's folder.

    Raises:
        ValueError: COCO 2014 has no image of that name.
    """
    file = f"{folder}/{name}"
    if not _IMAGE.fullmatch(file):
        raise UserError(f"{file!r:.80} is no image of COCO 2014, such as train2014/COCO_train2014_000000000009.jpg")
    return file


def check_images(root: Path, files: Iterable[str]) -> None:
    """Raise unless all images are there.

    Raises:
        ValueError: a folder or an image is missing.
    """
    wanted: dict[str, set[str]] = {}
    for file in files:
        folder, name = file.split("/")
        wanted.setdefault(folder, set()).add(name)
    for folder, names in sorted(wanted.items()):
        if not (root / folder).is_dir():
            raise UserError(f"{root} has no folder {folder}; unpack {_WHERE}/{folder}.zip there")
        missing = sorted(names - {path.name for path in (root / folder).iterdir()})
        if missing:
            raise UserError(
                f"{root / folder} lacks {len(missing):,} of the {len(names):,} images that are needed, such as "
                f"{missing[0]}; unpack {_WHERE}/{folder}.zip again"
            )


def read_entries(path: Path, name: str, where: str, hook: Callable[[dict[str, Any]], Any] | None = None) -> list[Any]:
    """Return the list that a JSON file of a data set has in its field `name`.

    Args:
        where: the file is to be had.
        hook: what becomes of each object in the file, as `json.load` calls it.

    Raises:
        ValueError: the file is missing or another one.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; it comes in {where}")
    try:
        content = json.loads(path.read_bytes(), object_hook=hook)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no whole JSON file ({error}); unpack it again from {where}") from error
    entries = content.get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} has no list {name!r}; it is another file than that in {where}")
    return entries


def write_parts(
    parts: Mapping[str, CocoList], out_dir: Path, short_side: int, processes: int
) -> dict[Path, dict[str, Any]]:
    """Write the shards of each part to a folder of its name in `out_dir`, and return their reports. The same call goes
    on after an interruption.

    Raises:
        ValueError: an image is missing or cannot be read, or as `write_shards`.
        OSError: as `write_shards`.
    """
    options = ShardOptions(short_side=short_side, pairs_per_shard=PAIRS_PER_SHARD)
    for root in {pairs.root for pairs in parts.values()}:
        check_images(root, (file for pairs in parts.values() for file in pairs.files))
    reports = {}
    for part, pairs in parts.items():
        folder = out_dir / part
        reports[folder] = write_shards(pairs, str(pairs.root), folder, options, processes)
        _check_all_written(reports[folder], folder)
    return reports


def _check_all_written(report: dict[str, Any], folder: Path) -> None:
    """Raise if an image could not be read: without it, the set is not the one that others have.

    Raises:
        ValueError: it could not.
    """
    for cause, count in report["left_out"].items():
        first = report["first_left_out"][cause]
        raise UserError(
            f"{count:,} of {report['pairs']:,} images for {folder} cannot be used, such as that of {first['key']} "
            f"({first['detail']}); unpack them again, remove {folder} and start the same command"
        )
