"""A baseline without learning for a classification set: the name of the training image that looks most alike.

It is printed beside a small model's accuracy, because with few pictures and minutes of training it is hard to beat.
Only training images whose caption is a class name take part, which is more than the model is told.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np

from flipscale.data.decode import decode_box
from flipscale.data.sources.tar_source import TarSource
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet

Features = Literal["pixels", "hog", "pixels+hog"]

PIXEL_SIZE, HOG_SIZE = 16, 64
CELL, BINS = 8, 9  # Dalal and Triggs 2005: cells of 8 x 8 px, 9 orientations, blocks of 2 x 2 cells
HOG_CLIP = 0.2
HOG_WEIGHT = 2.0  # beside the pixels, each of which then counts for as much as it varies
_ROWS = 256  # images at a time, to bound the memory


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


def _top1(
    known: dict[str, np.ndarray],
    names: np.ndarray,
    asked: dict[str, np.ndarray],
    labels: np.ndarray,
    features: Features,
) -> float:
    """Return the top-1 in percent of described images; `names` are the classes of the known ones."""
    if features == "pixels+hog":
        scales = {"pixels": 1.0, "hog": HOG_WEIGHT}
        scales = {
            key: weight / (known[key].std() * known[key].shape[1] ** 0.5 + 1e-12) for key, weight in scales.items()
        }
        rows, queries = (np.hstack([side[key] * scales[key] for key in scales]) for side in (known, asked))
    else:
        rows, queries = known[features], asked[features]
    # |a - b|^2 without |a|^2, which is the same for all b.
    distances = (rows**2).sum(axis=1) - 2 * queries @ rows.T
    return 100.0 * float((names[distances.argmin(axis=1)] == labels).mean())


def _named(captions: Sequence[str], classnames: Sequence[str]) -> np.ndarray:
    """Return the class of each caption, -1 where it is none of them."""
    index = {name: number for number, name in enumerate(classnames)}
    found = np.array([index.get(caption, -1) for caption in captions])
    if not (found >= 0).any():
        raise ValueError(
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
        raise ValueError(f"features {features!r} are unknown; use one of {', '.join(get_args(Features))}")
    names = _named(train_captions, classnames)
    known, asked = _describe(train_images[names >= 0]), _describe(test_images)
    return _top1(known, names[names >= 0], asked, test_labels, features)


def run_baselines(train: str | Path, task: Task) -> list[Result]:
    """Return the top-1 of the nearest training image by pixels, by HOG and by both, as results of a zero-shot task.

    Args:
        train: the training shards: a folder, a glob or a range.
        task: whose `data` is a folder of classification shards with `classnames.txt`.

    Raises:
        ValueError: a shard or a file that is missing, or no training caption that is a class name.
    """
    test_set = TestSet.open(task.data)
    classnames = test_set.class_names()
    images, captions, _ = _read(TarSource(str(train)), set(classnames))
    known_names = _named(captions, classnames)
    known = _describe(images)
    images, _, labels = _read(test_set.source)
    asked = _describe(images)
    every: dict[str, Features] = {
        "nearest image, 16x16 pixels": "pixels",
        "nearest image, HOG": "hog",
        "nearest image, pixels and HOG": "pixels+hog",
    }
    found = []
    for name, features in every.items():
        top1 = _top1(known, known_names, asked, np.array(labels), features)
        hits = round(top1 * len(labels) / 100.0)
        found.append(replace(task.proportion("top1", hits, len(labels)), who=name))
    return found


def _read(source: TarSource, wanted: set[str] | None = None) -> tuple[np.ndarray, list[str], list[int]]:
    """Return images at 64 x 64, captions and labels (-1 where there is none); only of the captions `wanted`, if
    given."""
    images, captions, labels = [], [], []
    for shard, size in enumerate(source.shard_sizes):
        for number in range(size):
            sample = source.read(shard, number)
            caption = (sample.caption or b"").decode("utf-8", "replace")
            if wanted is None or caption in wanted:
                images.append(decode_box(sample.image, None, HOG_SIZE, (1.0, 1.0)))
                captions.append(caption)
                labels.append(-1 if sample.label is None else sample.label)
    empty = np.zeros((0, HOG_SIZE, HOG_SIZE, 3), np.uint8)
    return np.stack(images) if images else empty, captions, labels
