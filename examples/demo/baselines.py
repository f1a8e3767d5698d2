"""Classify a test set without learning: each image gets the name of the nearest training image, by pixels and by HOG.

python examples/demo/baselines.py data/demo/train data/demo/test data/demo_baselines.jsonl

The nearest training image is hard to beat with few pictures and minutes of training. It uses only training images whose
caption is a class name, which a model is not told.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from flipscale.data.captions import choose_caption
from flipscale.data.decode import decode_box
from flipscale.data.samples import BadSample, MissingCaption, SampleNumbers
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.results import Result
from flipscale.evaluation.suite import build_tasks
from flipscale.evaluation.test_set import TestSet
from flipscale.io import json_lines
from flipscale.io.command_line import parse_command
from flipscale.io.errors import UserError
from flipscale.process.console import report_user_errors, start_logging

PIXEL_SIZE, HOG_SIZE = 16, 64
CELL, BINS = 8, 9  # Dalal and Triggs 2005: cells of 8 x 8 px, 9 orientations, blocks of 2 x 2 cells
HOG_CLIP = 0.2
HOG_WEIGHT = 2.0  # relative to pixels, after both are scaled to the same variation
_ROWS = 256  # images at a time, which bounds the memory
_KNOWN_ROWS = 1024  # training images at a time

_log = logging.getLogger("flipscale.examples.baselines")

# Pixel and HOG features of some images.
Described = dict[str, np.ndarray]


def pixel_features(images: np.ndarray) -> np.ndarray:
    """Return images uint8 `(n, s, s, 3)` shrunk to 16 x 16, 1 for white: float32 `(n, 768)`."""
    small = [cv2.resize(image, (PIXEL_SIZE, PIXEL_SIZE), interpolation=cv2.INTER_AREA) for image in images]
    return np.stack(small).reshape(len(images), -1).astype(np.float32) / 255


def hog_features(images: np.ndarray) -> np.ndarray:
    """Return histograms of oriented gradients of images uint8 `(n, s, s, 3)` at 64 x 64: float32 `(n, 1764)`."""
    return np.concatenate([_hog(images[start : start + _ROWS]) for start in range(0, len(images), _ROWS)])


def _hog(images: np.ndarray) -> np.ndarray:
    resized = np.stack([cv2.resize(image, (HOG_SIZE, HOG_SIZE), interpolation=cv2.INTER_AREA) for image in images])
    padded = np.pad(resized.astype(np.float32), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    across = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    # The colour with the strongest gradient, as in Dalal and Triggs.
    power = across**2 + down**2
    strongest = power.argmax(axis=3)[..., None]
    across, down, power = (np.take_along_axis(a, strongest, axis=3)[..., 0] for a in (across, down, power))
    magnitude = np.sqrt(power)

    # Each pixel votes for the two nearest orientations, in its cell.
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


PLAIN: dict[str, Callable[[np.ndarray], np.ndarray]] = {"pixels": pixel_features, "hog": hog_features}


def run_baselines(train: str | Path, task: Task) -> list[Result]:
    """Return the top-1 of the nearest training image by pixels, by HOG and by both, as results of a zero-shot task.

    Training samples that cannot be read are left out and counted in a warning, as training replaces them. Raise
    UserError if no caption is a class name, no training image can be decoded, or a test sample cannot be read.
    """
    test_set, source = TestSet.open(task.data), TarSource(str(train))
    class_names, samples = test_set.class_names(), SampleNumbers(source)
    numbers = {name: number for number, name in enumerate(class_names)}
    bad: set[int] = set()

    def class_of(row: int) -> int:
        try:
            return numbers.get(choose_caption(source.read_captions(*samples[row]), 0.0), -1)
        except MissingCaption:
            return -1
        except BadSample:
            bad.add(row)
            return -1

    classes = np.array([class_of(row) for row in range(len(samples))])
    rows = np.flatnonzero(classes >= 0)
    if not len(rows):
        raise UserError(
            f"none of the {len(classes)} training captions is one of the {len(class_names)} class names, so the "
            "nearest image has no name; use training shards whose captions are the class names"
        )

    def picture(row: int) -> np.ndarray | None:
        try:
            return _decoded(source.read(*samples[row]).image)
        except BadSample:
            bad.add(row)
            return None

    def known() -> Iterator[tuple[Described, np.ndarray]]:
        for start in range(0, len(rows), _KNOWN_ROWS):
            pictures = {row: found for row in rows[start : start + _KNOWN_ROWS] if (found := picture(row)) is not None}
            if pictures:
                yield _features(list(pictures.values())), classes[list(pictures)]
        if bad.issuperset(rows):
            raise UserError(f"none of the {len(rows)} training images of a class can be decoded; write {train} again")

    places = SampleNumbers(test_set.source)
    labels = np.array([test_set.source.read_label(*places[row]) for row in range(len(places))])
    asked = _features([_decoded(test_set.source.read(*places[row]).image) for row in range(len(places))])
    answers = nearest_classes(known, asked)
    if bad:
        _log.warning("%s: %d of %d samples cannot be read and are no nearest image", train, len(bad), len(samples))
    return [
        replace(task.proportion("top1", int((answer == labels).sum()), len(labels)), who=f"nearest image, {name}")
        for name, answer in answers.items()
    ]


def nearest_classes(
    known: Callable[[], Iterator[tuple[Described, np.ndarray]]], asked: Described
) -> dict[str, np.ndarray]:
    """Return the class of the nearest known image for each asked image, by pixels, by HOG and by both.

    Args:
        known: function that yields features and classes of known images, chunk by chunk. It is called twice, because
            the chunks of a large set do not fit into memory together.
    """
    compared: dict[str, dict[str, float]] = {
        "16x16 pixels": {"pixels": 1.0},
        "HOG": {"hog": 1.0},
        "pixels and HOG": _scales(known()),
    }

    def joined(features: Described, scales: dict[str, float]) -> np.ndarray:
        return np.hstack([features[key] * np.float32(scale) for key, scale in scales.items()])

    count = len(asked["pixels"])
    best = {name: np.full(count, np.inf, np.float32) for name in compared}
    answers = {name: np.full(count, -1) for name in compared}
    for described, classes in known():
        for name, scales in compared.items():
            queries, rows = joined(asked, scales), joined(described, scales)
            # |a - b|^2 without |a|^2, which is the same for all b.
            distances = (rows**2).sum(axis=1) - 2 * queries @ rows.T
            places = distances.argmin(axis=1)
            least = distances[np.arange(count), places]
            nearer = least < best[name]
            best[name][nearer], answers[name][nearer] = least[nearer], classes[places[nearer]]
    return answers


def _scales(known: Iterator[tuple[Described, np.ndarray]]) -> dict[str, float]:
    weights = {"pixels": 1.0, "hog": HOG_WEIGHT}
    # Numbers, their sum and the sum of their squares.
    sums, dims, scales = {key: np.zeros(3) for key in weights}, dict.fromkeys(weights, 0), dict[str, float]()
    for described, _ in known:
        for key in weights:
            values = described[key].astype(np.float64)
            sums[key] += values.size, values.sum(), np.square(values).sum()
            dims[key] = values.shape[1]
    for key, weight in weights.items():
        count, total, squares = sums[key].tolist()
        deviation = max(squares / count - (total / count) ** 2, 0.0) ** 0.5
        scales[key] = weight / (deviation * dims[key] ** 0.5 + 1e-12)
    return scales


def _features(pictures: Sequence[np.ndarray]) -> Described:
    stacked = np.stack(pictures)
    return {name: features(stacked) for name, features in PLAIN.items()}


def _decoded(encoded: bytes) -> np.ndarray:
    return decode_box(encoded, None, HOG_SIZE, (1.0, 1.0))


@dataclass(frozen=True)
class Options:
    """Write the top-1 of the nearest training image by pixels, by HOG and by both, for `flipscale study race`.

    Args:
        train: Shards of training images.
        test: Folder of a zero-shot test set.
        out: The file for --baselines: a JSON line for each result.
        task: Name of this test among the recipe's tasks.
    """

    train: str
    test: str
    out: Path
    _: KW_ONLY
    task: str = "zero_shot"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the results, and write them to a file."""
    with report_user_errors():
        start_logging()
        options = parse_command(Options, arguments)
        (task,) = build_tasks([{"kind": "zero_shot", "data": options.test, "name": options.task}])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        results = run_baselines(options.train, task)
        json_lines.rewrite(options.out, map(asdict, results))
        for result in results:
            print(f"{result.who}: {result.estimate_text}")


if __name__ == "__main__":
    main()
