"""Drawings made into pictures: block by block, by several processes, so that a run that was killed goes on.

A block holds up to `BLOCK` pictures of one set: `SET.NUMBER.png` is their PNGs in a row, `SET.NUMBER.npy` a row about
each. The second is written last, aside and renamed, so a block that has it is whole.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from flipscale.io.atomic import atomic_write, sync, unique_partial_path
from flipscale.preparation.audit import hashes
from flipscale.preparation.icons.collection import IMAGE_SIZE, IconSet, digest

BLOCK = 1024
# About a picture: where its PNG lies in the file, a digest of its pixels, the hash of its looks, the hash's word that
# it is nearly blank, and whether it is quite blank or could not be drawn, so that there is no PNG.
ROW = np.dtype([("start", "<u4"), ("size", "<u4"), ("pixels", "<u8"), ("looks", "<u8"), ("faint", "?"), ("blank", "?")])
# The darkest a picture may be, of 255 levels from white, that shows nothing: white on white, or an animation's start.
_BLANK_BELOW = 16


@dataclass(frozen=True)
class Block:
    """Some drawings of a set, and where their pictures are kept.

    Args:
        folder: of the two files.
        prefix: of the set.
        number: of the block in the set.
        names: of the drawings.
    """

    folder: Path
    prefix: str
    number: int
    names: tuple[str, ...]

    @property
    def rows_path(self) -> Path:
        """The file of rows."""
        return self.folder / f"{self.prefix}.{self.number:03d}.npy"

    @property
    def png_path(self) -> Path:
        """The file of PNGs."""
        return self.rows_path.with_suffix(".png")


def blocks(folder: Path, prefix: str, names: Sequence[str]) -> list[Block]:
    """Return the blocks of a set's drawings."""
    starts = range(0, len(names), BLOCK)
    return [Block(folder, prefix, start // BLOCK, tuple(names[start : start + BLOCK])) for start in starts]


def render(svg: str) -> np.ndarray | None:
    """Return the picture of an SVG, uint8 BGR `(IMAGE_SIZE, IMAGE_SIZE, 3)`, on white; None if it cannot be drawn."""
    import resvg_py

    try:
        # The system's fonts are not used, so that a drawing looks the same on every machine.
        png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    except ValueError:
        return None
    pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    return pixels if pixels is not None and pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) else None


def encode(pixels: np.ndarray) -> bytes:
    """Return the PNG of a picture, with one channel where it is grey, which takes two thirds of the bytes.

    Args:
        pixels: uint8 BGR `(height, width, 3)`.
    """
    is_grey = (pixels == pixels[..., :1]).all()
    stored = np.ascontiguousarray(pixels[..., 0]) if is_grey else pixels
    return cv2.imencode(".png", stored, [cv2.IMWRITE_PNG_COMPRESSION, 6])[1].tobytes()


def draw_all(sets: Iterable[IconSet], blocks_of: Mapping[str, Sequence[Block]], pool: Executor, at_once: int) -> None:
    """Draw all blocks that are not there yet, with a progress bar.

    Args:
        sets: all, one in memory at a time.
        blocks_of: the blocks of each set that is used, by its prefix.
        pool: of processes that draw.
        at_once: how many blocks are drawn or wait in memory.

    Raises:
        OSError: a worker died, or the disk is full.
    """
    every = [block for found in blocks_of.values() for block in found]
    missing = {block for block in every if not block.rows_path.exists()}
    if not missing:
        return
    total, left = (sum(len(block.names) for block in some) for some in (every, missing))
    with tqdm(total=total, initial=total - left, unit=" drawings", desc="drawing", disable=None) as bar:
        waiting: dict[Future[None], int] = {}
        todo = _work(sets, blocks_of, missing)
        while True:
            for block, svgs in islice(todo, at_once - len(waiting)):
                waiting[pool.submit(_draw, block, svgs)] = len(svgs)
            if not waiting:
                return
            for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                done.result()
                bar.update(waiting.pop(done))


def _work(
    sets: Iterable[IconSet], blocks_of: Mapping[str, Sequence[Block]], missing: Collection[Block]
) -> Iterator[tuple[Block, list[str]]]:
    """Yield the missing blocks with the SVGs of their drawings."""
    for icon_set in sets:
        todo = [block for block in blocks_of.get(icon_set.prefix, ()) if block in missing]
        if todo:
            svgs = {icon.name: icon.svg for icon in icon_set.icons}
            yield from ((block, [svgs[name] for name in block.names]) for block in todo)


def _draw(block: Block, svgs: Sequence[str]) -> None:
    """Write the two files of a block."""
    rows, pngs, start = np.zeros(len(svgs), ROW), [], 0
    for row, svg in zip(rows, svgs, strict=True):
        pixels = render(svg)
        if pixels is None or 255 - int(pixels.min()) < _BLANK_BELOW:
            row["blank"] = True
            continue
        png = encode(pixels)
        looks, faint = hashes.look(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
        row["start"], row["size"], row["pixels"] = start, len(png), digest(pixels.tobytes())
        row["looks"], row["faint"] = looks, faint
        pngs.append(png)
        start += len(png)
    # By names of its own: a worker whose parent was killed may live a little into the next run.
    with atomic_write(block.png_path, unique_partial_path(block.png_path)) as partial:
        partial.write_bytes(b"".join(pngs))
        sync(partial)
    with atomic_write(block.rows_path, unique_partial_path(block.rows_path)) as partial:
        with open(partial, "wb") as file:
            np.save(file, rows)
        sync(partial)
