"""The trivial baselines: they find what looks alike, and nothing where nothing does."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from examples.demo.data import Drawing, Picture, write_pictures
from flipscale.evaluation import nearest_neighbour as neighbours
from flipscale.evaluation.nearest_neighbour import hog_features, nearest_neighbour, pixel_features, run_baselines
from flipscale.evaluation.suite import build_tasks

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 210)}
SHAPES = ("disc", "bar", "cross")
NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def draw(name: str, shift: int = 0) -> np.ndarray:
    """uint8 RGB `(64, 64, 3)` of a shape on white."""
    colour, shape = name.split()
    image = np.full((64, 64, 3), 255, np.uint8)
    centre = (32 + shift, 32)
    if shape == "disc":
        cv2.circle(image, centre, 20, COLOURS[colour], -1)
    else:
        cv2.line(image, (centre[0] - 22, 32), (centre[0] + 22, 32), COLOURS[colour], 10)
    if shape == "cross":
        cv2.line(image, (centre[0], 10), (centre[0], 54), COLOURS[colour], 10)
    return image


@pytest.fixture
def sets() -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray]:
    """Training images and captions, test images (a pixel or two aside) and labels."""
    train = np.stack([draw(name) for name in NAMES])
    test = np.stack([draw(name, shift) for name in NAMES for shift in (1, 2)])
    return train, list(NAMES), test, np.repeat(np.arange(len(NAMES)), 2)


@pytest.mark.parametrize("features", ["pixels", "pixels+hog"])
def test_finds_colour_and_shape(sets: tuple, features: str) -> None:
    """All of nine classes."""
    assert nearest_neighbour(*sets, NAMES, features) == 100.0


def test_hog_sees_shape_not_colour(sets: tuple) -> None:
    """The right shape always."""
    train, captions, test, labels = sets
    shapes = [name.split()[1] for name in captions]
    assert nearest_neighbour(train, shapes, test, labels % 3, SHAPES, "hog") == 100.0


def test_only_images_with_a_class_name_take_part(sets: tuple) -> None:
    """The very same picture under another caption does not count."""
    train, captions, test, labels = sets
    train, captions = np.concatenate([train, test]), captions + ["something else"] * len(test)
    assert nearest_neighbour(train, captions, test, labels, NAMES, "pixels") == 100.0


def test_features_have_the_documented_shapes() -> None:
    """Of images of any size."""
    images = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3)).astype(np.uint8)
    assert pixel_features(images).shape == (3, 768)
    hog = hog_features(images)
    assert hog.shape == (3, 1764)
    np.testing.assert_allclose(np.linalg.norm(hog.reshape(3, 49, 36), axis=2), 1, atol=0.01)


def test_hog_of_a_vertical_edge_points_across() -> None:
    """Its votes are for 0 degrees, in the two bins that share it."""
    image = np.zeros((1, 64, 64, 3), np.uint8)
    image[:, :, 32:] = 255
    votes = hog_features(image).reshape(7, 7, 4, 9).sum(axis=(0, 1, 2))
    assert votes[[0, 8]].sum() > 0.99 * votes.sum()


def test_hog_is_zero_where_nothing_changes() -> None:
    """No noise is amplified on an empty image."""
    assert not hog_features(np.full((1, 64, 64, 3), 255, np.uint8)).any()


@pytest.mark.parametrize("features", ["pixels", "hog", "pixels+hog"])
def test_more_training_images_than_the_memory_takes(
    sets: tuple, features: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Described four at a time and again for each pass, they give what they give at once."""
    train, captions, test, labels = sets
    train = np.concatenate([train, train, np.roll(train, 3, axis=1)])
    # No two are alike: between equal ones the rounding of the products would choose.
    train = train // 2 + np.random.default_rng(0).integers(0, 60, train.shape).astype(np.uint8)
    captions = captions + captions[::-1] + captions
    at_once = nearest_neighbour(train, captions, test, labels, NAMES, features)
    monkeypatch.setattr(neighbours, "_KNOWN_ROWS", 4)
    monkeypatch.setattr(neighbours, "_KEPT_BYTES", 0)
    assert nearest_neighbour(train, captions, test, labels, NAMES, features) == at_once


def test_unknown_features_and_foreign_captions_are_refused(sets: tuple) -> None:
    """Both messages say what to use."""
    train, captions, test, labels = sets
    with pytest.raises(ValueError, match="features 'colour' are unknown; use one of pixels, hog, pixels\\+hog"):
        nearest_neighbour(train, captions, test, labels, NAMES, "colour")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none of the 9 training captions is one of the 1 class names"):
        nearest_neighbour(train, captions, test, labels, ["zebra"], "pixels")


def test_run_baselines_reads_shards(tmp_path: Path) -> None:
    """Three ways to compare, as results of the task."""

    def pictures(shift: int) -> list[Picture]:
        found = []
        for name in NAMES:
            png = cv2.imencode(".png", cv2.cvtColor(draw(name, shift), cv2.COLOR_RGB2BGR))[1].tobytes()
            found.append(Picture(Drawing("artist", name, name, named=True, flag=False, svg=""), png))
        return found

    write_pictures(tmp_path / "train", pictures(0), 2)
    write_pictures(tmp_path / "test", pictures(1), 1, NAMES)
    (task,) = build_tasks([{"kind": "zero_shot", "data": str(tmp_path / "test"), "name": "shapes"}])
    found = {result.who: result for result in run_baselines(tmp_path / "train", task)}
    assert list(found) == [
        "nearest image, 16x16 pixels",
        "nearest image, HOG",
        "nearest image, pixels and HOG",
    ]
    for who in ("nearest image, 16x16 pixels", "nearest image, pixels and HOG"):
        assert (found[who].name, found[who].value, found[who].n) == ("shapes/top1", 100.0, 9)
    (tmp_path / "test" / "classnames.txt").unlink()
    with pytest.raises(ValueError, match=r"classnames\.txt is missing"):
        run_baselines(tmp_path / "train", task)
