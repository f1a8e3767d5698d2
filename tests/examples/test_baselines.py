"""Baselines without learning: the nearest training image by pixels and by histograms of gradients."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from evaluation.made_up_sets import png, write_samples

from examples.demo.baselines import PLAIN, Described, main, nearest_classes, run_baselines
from flipscale.evaluation.results import read_baselines
from flipscale.evaluation.suite import build_tasks

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 210)}
SHAPES = ("disc", "bar", "cross")
NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def draw(name: str, shift: int = 0) -> np.ndarray:
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


def describe(images: np.ndarray) -> Described:
    return {name: features(images) for name, features in PLAIN.items()}


def test_pixels_find_colour_and_hog_finds_shape() -> None:
    known = np.stack([draw(name) for name in NAMES])
    asked = np.stack([draw(name, shift) for name in NAMES for shift in (1, 2)])
    for chunk in (2, 9):
        parts = [(describe(known[at : at + chunk]), np.arange(9)[at : at + chunk]) for at in range(0, 9, chunk)]
        found, labels = nearest_classes(lambda parts=parts: iter(parts), describe(asked)), np.repeat(np.arange(9), 2)
        assert list(found) == ["16x16 pixels", "HOG", "pixels and HOG"]
        assert found["16x16 pixels"].tolist() == found["pixels and HOG"].tolist() == labels.tolist()
        assert (found["HOG"] % 3 == labels % 3).all()


def write_drawings(folder: Path, shift: int, captions: list[str]) -> Path:
    samples = (
        {"png": png(draw(name, shift)), "txt": caption.encode(), "cls": str(number).encode()}
        for number, (name, caption) in enumerate(zip(NAMES, captions, strict=True))
    )
    return write_samples(folder, samples)


def test_training_images_that_cannot_be_read_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    test = write_drawings(tmp_path / "test", 0, NAMES)
    (test / "classnames.txt").write_text("\n".join(NAMES))
    (task,) = build_tasks([{"kind": "zero_shot", "data": str(test), "name": "shapes"}])
    train = write_samples(
        tmp_path / "train",
        (
            {"png": png(draw(name, 0)) if number else b"no picture", "txt": f"{name}\n".encode()}
            for number, name in enumerate(NAMES)
        ),
    )
    assert run_baselines(train, task)[0].value == pytest.approx(100 * 8 / 9)
    assert "1 of 9 samples cannot be read" in caplog.text
    bad = write_samples(tmp_path / "bad", ({"png": b"no picture", "txt": name.encode()} for name in NAMES))
    with pytest.raises(ValueError, match="none of the 9 training images"):
        run_baselines(bad, task)


def test_baselines_of_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only training images whose caption is a class name take part."""
    test = write_drawings(tmp_path / "test", 1, NAMES)
    (test / "classnames.txt").write_text("\n".join(NAMES))
    (task,) = build_tasks([{"kind": "zero_shot", "data": str(test), "name": "shapes"}])
    results = {result.who: result for result in run_baselines(write_drawings(tmp_path / "all", 0, NAMES), task)}
    assert list(results) == ["nearest image, 16x16 pixels", "nearest image, HOG", "nearest image, pixels and HOG"]
    for who in ("nearest image, 16x16 pixels", "nearest image, pixels and HOG"):
        assert (results[who].name, results[who].value, results[who].n) == ("shapes/top1", 100.0, 9)
    main([str(tmp_path / "all"), str(test), str(tmp_path / "file.jsonl"), "--task", "shapes"])
    assert read_baselines(tmp_path / "file.jsonl") == list(results.values())
    assert "nearest image, 16x16 pixels: 100.0 % (70.1 to 100.0)" in capsys.readouterr().out
    few = write_drawings(tmp_path / "few", 1, [NAMES[0], *["a drawing"] * 8])
    assert run_baselines(few, task)[0].value == pytest.approx(100 / 9)
    with pytest.raises(ValueError, match=r"none of the 9 training captions is one of the 9 class names"):
        run_baselines(write_drawings(tmp_path / "none", 0, ["a drawing"] * 9), task)
    (test / "classnames.txt").unlink()
    with pytest.raises(ValueError, match=r"classnames\.txt is missing"):
        run_baselines(tmp_path / "all", task)
