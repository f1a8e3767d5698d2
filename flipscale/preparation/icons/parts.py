"""The parts of the icons: which drawings are in each, and what is known of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flipscale.preparation.icons.collection import caption
from flipscale.preparation.icons.copies import find_copies
from flipscale.preparation.icons.drawing import ROW, Block
from flipscale.preparation.icons.shards import Sample
from flipscale.preparation.icons.splits import HELD_OUT, NAMED_BY, TEST, VALIDATION, place_of


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

    def sample(self, number: int, label: int | None = None) -> Sample:
        """Return where a drawing's picture lies, with its caption."""
        row = self.rows[number]
        file = self.files[self.file_of[number]]
        return Sample(file, int(row["start"]), int(row["size"]), caption(self.names[number]), label)

    def png(self, number: int) -> bytes:
        """Return the picture of a drawing."""
        return self.sample(number).png()


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
