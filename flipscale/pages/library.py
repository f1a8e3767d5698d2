"""Pictures to look at: the files of a folder and of those below it, or the samples of tar shards."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flipscale.data.faults import BadSample
from flipscale.data.recipe import DataRecipe
from flipscale.data.sources.opening import open_shards
from flipscale.data.sources.tar_source import TarSource
from flipscale.evaluation.images import SampleNumbers
from flipscale.io.errors import UserError
from flipscale.preparation.lists.files import IMAGE_SUFFIXES
from flipscale.preparation.lists.folder_list import FileList, picture_files

_READ = DataRecipe(lanes=1, shards_per_block=1)


class Pictures(Protocol):
    """Pictures by number, as stored."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """Return what messages call a picture."""

    def label(self, number: int) -> str:
        """Return what pages call a picture: its caption, or its name where it has none."""

    def image(self, number: int) -> bytes:
        """Return a picture as stored.

        Raises:
            BadSample: it cannot be read.
        """

    def state(self) -> list[list[str | int]]:
        """Return what tells whether pictures have changed: names, bytes and times of files."""


@dataclass(frozen=True)
class FolderPictures:
    """The picture files in a folder and below it."""

    files: FileList

    def __len__(self) -> int:
        return len(self.files)

    def name(self, number: int) -> str:
        return self.files.key(number)

    def label(self, number: int) -> str:
        try:
            return self.files.captions(number)[0]
        except (BadSample, IndexError):
            return self.name(number)

    def image(self, number: int) -> bytes:
        return self.files.image(number)

    def state(self) -> list[list[str | int]]:
        found: list[list[str | int]] = []
        for name in self.files.files:
            path = self.files.root / name
            there = path.stat() if path.is_file() else None
            found.append([name, there.st_size, there.st_mtime_ns] if there else [name])
        return found


@dataclass(frozen=True)
class ShardPictures:
    """The samples of tar shards by their rows."""

    source: TarSource

    def __len__(self) -> int:
        return len(self.source)

    def place(self, number: int) -> tuple[int, int]:
        """Return shard and number within it."""
        return SampleNumbers(self.source)[number]

    def name(self, number: int) -> str:
        shard, within = self.place(number)
        return f"{self.source.shard_name(shard).rsplit('/', 1)[-1]}#{within}"

    def label(self, number: int) -> str:
        try:
            captions = self.source.read_captions(*self.place(number))
        except BadSample:
            captions = ()
        lines = [line for text in captions for line in text.decode("utf-8", "replace").splitlines() if line.strip()]
        return lines[0].strip() if lines else self.name(number)

    def image(self, number: int) -> bytes:
        return self.source.read(*self.place(number)).image

    def state(self) -> list[list[str | int]]:
        manifest = self.source.manifest
        table = manifest.table[["samples", "num_bytes", "mtime_ns"]].tolist()
        return [[name, *map(int, row)] for name, row in zip(manifest.all_names(), table, strict=True)]


def open_pictures(place: str) -> Pictures:
    """Return the pictures of a folder of files or of shards, or of shards named by a glob, a range or a URL.

    Raises:
        ValueError: it does not exist, or has no pictures.
    """
    folder = Path(place)
    # A folder of pictures may have any name.
    is_shards = any(folder.glob("*.tar")) if folder.is_dir() else re.search(r"://|[*?\[{]|\.tar$", place)
    if folder.is_file() and not is_shards:
        raise UserError(f"{place} is a file; name the folder that the pictures lie in, or shards named *.tar")
    if not is_shards and not folder.is_dir():
        raise UserError(f"{place} does not exist; name a folder of pictures, or shards named *.tar")
    pictures = ShardPictures(open_shards(place, _READ)) if is_shards else FolderPictures(picture_files(folder))
    if not len(pictures):
        raise UserError(
            f"{place} has no pictures; they are files named {' '.join(IMAGE_SUFFIXES)} in it or below it, or samples "
            "of shards named *.tar"
        )
    return pictures
