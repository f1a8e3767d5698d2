"""A baseline without learning for a classification set: the name of the training image that looks most alike.

It is printed beside a small model's accuracy, because with few pictures and minutes of training it is hard to beat.
Only training images whose caption is a class name take part, which is more than the model is told.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np

from flipscale.data.decode import decode_box
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.images import SampleNumbers
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet
from flipscale.io.errors import UserError

Features = Literal["pixels", "hog", "pixels+hog"]

PIXEL_SIZE, HOG_SIZE = 16, 64
CELL, BINS = 8, 9  # Dalal and Triggs 2005: cells of 8 x 8 px, 9 orientations, blocks of 2 x 2 cells
HOG_CLIP = 0.2
HOG_WEIGHT = 2.0  # beside the pixels, each of which then counts for as much as it varies
_ROWS = 256  # images at a time, to bound the memory
_KNOWN_ROWS = 1024  # training images at a time
_KEPT_BYTES = 1 << 29  # of the features of training images, 10 kB each


def pixel_features(images: np.ndarray) -> np.ndarray:
    """Return float32 `(n, 768)`: images uint8 `(n, s, s, 3)` shrunk to 16 x 16, 1 for white."""
    small = [cv2.resize(image, (PIXEL_SIZE, PIXEL_SIZE), interpolation=cv2.INTER_AREA) for image in images]
    return np.stack(small).reshape(len(images), -1).astype(np.float32) / 255


def hog_features(images: np.ndarray) -> np.ndarray:
    """Return float32 `(n, 1764)`: histograms of oriented gradients of images uint8 `(n, s, s, 3)` at 64 x 64."""
    return np.concatenate([_hog(images[start : start + _ROWS]) for start in range(0, len(images), _ROWS)])


def _hog(images: np.ndarray) -> np.ndarray:
    resized = np.stack([cv2.resize(image, (HOG_SIZE, HOG_SIZE), interpolation=cv2.INTER_AREA) for image in images])
    padded = np.pad(resized.astype(np.float32), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    across = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    # The gradient of the colour that changes most.
    power = across**2 + down**2
    strongest = power.argmax(axis=3)[..., None]
    across, down, power = (np.take_along_axis(a, strongest, axis=3)[..., 0] for a in (across, down, power))
    magnitude = np.sqrt(power)

    # Each pixel votes for the two orientations nearest to its own, in its cell.
    place = np.arctan2(down, across) % np.pi / np.pi * BINS - 0.5
    lower = np.floor(place)
    share = place - lower
    bins = lower.astype(np.int64) % BINS
    count, cells = len(images), HOG_SIZE // CELL
    image, row, column = np.ogrid[:count, :HOG_SIZE, :HOG_SIZE]
    cell = ((image * cells + row // CELL) * cells + column // CELL) * BINS
    size = count * cells * cells * BINS
    votes = np.bincount((cell + bins).ravel(), (magnitude * (1 - share)).ravel(), size)
    votes += np.bincount((cell + (bins + 1) % BINS).ravel(), (magnitude * share).ravel(), size)

    grid = votes.reshape(count, cells, cells, BINS)
    blocks = np.concatenate([grid[:, :-1, :-1], grid[:, :-1, 1:], grid[:, 1:, :-1], grid[:, 1:, 1:]], axis=-1)
    blocks /= np.linalg.norm(blocks, axis=-1, keepdims=True) + 1.0
    blocks = np.minimum(blocks, HOG_CLIP)
    blocks /= np.linalg.norm(blocks, axis=-1, keepdims=True) + 1e-3
    return blocks.reshape(count, -1).astype(np.float32)


def _describe(images: np.ndarray) -> dict[str, np.ndarray]:
    return {"pixels": pixel_features(images), "hog": hog_features(images)}


# The features of some known images, and their classes, int64 `(n,)`.
Known = tuple[dict[str, np.ndarray], np.ndarray]


class _Described:
    """Known images with their features, some at a time. As many as `_KEPT_BYTES` holds are described once, the others
    each time that they are gone through."""

    def __init__(self, images: Callable[[int, int], np.ndarray], classes: np.ndarray):
        """Describe the images of `classes`; `images` returns those from one number to below another."""
        self._starts = range(0, len(classes), _KNOWN_ROWS)
        self._images, self._classes = images, classes
        self._kept: dict[int, dict[str, np.ndarray]] = {}
        self._num_bytes = 0

    def __iter__(self) -> Iterator[Known]:
        for start in self._starts:
            stop = min(start + _KNOWN_ROWS, len(self._classes))
            found = self._kept.get(start)
            if found is None:
                found = _describe(self._images(start, stop))
                self._num_bytes += sum(features.nbytes for features in found.values())
                if self._num_bytes <= _KEPT_BYTES:
                    self._kept[start] = found
            yield found, self._classes[start:stop]


def _scales(known: Iterable[Known], features: Features) -> dict[str, float]:
    """Return the weight of each kind of features: of pixels and HOG together each counts for as much as it varies."""
    if features != "pixels+hog":
        return {features: 1.0}
    weights = {"pixels": 1.0, "hog": HOG_WEIGHT}
    count, totals, squares = dict.fromkeys(weights, 0), dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)
    for described, _ in known:
        for key in weights:
            values = described[key].astype(np.float64)
            count[key] += values.size
            totals[key] += float(values.sum())
            squares[key] += float(np.square(values).sum())
    scales = {}
    for key, weight in weights.items():
        mean = totals[key] / count[key]
        deviation = max(squares[key] / count[key] - mean**2, 0.0) ** 0.5
        scales[key] = weight / (deviation * described[key].shape[1] ** 0.5 + 1e-12)
    return scales


def _top1(known: Iterable[Known], asked: dict[str, np.ndarray], labels: np.ndarray, features: Features) -> float:
    """Return the top-1 in percent of described images."""
    scales = _scales(known, features)
    queries = np.hstack([asked[key] * np.float32(scale) for key, scale in scales.items()])
    best, answers = np.full(len(queries), np.inf, np.float32), np.full(len(queries), -1)
    for described, classes in known:
        rows = np.hstack([described[key] * np.float32(scale) for key, scale in scales.items()])
        # |a - b|^2 without |a|^2, which is the same for all b.
        distances = (rows**2).sum(axis=1) - 2 * queries @ rows.T
        places = distances.argmin(axis=1)
        found = distances[np.arange(len(queries)), places]
        nearer = found < best
        best[nearer], answers[nearer] = found[nearer], classes[places[nearer]]
    return 100.0 * float((answers == labels).mean())


def _named(captions: Sequence[str], classnames: Sequence[str]) -> np.ndarray:
    """Return the class of each caption, -1 where it is none of them."""
    index = {name: number for number, name in enumerate(classnames)}
    found = np.array([index.get(caption, -1) for caption in captions])
    if not (found >= 0).any():
        raise UserError(
            f"none of the {len(captions)} training captions is one of the {len(classnames)} class names, so a nearest "
            "neighbour has no name to give; use training shards whose captions are the class names"
        )
    return found


def nearest_neighbour(
    train_images: np.ndarray,
    train_captions: Sequence[str],
    test_images: np.ndarray,
    test_labels: np.ndarray,
    classnames: Sequence[str],
    features: Features,
) -> float:
    """Return the top-1 in percent when a test image takes the caption of the nearest training image that has a class
    name.

    Args:
        train_images: uint8 `(n, s, s, 3)`.
        train_captions: one a training image.
        test_images: uint8 `(m, s, s, 3)`.
        test_labels: `(m,)`, indices of `classnames`.
        classnames: the names of the classes.
        features: by what images are compared, in Euclidean distance.

    Raises:
        ValueError: no caption is a class name, or unknown features.
    """
    if features not in get_args(Features):
        raise UserError(f"features {features!r} are unknown; use one of {', '.join(get_args(Features))}")
    names = _named(train_captions, classnames)
    images = train_images[names >= 0]
    known = _Described(lambda start, stop: images[start:stop], names[names >= 0])
    return _top1(known, _describe(test_images), test_labels, features)


def run_baselines(train: str | Path, task: Task) -> list[Result]:
    """Return the top-1 of the nearest training image by pixels, by HOG and by both, as results of a zero-shot task.

    Args:
        train: the training shards: a folder, a glob or a range.
        task: whose `data` is a folder of classification shards with `classnames.txt`.

    Raises:
        ValueError: a shard or a file that is missing, or no training caption that is a class name.
    """
    test_set = TestSet.open(task.data)
    source = TarSource(str(train))
    samples = SampleNumbers(source)
    classes = _named([_caption(source, *samples[row]) for row in range(len(samples))], test_set.class_names())
    named = np.flatnonzero(classes >= 0).tolist()
    known = _Described(lambda start, stop: _pictures(source, named[start:stop]), classes[named])
    every_row = range(len(test_set))
    asked = _describe(_pictures(test_set.source, every_row))
    places = SampleNumbers(test_set.source)
    labels = np.array([test_set.source.read_label(*places[row]) for row in every_row])
    every: dict[str, Features] = {
        "nearest image, 16x16 pixels": "pixels",
        "nearest image, HOG": "hog",
        "nearest image, pixels and HOG": "pixels+hog",
    }
    found = []
    for name, features in every.items():
        top1 = _top1(known, asked, labels, features)
        hits = round(top1 * len(labels) / 100.0)
        found.append(replace(task.proportion("top1", hits, len(labels)), who=name))
    return found


def _caption(source: TarSource, shard: int, number: int) -> str:
    """Return the first caption of a sample; of one without, the empty text."""
    return next((caption.decode("utf-8", "replace") for caption in source.read_captions(shard, number)), "")


def _pictures(source: TarSource, rows: Sequence[int]) -> np.ndarray:
    """Return the images of some rows at 64 x 64, uint8 `(rows, 64, 64, 3)`."""
    samples = SampleNumbers(source)
    images = [decode_box(source.read(*samples[row]).image, None, HOG_SIZE, (1.0, 1.0)) for row in rows]
    return np.stack(images) if images else np.zeros((0, HOG_SIZE, HOG_SIZE, 3), np.uint8)
