"""Crops and pixels, against the original's own and against Pillow."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flipscale.data.decode import (
    CROP_TRIES,
    DRAWS_PER_CROP,
    centre_box,
    decode_box,
    random_box,
    resize,
    visible_patches,
)
from flipscale.data.randomness import keyed_uniform

MEAN, STD = np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255


def encoded(image: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / 9 + phase) * np.cos(columns / 13 - phase) for phase in (0.0, 1.0, 2.0)]
    return (127 + 100 * np.stack(waves, axis=2)).astype(np.uint8)


def test_random_boxes_have_the_original_s_distribution() -> None:
    draws = keyed_uniform(0, "crop", np.arange(4000), DRAWS_PER_CROP)
    boxes = np.array([random_box(300, 400, row, 224, (0.5, 1.0)) for row in draws])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= 300).all()
    assert (boxes[:, 1] + boxes[:, 3] <= 400).all()
    area, ratio = boxes[:, 2] * boxes[:, 3] / 120000, boxes[:, 3] / boxes[:, 2]
    assert 0.49 < area.min() < 0.52
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35
    # All offsets that fit are possible, the last included.
    assert (boxes[:, 0] + boxes[:, 2] == 300).any()


def test_an_image_that_no_crop_fits_gets_the_centre() -> None:
    assert random_box(10, 1000, np.full(DRAWS_PER_CROP, 0.99), 224, (0.5, 1.0)) == centre_box(10, 1000, 224, padding=32)
    assert CROP_TRIES == 10


# Mean difference in grey levels of 255, measured: evaluation, training. The fixture's pictures are full of sharp edges.
# Evaluation differs mostly because the original's resize is not centred on pixels (it takes source = i * scale).
FROM_ORIGINAL = {"0": (17.1, 4.9), "1": (6.6, 1.4), "2": (3.4, 1.5)}


@pytest.mark.parametrize("case", FROM_ORIGINAL)
def test_difference_from_the_original_s_preprocessing(case: str) -> None:
    """Our antialiased bicubic against the original's aliasing one, on its own JPEGs: one picture, other pixels."""
    fixture = np.load(Path(__file__).parent.parent / "fixtures/parity/preprocess.npz")
    jpeg = fixture[f"{case}_jpeg"].tobytes()
    on_eval = np.abs(decode_box(jpeg, None, 48, (1.0, 1.0)) - (fixture[f"{case}_eval48"] * STD + MEAN)).mean()

    top, left, height, width = fixture[f"{case}_train_window_yxhw"].tolist()
    crop = np.asarray(Image.open(io.BytesIO(jpeg)))[top : top + height, left : left + width]
    assert np.abs(crop.astype(int) - fixture[f"{case}_train48_cropdec"]).mean() < 2.0
    in_training = np.abs(resize(crop, 48) - (fixture[f"{case}_train48"] * STD + MEAN)).mean()
    assert (on_eval, in_training) == pytest.approx(FROM_ORIGINAL[case], abs=0.2)


@pytest.mark.parametrize("size", [40, 64, 90])
def test_dct_scaled_crops_are_where_whole_ones_are(size: int) -> None:
    """A random crop of a JPEG and of the same picture as PNG: at most half a pixel apart."""
    picture = smooth(400, 507)
    draws = keyed_uniform(0, "crop", np.arange(30), DRAWS_PER_CROP)
    jpeg, png = encoded(picture, "JPEG", quality=98, subsampling=0), encoded(picture)
    for row in draws:
        ours, whole = (decode_box(data, row, size, (0.5, 1.0)).astype(float) for data in (jpeg, png))
        slope = np.abs(np.diff(whole, axis=0)).mean() + np.abs(np.diff(whole, axis=1)).mean()
        assert np.abs(ours - whole).mean() < 0.5 * slope + 1.5


@pytest.mark.parametrize("shape", [(30, 40), (16, 16), (1, 9)])
def test_resizes_as_torch_does_plane_by_plane(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (shape[0] + 4, shape[1] + 3, 3), np.uint8)
    for crop in (image[2:-2, 1:-2], np.ascontiguousarray(image[2:-2, 1:-2])):
        planes = torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)[None]))
        expected = torch.nn.functional.interpolate(planes, (16, 16), mode="bicubic", antialias=True)[0]
        resized = resize(crop, 16)
        assert resized.flags.c_contiguous
        assert np.array_equal(resized, expected.permute(1, 2, 0).numpy())


def test_patches_are_row_major_and_channel_first() -> None:
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    every = visible_patches(image, 4, None)
    assert every.shape == (4, 48)
    assert (every[1].reshape(3, 4, 4) == image[:4, 4:].transpose(2, 0, 1)).all()
    assert (visible_patches(image, 4, np.array([1, 3], dtype=np.int16)) == every[[1, 3]]).all()
