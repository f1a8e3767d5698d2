"""Write JPEGs of two sizes as shards, to measure loaders with.

    python benchmarks/photos.py data/photos

The JPEGs are crops of a few hundred photos in the Debian package of GCompris, with captions made of their names: good
for measuring speed, not for training.
"""

import argparse
import random
import re
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import cv2
import numpy as np

from flipscale.data.sources.tar import add_member
from flipscale.io.atomic import atomic_write
from flipscale.io.progress import each

PACKAGE = "gcompris-qt-data"
# Mean width and height, and JPEG quality: about 36 kB, near LAION at the usual sizes; and about 120 kB.
SIZES = {"500x400": (500, 400, 76), "1024x768": (1024, 768, 87)}
NUM_SHARDS = 8
_LEAST_SIDE = 400  # smaller pictures would be enlarged, and blurred images decode too fast


def prepare_photos(out_dir: Path, num_images: int) -> None:
    """Write `num_images` captioned JPEGs as tar shards to each of `out_dir`/500x400 and `out_dir`/1024x768.

    These are mean sizes. Widths, heights and offsets are drawn from a fixed seed, the first two within a fifth of the
    mean. A folder that exists is left as it is.

    Raises:
        OSError: apt cannot download or unpack the package.
    """
    missing = {name: size for name, size in SIZES.items() if not (out_dir / name).exists()}
    if not missing:
        print(f"{out_dir} is complete: nothing to do")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Unpacked without installing it.
        subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True)
        subprocess.run(["dpkg-deb", "-x", str(next(folder.glob("*.deb"))), "."], cwd=folder, check=True)
        pictures = list(_pictures(folder))
    assert pictures, f"the package {PACKAGE} of this system has no photos; use Debian 12 or later"
    for name, (width, height, quality) in missing.items():
        photos = _cut(pictures, num_images, width, height, quality)
        with atomic_write(out_dir / name) as folder:
            folder.mkdir(parents=True)
            num_bytes = _write(folder, each(photos, name, "images", num_images))
        print(f"{out_dir / name}: {num_images:,} JPEGs of {num_bytes / num_images / 1000:.1f} kB")


def _pictures(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and BGR pixels of each photo in the package."""
    for resources in sorted(folder.rglob("*.rcc")):
        try:
            files = list(_resource_files(resources.read_bytes()))
        except (struct.error, UnicodeDecodeError):
            continue  # another format of Qt's
        for path, content in files:
            if not path.endswith(".webp"):
                continue
            image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
            # Transparent pictures are drawings.
            if image is not None and image.shape[2:] == (3,) and min(image.shape[:2]) >= _LEAST_SIDE:
                yield re.sub(r"[^a-z]+", " ", Path(path).stem.lower()).strip() or "a picture", image


def _resource_files(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of each uncompressed file in a Qt resource container (`rcc`, formats 1 to 3)."""
    magic, version, tree, contents, names = struct.unpack_from(">4sIIII", data)
    if magic != b"qres":
        return
    node_size, is_directory, is_compressed = (14 if version == 1 else 22), 2, 1 | 4
    waiting = [(0, "")]
    while waiting:
        node, folder = waiting.pop()
        name_at, flags, count, first = struct.unpack_from(">IHII", data, tree + node * node_size)
        (length,) = struct.unpack_from(">H", data, names + name_at)
        name = data[names + name_at + 6 : names + name_at + 6 + 2 * length].decode("utf-16-be") if node else ""
        if flags & is_directory:
            waiting += [(first + child, f"{folder}{name}/" if node else "") for child in range(count)]
        elif not flags & is_compressed:
            # A file's two numbers are its country and language, and the start of its content.
            start = contents + first
            (size,) = struct.unpack_from(">I", data, start)
            yield folder + name, data[start + 4 : start + 4 + size]


def _cut(
    pictures: list[tuple[str, np.ndarray]], num_images: int, width: int, height: int, quality: int
) -> Iterator[tuple[bytes, str]]:
    """Yield JPEGs of about `width` x `height` pixels with captions of six names, by a fixed seed."""
    rng = random.Random(0)
    for _ in range(num_images):
        _, picture = rng.choice(pictures)
        target = tuple(round(side * rng.uniform(0.8, 1.2)) for side in (width, height))
        scale = min(picture.shape[1] / target[0], picture.shape[0] / target[1]) * rng.uniform(0.8, 1.0)
        crop_width, crop_height = (int(side * scale) for side in target)
        left, top = rng.randint(0, picture.shape[1] - crop_width), rng.randint(0, picture.shape[0] - crop_height)
        crop = picture[top : top + crop_height, left : left + crop_width]
        image = cv2.resize(crop, target, interpolation=cv2.INTER_AREA if scale > 1 else cv2.INTER_CUBIC)
        caption = ", ".join(rng.choice(pictures)[0] for _ in range(6))
        yield cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes(), caption


def _write(folder: Path, photos: Iterable[tuple[bytes, str]]) -> int:
    """Write the photos to the shards in turn and return their total size in bytes."""
    num_bytes = 0
    with ExitStack() as stack:
        names = [folder / f"{number:05d}.tar" for number in range(NUM_SHARDS)]
        tars = [stack.enter_context(tarfile.open(name, "w")) for name in names]
        for number, (photo, caption) in enumerate(photos):
            add_member(tars[number % NUM_SHARDS], f"{number:08d}.jpg", photo)
            add_member(tars[number % NUM_SHARDS], f"{number:08d}.txt", caption.encode())
            num_bytes += len(photo)
    return num_bytes


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the photos that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="Folder to write.")
    parser.add_argument("--num_images", type=int, default=2000, help="Number of JPEGs of each size. Default: 2000.")
    given = parser.parse_args(arguments)
    prepare_photos(given.directory, given.num_images)


if __name__ == "__main__":
    main()
