"""Labelled sets with a training and a test part, laid out as CLIP_benchmark's: scikit-learn's digits, for one."""

import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from flipscale.data.sources.tar_file import add_member
from flipscale.io.atomic import new_folder, write_text
from flipscale.io.errors import UserError

IMAGES_PER_SHARD = 2000
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGITS_TEST_EVERY = 5  # so that all ten digits and all stretches of writers are in both parts

# An encoded image, its extension, and the number of its class.
Labelled = tuple[bytes, str, int]


def write_labelled(
    directory: Path, class_names: Sequence[str], template: str, parts: Mapping[str, Iterable[Labelled]]
) -> dict[str, int]:
    """Write `directory/PART/N.tar` with KEY.png (or another kind) and KEY.cls, PART's `nshards.txt`, and beside the
    parts `classnames.txt` and the one prompt of `zeroshot_classification_templates.txt`. Return the images of each
    part."""
    counts = {}
    for part, samples in parts.items():
        (directory / part).mkdir(parents=True)
        every = list(samples)
        firsts = range(0, len(every), IMAGES_PER_SHARD)
        for shard, first in enumerate(firsts):
            with tarfile.open(directory / part / f"{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for number, (image, extension, label) in enumerate(every[first : first + IMAGES_PER_SHARD], first):
                    add_member(tar, f"s{number:07d}.{extension}", image)
                    add_member(tar, f"s{number:07d}.cls", str(label).encode())
        (directory / part / "nshards.txt").write_text(str(len(firsts)), encoding="utf-8")
        counts[part] = len(every)
    write_class_texts(directory, class_names, template)
    return counts


def write_class_texts(directory: Path, class_names: Sequence[str], template: str) -> None:
    """Write what lies beside the parts of a labelled set: the names of its classes, and one prompt."""
    write_text(directory / "classnames.txt", "".join(f"{name}\n" for name in class_names))
    write_text(directory / "zeroshot_classification_templates.txt", f"{template}\n")


def prepare_digits(directory: Path) -> dict[str, int]:
    """Write scikit-learn's 1,797 handwritten digits, dark on white, every fifth for testing; return the images of each
    part. They come with scikit-learn (UCI's Optical Recognition of Handwritten Digits, CC BY 4.0), so nothing is
    downloaded.

    Raises:
        ValueError: the folder is there already, or scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("scikit-learn, which holds the digits, is not installed; pip install scikit-learn") from error
    digits = load_digits()
    # 8 x 8 numbers from 0 to 16.
    pixels = 255 - np.rint(digits.images * (255 / 16)).astype(np.uint8)
    samples = [(_enlarged(image), "png", int(label)) for image, label in zip(pixels, digits.target, strict=True)]
    test = samples[::_DIGITS_TEST_EVERY]
    train = [sample for number, sample in enumerate(samples) if number % _DIGITS_TEST_EVERY]
    with new_folder(directory) as folder:
        return write_labelled(folder, DIGITS, 'a photo of the number: "{c}".', {"train": train, "test": test})


def _enlarged(image: np.ndarray) -> bytes:
    """Return the PNG of an 8 x 8 image at 32 x 32, so that a model's resizing has something to smooth."""
    large = cv2.resize(image, (32, 32), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".png", large)[1].tobytes()
