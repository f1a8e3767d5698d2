"""Folders of images: with a text beside each, or sorted into a folder for each class."""

import os
from dataclasses import dataclass
from pathlib import Path, PurePath

from flipscale.data.captions import captions_of_json
from flipscale.data.faults import MissingCaption
from flipscale.data.sources.source import MAX_TEXT_BYTES
from flipscale.io.errors import UserError
from flipscale.preparation.lists.files import (
    IMAGE_SUFFIXES,
    MissingLabel,
    captions_of,
    digest_of,
    label_of,
    read_file,
    usable,
)

FOLDER = "folder"  # what --labels calls the folders of classes
BESIDE = (".txt", ".json")
# As `datasets` names the parts of a folder of images.
_PARTS = {"train", "test", "val", "valid", "validation"}
_SHOWN = 3


@dataclass(frozen=True)
class FileList:
    """Image files under `root`, with their captions in KEY.txt or KEY.json beside them.

    Args:
        files: their paths in `root`.
        num_captioned: how many have a text beside them.
    """

    root: Path
    files: list[str]
    num_captioned: int
    allow_outside: bool = False

    @property
    def layout(self) -> str:
        return f"{len(self):,} images: captions are the .txt or .json files beside {self.num_captioned:,} of them"

    @property
    def usual_labels(self) -> str | None:
        return None

    def __len__(self) -> int:
        return len(self.files)

    def key(self, number: int) -> str:
        return self.files[number]

    def place(self, number: int) -> str:
        return self.files[number]

    def image(self, number: int) -> bytes:
        return read_file(self.root, self.files[number], self.allow_outside)

    def captions(self, number: int) -> list[str]:
        image = PurePath(self.files[number])
        for suffix in BESIDE:
            beside = image.with_suffix(suffix)
            if os.path.lexists(self.root / beside):
                content = read_file(self.root, str(beside), self.allow_outside, MAX_TEXT_BYTES)
                return usable((content,) if suffix == ".txt" else captions_of_json(content))
        raise MissingCaption("no .txt or .json beside it")

    def label(self, number: int) -> str:
        folder = _class_of(self.files[number])
        if not folder:
            raise MissingLabel("it lies in no folder of a class")
        return label_of(folder)

    def fingerprint(self) -> str:
        return digest_of(self.files)


@dataclass(frozen=True)
class ClassFolders(FileList):
    """Image files whose caption is the name of the folder that they lie in."""

    @property
    def layout(self) -> str:
        names = sorted({name for file in self.files if (name := _class_of(file))})
        shown = ", ".join([*names[:_SHOWN], *(["..."] if len(names) > _SHOWN else [])])
        return f"{len(self):,} images in {len(names):,} class folders ({shown}): captions are the folders' names"

    @property
    def usual_labels(self) -> str | None:
        return FOLDER

    def captions(self, number: int) -> list[str]:
        folder = _class_of(self.files[number])
        if not folder:
            raise MissingCaption("it lies in no folder of a class")
        return captions_of(folder)


def list_folder(root: Path, allow_outside: bool) -> FileList:
    """Return the images of a folder and below it, in the layout that is recognised.

    What is called like an image is listed, file or not, and so are the folders that cannot be listed; reading these
    says what is wrong with them.

    Raises:
        ValueError: there are images, and nothing that could be their captions.
    """
    files, tables, num_captioned = _walk(root)
    if num_captioned or not files:
        return FileList(root, files, num_captioned, allow_outside)
    classes = {name for file in files if (name := _class_of(file))}
    begun = {PurePath(file).parts[0] for file in files if len(PurePath(file).parts) > 2}
    if begun and begun <= _PARTS:
        raise UserError(
            f"{root} has the parts {' and '.join(sorted(begun))}, whose images would be mixed; name one of them, such "
            f"as {root / max(begun, key=lambda part: part == 'train')}"
        )
    if len(classes) < 2:
        there = f"; if {tables[0]} has them, name it in place of the folder" if tables else ""
        raise UserError(
            f"{root} has {len(files):,} images and no captions: put KEY.txt beside KEY.jpg, or a metadata.csv with the "
            f"columns file_name and text into the folder, or sort the images into a folder for each class{there}"
        )
    # Of each class some in every shard: in the order of the names, a shard would have a few classes only.
    return ClassFolders(root, sorted(files, key=digest_of), 0, allow_outside)


def picture_files(root: Path) -> FileList:
    """Return what is called like an image in a folder and below it, in the order of the names, captioned or not. A link
    to a file elsewhere is followed."""
    files, _, num_captioned = _walk(root)
    return FileList(root, files, num_captioned, allow_outside=True)


def _walk(root: Path) -> tuple[list[str], list[Path], int]:
    """Return the images below a folder, the tables in it, and how many images have a text beside them."""
    found: list[str] = []
    unlisted: list[str] = []
    tables: list[Path] = []
    num_captioned = 0
    for folder, folders, files in os.walk(root, onerror=lambda error: unlisted.append(error.filename)):
        links = {name for name in folders if os.path.islink(os.path.join(folder, name))}
        named = {name for name in (*files, *folders) if PurePath(name).suffix.lower() in IMAGE_SUFFIXES}
        texts = {PurePath(name).stem for name in files if PurePath(name).suffix in BESIDE}
        num_captioned += sum(PurePath(name).stem in texts for name in named)
        found += [os.path.join(folder, name) for name in links | named]
        tables += [Path(folder, name) for name in files if PurePath(name).suffix.lower() in (".csv", ".tsv", ".jsonl")]
    found += unlisted
    return sorted(os.path.relpath(path, root) for path in found), sorted(tables), num_captioned


def _class_of(file: str) -> str:
    """Return the name of the folder that a file lies in, `_` read as a blank; empty for files of the folder itself."""
    return PurePath(file).parent.name.replace("_", " ").strip()
