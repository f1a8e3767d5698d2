"""Training drawings that look like one of a held-out designer's: the same paths, the same pixels, or nearly so."""

from collections.abc import Callable

import cv2
import numpy as np
from tqdm import tqdm

from flipscale.preparation.audit.duplicates import LEAST_LIKENESS, near_hashes
from flipscale.preparation.audit.hashes import MOST_DIFFERENCE, likeness, thumbnail

_CELLS, _PAIRS = 8, 1 << 16
SAME_PATHS, SAME_PIXELS, ALIKE = "same_paths", "same_pixels", "alike"


def find_copies(
    rows: np.ndarray, paths: np.ndarray, held: np.ndarray, train: np.ndarray, picture: Callable[[int], bytes]
) -> dict[str, np.ndarray]:
    """Return the drawings of training that a held-out designer has too, by what shows it, each under the first of
    them: int64 numbers of drawings.

    Args:
        rows: about each drawing, `drawing.ROW`.
        paths: digests of their paths, uint64, 0 where there is none.
        held: numbers of the held-out drawings.
        train: numbers of the others.
        picture: returns the PNG of a drawing by its number.
    """
    same_paths = np.isin(paths[train], paths[held]) & (paths[train] > 0)
    same_pixels = np.isin(rows["pixels"][train], rows["pixels"][held]) & ~same_paths
    left = train[~same_paths & ~same_pixels]
    asked, known = (numbers[~rows["faint"][numbers]] for numbers in (held, left))
    seen, alike = _Seen(len(rows), picture), np.zeros(len(rows), bool)
    pieces = near_hashes(rows["looks"][asked], rows["looks"][known])
    for one, other in tqdm(pieces, "near duplicates", unit=" pieces", delay=2, disable=None):
        left_over = ~alike[known[other]]
        firsts, seconds = asked[one[left_over]], known[other[left_over]]
        fit = seen.may_be_alike(firsts, seconds)
        for first, second in zip(firsts[fit].tolist(), seconds[fit].tolist(), strict=True):
            if not alike[second] and likeness(seen.thumbnail(first), seen.thumbnail(second)) >= LEAST_LIKENESS:
                alike[second] = True
    return {SAME_PATHS: train[same_paths], SAME_PIXELS: train[same_pixels], ALIKE: np.flatnonzero(alike)}


class _Seen:
    """Drawings that were looked at: most of those whose hashes are near are told apart by the means of cells alone."""

    def __init__(self, count: int, picture: Callable[[int], bytes]):
        self._picture = picture
        # The mean grey of each of 8 x 8 cells.
        self._cells = np.zeros((count, _CELLS, _CELLS), np.float32)
        self._is_known = np.zeros(count, bool)

    def thumbnail(self, number: int) -> np.ndarray:
        """Return the thumbnail of a drawing, uint8 `(32, 32, 3)`."""
        pixels = cv2.imdecode(np.frombuffer(self._picture(number), np.uint8), cv2.IMREAD_COLOR)
        assert pixels is not None
        return thumbnail(pixels)

    def may_be_alike(self, firsts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Return which pairs can have a likeness above 0: the means of cells differ by no more than pixels do."""
        is_asked = np.zeros(len(self._is_known), bool)
        is_asked[firsts] = is_asked[seconds] = True
        for number in np.flatnonzero(is_asked & ~self._is_known).tolist():
            small = self.thumbnail(number).astype(np.float32)
            self._cells[number] = small.reshape(_CELLS, 32 // _CELLS, _CELLS, 32 // _CELLS, 3).mean(axis=(1, 3, 4))
        self._is_known |= is_asked
        fit = np.zeros(len(firsts), bool)
        for start in range(0, len(firsts), _PAIRS):
            some = slice(start, start + _PAIRS)
            apart = np.abs(self._cells[firsts[some]] - self._cells[seconds[some]])
            tiles = apart.reshape(len(apart), 4, _CELLS // 4, 4, _CELLS // 4).mean(axis=(2, 4))
            fit[some] = tiles.max(axis=(1, 2)) <= MOST_DIFFERENCE + 0.01  # what rounding may add
        return fit
