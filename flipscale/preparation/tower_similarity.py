"""`flipscale prepare embed --compare`: the similarity of two towers on the same pairs, before anything is trained."""

from pathlib import Path

import numpy as np

from flipscale.data.features import PrecomputedFeatures, read_about, stored_sizes
from flipscale.data.randomness import keyed_uniform
from flipscale.io.errors import UserError


def linear_cka(first: np.ndarray, second: np.ndarray) -> float:
    """Return the linear centered kernel alignment (arXiv 1905.00414) of features of the same n samples, `(n, width)`.

    HSIC is the unbiased estimate (Song et al., JMLR 2012, eq. 5). So unrelated features give about 0, and features that
    are rotated and scaled give 1. The memory is that of the features in float64.
    """
    # Means change no HSIC. Without them, float64 keeps more digits.
    x, y = (rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64) for rows in (first, second))
    return float(_hsic(x, y) / np.sqrt(_hsic(x, x) * _hsic(y, y)))


def _hsic(x: np.ndarray, y: np.ndarray) -> float:
    """Return n (n - 3) times the unbiased HSIC, by products of features in place of Gram matrices."""
    n, x_squares, y_squares = len(x), (x**2).sum(axis=1), (y**2).sum(axis=1)
    x_sums, y_sums = x @ x.sum(axis=0) - x_squares, y @ y.sum(axis=0) - y_squares
    products = ((x.T @ y) ** 2).sum() - x_squares @ y_squares
    return float(products + x_sums.sum() * y_sums.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (x_sums @ y_sums))


def compare_towers(first: Path, second: Path, most_pairs: int = 4096) -> tuple[float, int]:
    """Return the linear CKA of stored features, `FOLDER/images` or `FOLDER/texts`, and the number of compared pairs.

    A keyed random sample of `most_pairs` is compared. Shards are read one at a time. Pairs that a tower could not embed
    are left out. Raise UserError if the folders hold other shards, crops, fewer than four pairs in common, or equal
    features.
    """
    made_of = []
    for path in (first, second):
        about = read_about(path.parent)
        if path.name not in about:
            raise UserError(f"--compare is {path}; expected stored features, FOLDER/images or FOLDER/texts")
        made_of.append((about["shards_digest"], "crops" in about[path.name]))
    if made_of[0] != made_of[1] or made_of[0][1]:
        raise UserError(
            f"--compare is {first} {second}; expected features of the same shards in order, embedded without --crops"
        )
    sizes = stored_sizes(first.parent, first.name)
    towers = [PrecomputedFeatures(path.parent, path.name, sizes) for path in (first, second)]
    draws, rows = np.empty(0), [np.empty((0, tower.width), np.float16) for tower in towers]
    for shard, size in enumerate(sizes):
        new = keyed_uniform(0, f"compared pairs of shard {shard}", np.arange(size), 1)[:, 0]
        numbers = np.flatnonzero(new < draws[-1]) if len(draws) == most_pairs else np.arange(size)
        read = [tower.rows(np.full(len(numbers), shard), numbers) for tower in towers]
        usable = ~(np.isnan(read[0][:, 0]) | np.isnan(read[1][:, 0]))
        draws = np.concatenate([draws, new[numbers[usable]]])
        lowest = np.argsort(draws, kind="stable")[:most_pairs]
        draws = draws[lowest]
        rows = [np.concatenate([old, more[usable]])[lowest] for old, more in zip(rows, read, strict=True)]
    if len(draws) < 4:
        raise UserError(f"--compare is {first} {second}, which have {len(draws)} pairs in common; CKA needs 4")
    for path, features in zip((first, second), rows, strict=True):
        if (features == features[0]).all():
            raise UserError(f"--compare is {path}, whose {len(draws)} pairs have equal features; CKA needs others")
    return linear_cka(*rows), len(draws)
