"""The parts of the icons as shards: which drawings are in each, and their files."""

import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flipscale.data.sources.tar_file import add_member
from flipscale.files.aside import own_partial_path, write_text, written_aside
from flipscale.preparation.icons.collection import caption
from flipscale.preparation.icons.copies import find_copies
from flipscale.preparation.icons.drawing import ROW, Block
from flipscale.preparation.icons.splits import HELD_OUT, NAMED_BY, TEST, VALIDATION, place_of
from flipscale.preparation.labelled_set import write_class_texts
from flipscale.preparation.worker_pool import worker_pool

PAIRS_PER_SHARD = 8192
TEMPLATE = "{c}"  # captions are bare names, so class prompts are too


@dataclass(frozen=True)
class Drawings:
    """What is known of all drawings, by their numbers; their pictures stay in their files.

    Args:
        prefixes: the set of each.
        names: the name of each.
        paths: a digest of the paths of each, uint64.
        rows: about the picture of each, `drawing.ROW`.
        files: the files of pictures.
        file_of: the number of each drawing's file, int64.
    """

    prefixes: list[str]
    names: list[str]
    paths: np.ndarray
    rows: np.ndarray
    files: list[Path]
    file_of: np.ndarray

    @classmethod
    def read(cls, blocks: Sequence[Block], paths: np.ndarray) -> "Drawings":
        """Return the drawings of all blocks, which have been drawn."""
        rows = [np.load(block.rows_path) for block in blocks]
        return cls(
            [block.prefix for block in blocks for _ in block.names],
            [name for block in blocks for name in block.names],
            paths,
            np.concatenate([np.zeros(0, ROW), *rows]),
            [block.png_path for block in blocks],
            np.repeat(np.arange(len(blocks)), [len(block.names) for block in blocks]),
        )

    def sample(self, number: int, label: int | None = None) -> "Sample":
        """Return where a drawing's picture lies, with its caption."""
        row = self.rows[number]
        file = self.files[self.file_of[number]]
        return Sample(file, int(row["start"]), int(row["size"]), caption(self.names[number]), label)

    def png(self, number: int) -> bytes:
        """Return the picture of a drawing."""
        return self.sample(number).png()


@dataclass(frozen=True)
class Sample:
    """A picture in a file of pictures, its caption and, in a test set, its class."""

    file: Path
    start: int
    size: int
    caption: str
    label: int | None

    def png(self) -> bytes:
        """Return the picture."""
        with open(self.file, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)


@dataclass(frozen=True)
class Part:
    """A folder of shards: the numbers of its drawings, in their order there, int64."""

    name: str
    numbers: np.ndarray
    is_test: bool


def choose_parts(drawings: Drawings, num_sets: Mapping[str, int]) -> tuple[list[Part], Counter[str]]:
    """Return the parts, and how many drawings were left out for each cause.

    Args:
        drawings: all.
        num_sets: how many training sets have each name.
    """
    shown = ~drawings.rows["blank"]
    is_held = np.isin(drawings.prefixes, HELD_OUT)
    held, train = np.flatnonzero(shown & is_held), np.flatnonzero(shown & ~is_held)
    copies = find_copies(drawings.rows, drawings.paths, held, train, drawings.png)
    train = np.setdiff1d(train, np.concatenate(list(copies.values())))
    places = np.array([place_of(drawings.prefixes[number], drawings.names[number]) for number in train])
    parts = [Part("train", train[np.argsort(places, kind="stable")], is_test=False)]

    counts = np.array([num_sets.get(drawings.names[number], 0) for number in held], int)
    by = np.array([drawings.prefixes[number] for number in held], dtype=object)
    chosen = {
        "validation": np.isin(by, VALIDATION) & (counts >= NAMED_BY),
        "test": np.isin(by, TEST) & (counts >= NAMED_BY),
        "unseen": np.isin(by, TEST) & (counts == 0),
    }
    for name, mask in chosen.items():
        order = sorted(held[mask].tolist(), key=lambda number: (drawings.names[number], drawings.prefixes[number]))
        parts.append(Part(name, np.array(order, int), is_test=True))
    left_out = Counter({cause: len(numbers) for cause, numbers in copies.items()})
    left_out["blank"] = int((~shown).sum())
    left_out["held_out_and_not_tested"] = len(held) - sum(int(mask.sum()) for mask in chosen.values())
    return parts, left_out


def write_part(out_dir: Path, part: Part, drawings: Drawings, processes: int) -> None:
    """Write `out_dir/NAME/shard-*.tar`, webdataset naming: KEY.png, KEY.txt and in a test set KEY.cls; beside a test
    set's, its names and its prompt, as CLIP_benchmark lays them out. Shards that are there already are left.

    The set and the name of each drawing are the lines of `out_dir/NAME.tsv`, from 0; KEY is the number of the line.

    Raises:
        OSError: a worker died, or the disk is full.
    """
    folder = out_dir / part.name
    folder.mkdir(exist_ok=True)
    numbers = part.numbers.tolist()
    class_names = sorted({caption(drawings.names[number]) for number in numbers}) if part.is_test else []
    if part.is_test:
        write_class_texts(folder, class_names, TEMPLATE)
    label_of: dict[str, int] = {name: label for label, name in enumerate(class_names)}
    lines = (f"{drawings.prefixes[number]}\t{drawings.names[number]}\n" for number in numbers)
    write_text(out_dir / f"{part.name}.tsv", "".join(lines))

    def samples(first: int) -> list[Sample]:
        some = numbers[first : first + PAIRS_PER_SHARD]
        return [drawings.sample(number, label_of.get(caption(drawings.names[number]))) for number in some]

    firsts = {folder / f"shard-{at // PAIRS_PER_SHARD:05d}.tar": at for at in range(0, len(numbers), PAIRS_PER_SHARD)}
    missing = {path: first for path, first in firsts.items() if not path.exists()}
    if not missing:
        return
    with worker_pool(min(processes, len(missing)), remedy="the same command goes on where it stopped") as pool:
        written = pool.map(_write_shard, missing, missing.values(), map(samples, missing.values()))
        for _ in tqdm(written, f"writing {part.name}", len(missing), unit=" shards", disable=None):
            pass


def _write_shard(path: Path, first: int, samples: Sequence[Sample]) -> None:
    """Write a shard aside and rename it."""
    with (
        written_aside(path, own_partial_path(path)) as partial,
        tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for number, sample in enumerate(samples, first):
            add_member(tar, f"{number:06d}.png", sample.png())
            add_member(tar, f"{number:06d}.txt", sample.caption.encode())
            if sample.label is not None:
                add_member(tar, f"{number:06d}.cls", str(sample.label).encode())
