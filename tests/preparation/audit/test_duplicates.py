"""The search for near duplicates, against plain comparison of all with all, and planted copies of photographs."""

import random

import cv2
import numpy as np
import pytest
from preparation.audit.test_audit import copy, photos

from flipscale.data.decode import decode_small
from flipscale.preparation.audit.duplicates import (
    LEAST_LIKENESS,
    MOST_BITS,
    exact_copies,
    likeness,
    look,
    near_hashes,
    thumbnail,
)

LEAST_SIDE = 64


def neighbours(count: int) -> np.ndarray:
    """Hashes of which many differ in a few bits, and some in none."""
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 2**63, count // 4, dtype=np.uint64)
    flips = [np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, n).astype(np.uint64)) for n in (1, 4, 7, 9, 12)]
    return np.concatenate([centres, centres, *(centres[: count // 10] ^ flip for flip in flips)])


def test_near_hashes_are_all_pairs_each_once() -> None:
    hashes = neighbours(800)
    differ = np.bitwise_count(hashes[:, None] ^ hashes[None])
    wanted = {(one, other) for one, other in np.argwhere(differ <= MOST_BITS).tolist() if one < other}
    found = [pair for some in near_hashes(hashes) for pair in zip(*(side.tolist() for side in some), strict=True)]
    assert len(found) == len(set(found))
    assert set(found) == wanted
    assert len(wanted) > 500

    some, rest = hashes[::3], hashes[1::3]
    wanted = set(map(tuple, np.argwhere(np.bitwise_count(some[:, None] ^ rest[None]) <= MOST_BITS).tolist()))
    assert {
        pair for found in near_hashes(some, rest) for pair in zip(*(s.tolist() for s in found), strict=True)
    } == wanted


def test_exact_copies() -> None:
    digests = np.array([5, 7, 5, 9, 5, 7], dtype=np.uint64)
    assert exact_copies(digests, np.array([1, 0, 1, 1, 1, 1], bool)).tolist() == [0, 1, 0, 3, 0, 5]


def test_planted_copies_of_photographs_are_found() -> None:
    """Copies of 0.3 to 1.5 times the size, as JPEG and WebP of quality 30 to 95."""
    draw, seen = random.Random(0), []
    found = []
    for image in photos(160, 0):
        pixels = decode_small(copy(image), LEAST_SIDE)
        (code, is_blank), small = look(pixels), thumbnail(pixels)
        if is_blank:
            continue
        seen.append((code, small))
        for _ in range(20):
            similar = copy(image, draw.uniform(0.3, 1.5), draw.choice(["JPEG", "WEBP"]), draw.randint(30, 95))
            pixels = decode_small(similar, LEAST_SIDE)
            near = (look(pixels)[0] ^ code).bit_count() <= MOST_BITS
            found.append(near and likeness(small, thumbnail(pixels)) >= LEAST_LIKENESS)
    assert len(found) > 200
    assert np.mean(found) >= 0.99
    pairs = [(one, other) for at, one in enumerate(seen) for other in seen[:at]]
    assert not any((a[0] ^ b[0]).bit_count() <= MOST_BITS and likeness(a[1], b[1]) > LEAST_LIKENESS for a, b in pairs)


@pytest.mark.parametrize(("colour", "is_blank"), [((255, 255, 255), True), ((3, 90, 40), True), (None, False)])
def test_nearly_blank_images(colour: tuple[int, int, int] | None, is_blank: bool) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    if colour is not None:
        pixels = np.full((64, 64, 3), colour, dtype=np.uint8)
    assert look(pixels)[1] is is_blank


def test_likeness_tells_a_small_difference_apart() -> None:
    face = np.full((32, 32, 3), 255, dtype=np.uint8)
    cv2.circle(face, (16, 16), 12, (255, 200, 40), -1)
    other = face.copy()
    cv2.rectangle(other, (11, 19), (21, 23), (60, 30, 20), -1)
    assert likeness(face, face) == pytest.approx(1)
    assert likeness(face, other) == 0
    grey = np.full_like(face, 128)
    assert likeness(grey, grey) == 1
    assert likeness(face, (face // 2)) < LEAST_LIKENESS  # its correlation is 1
