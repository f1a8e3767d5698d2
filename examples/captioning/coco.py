"""Write COCO's captions as shards, in the split of Karpathy and Li (2015).

    python examples/captioning/coco.py data/coco data/coco_captions

The training part has 113,287 images and the test part 5,000, with five captions each. The file of the split,
`dataset_coco.json`, also has the part restval, the rest of COCO's validation set. It belongs to the training data.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from flipscale.io.command_line import OutputFolder, parse_command
from flipscale.io.cores import usable_cores
from flipscale.io.errors import UserError
from flipscale.io.options import Count, Threads
from flipscale.io.paths import file_state
from flipscale.preparation.lists import PairSource, list_digest, read_file
from flipscale.preparation.shard_writer import ShardOptions, report_table, write_shards
from flipscale.process.console import report_user_errors, start_logging

SPLIT = "dataset_coco.json"
PAIRS_PER_SHARD = 2000  # 300 MB of whole images
_SPLIT_URL = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
_IMAGES_URL = "http://images.cocodataset.org/zips"
_IMAGE = re.compile(r"(train2014|val2014)/COCO_\1_\d{12}\.jpg")
_PARTS = {"train": ("train", "restval"), "test": ("test",)}


@dataclass(frozen=True)
class CocoList(PairSource):
    """Images of COCO with texts.

    Args:
        root: folder with train2014/ and val2014/, which may be links.
        keys: name of each pair in its source.
        files: image of each pair, such as train2014/COCO_train2014_000000000009.jpg.
        texts: texts of each pair.
    """

    root: Path
    keys: tuple[str, ...]
    files: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]

    @property
    def layout(self) -> str:
        return f"{len(self):,} pairs of {self.root}"

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

    def fingerprint(self) -> str:
        return list_digest([self.keys, self.files, self.texts])

    def state(self, number: int) -> str:
        return repr(file_state(self.root / self.files[number]))


def prepare_coco_captions(coco: Path, out_dir: Path, short_side: int, processes: int) -> dict[Path, dict[str, Any]]:
    """Write the shards of train/ and test/, and return the report of each. The same call continues after a kill.

    Args:
        coco: folder with dataset_coco.json, train2014/ and val2014/.
        out_dir: folder to write.
        short_side: short side in pixels to which larger images are shrunk.
        processes: number of processes that write.

    Raises:
        UserError: a file of `coco` is missing or damaged, or an error of `write_shards`.
        OSError: a worker died, or the disk is full.
    """
    path = coco / SPLIT
    images = [_split_entry(path, at, entry) for at, entry in enumerate(read_entries(path, "images", _SPLIT_URL))]
    parts = {}
    for part, splits in _PARTS.items():
        chosen = [(file, texts) for split, file, texts in images if split in splits]
        if not chosen:
            raise UserError(f"{path} has no images of {' and '.join(splits)}; download it again from {_SPLIT_URL}")
        files = tuple(file for file, _ in chosen)
        parts[part] = CocoList(coco, files, files, tuple(texts for _, texts in chosen))
    return write_parts(parts, out_dir, short_side, processes)


def _split_entry(path: Path, at: int, entry: Any) -> tuple[str, str, tuple[str, ...]]:
    """Return the split, the image file and the captions of an entry."""
    try:
        texts = tuple(" ".join(sentence["raw"].split()) for sentence in entry["sentences"])
        file, split = image_file(entry["filepath"], entry["filename"]), str(entry["split"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: images[{at}] is not as in {_SPLIT_URL} ({error!r}); unpack it again") from error
    if not any(texts):
        raise UserError(f"{path}: images[{at}] has no caption; unpack it again from {_SPLIT_URL}")
    return split, file, tuple(filter(None, texts))


def image_file(folder: str, name: str) -> str:
    """Return the path of an image in COCO's folder.

    Raises:
        UserError: COCO 2014 has no such name.
    """
    file = f"{folder}/{name}"
    if not _IMAGE.fullmatch(file):
        raise UserError(f"{file!r:.80} is not an image of COCO 2014, such as train2014/COCO_train2014_000000000009.jpg")
    return file


def read_entries(path: Path, name: str, url: str, hook: Callable[[dict[str, Any]], Any] | None = None) -> list[Any]:
    """Return the list in the field `name` of a JSON file; `hook` is `json.load`'s `object_hook`.

    Raises:
        UserError: the file is missing or damaged, or it is another file.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; it comes in {url}")
    try:
        content = json.loads(path.read_bytes(), object_hook=hook)
    except ValueError as error:
        raise UserError(f"{path} is no whole JSON file ({error}); unpack it again from {url}") from error
    entries = content.get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} has no list {name!r}; it is another file than that in {url}")
    return entries


def write_parts(
    parts: Mapping[str, CocoList], out_dir: Path, short_side: int, processes: int
) -> dict[Path, dict[str, Any]]:
    """Write the shards of each part to its folder in `out_dir`, and return their reports.

    Raises:
        UserError: an image is missing or damaged, or an error of `write_shards`.
        OSError: a worker died, or the disk is full.
    """
    options = ShardOptions(short_side=short_side, pairs_per_shard=PAIRS_PER_SHARD)
    for root in {pairs.root for pairs in parts.values()}:
        _check_images(root, (file for pairs in parts.values() for file in pairs.files))
    reports = {}
    for part, pairs in parts.items():
        folder = out_dir / part
        report = reports[folder] = write_shards(pairs, str(pairs.root), folder, options, processes)
        for cause, count in report["left_out"].items():
            first = report["first_left_out"][cause]
            raise UserError(
                f"{count:,} of {report['pairs']:,} images for {folder} cannot be used, such as {first['key']} "
                f"({first['detail']}); unpack them again, remove {folder} and start the same command"
            )
    return reports


def _check_images(root: Path, files: Iterable[str]) -> None:
    needed: dict[str, set[str]] = {}
    for file in files:
        folder, name = file.split("/")
        needed.setdefault(folder, set()).add(name)
    for folder, names in sorted(needed.items()):
        if not (root / folder).is_dir():
            raise UserError(f"{root} has no folder {folder}; unpack {_IMAGES_URL}/{folder}.zip there")
        missing = sorted(names - {path.name for path in (root / folder).iterdir()})
        if missing:
            raise UserError(
                f"{root / folder} lacks {len(missing):,} of the {len(names):,} images that are needed, such as "
                f"{missing[0]}; unpack {_IMAGES_URL}/{folder}.zip again"
            )


@dataclass(frozen=True)
class CocoOptions:
    """Write COCO's captions as shards, in the split that all papers test on.

    Args:
        source: Folder with dataset_coco.json, the split, and COCO's images of 2014 in train2014/ and val2014/.
        directory: Folder to write. After an interruption, the same command continues.
        short_side: Shrink images with a longer short side to this many pixels; 512 keeps most as they are.
        num_workers: Number of worker processes. Default: one for each core.
    """

    source: Path
    directory: OutputFolder
    _: KW_ONLY
    short_side: Count = 512
    num_workers: Threads = field(default_factory=usable_cores)


def print_reports(reports: Mapping[Path, dict[str, Any]]) -> None:
    """Print the reports of the parts."""
    for folder, report in reports.items():
        print(f"{folder}\n{report_table(report, folder)}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the captions that the command line names."""
    with report_user_errors():
        start_logging()
        given = parse_command(CocoOptions, arguments)
        print_reports(prepare_coco_captions(given.source, given.directory, given.short_side, given.num_workers))


if __name__ == "__main__":
    main()
