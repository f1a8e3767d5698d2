"""Point at one of four pictures: mosaics of a test set, and the place where a model's map of a caption is highest.

python examples/demo/pointing.py runs/demo data/demo/test --figure pointing.png
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from flipscale.data.decode import decode_processed
from flipscale.data.samples import SampleNumbers
from flipscale.data.sources.tar import TarSource
from flipscale.engines.build_engine import start_accelerator
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.explain import patch_embeds
from flipscale.evaluation.intervals import wilson
from flipscale.evaluation.presentation.figures import drawing_pyplot, save_figure
from flipscale.evaluation.whole_images import packed
from flipscale.hub.loading import open_embedder
from flipscale.io.command_line import parse_command
from flipscale.io.errors import UserError
from flipscale.io.options import Pixels, Seed
from flipscale.process.console import report_user_errors, start_logging

_SIDE, _AT_ONCE = 64, 32


class Pointed(NamedTuple):
    """A mosaic, uint8 RGB `(128, 128, 3)`, with the caption of one of its pictures, the place of that picture (0 to 3
    by rows), the place of the map's highest patch, and the map, fp32 `(rows, columns)`."""

    mosaic: np.ndarray
    caption: str
    place: int
    pointed: int
    heat: np.ndarray


def points(embedder: Embedder, source: TarSource, seed: int = 0) -> Iterator[Pointed]:
    """Yield a mosaic for each picture of a test set. The other three pictures have other captions."""
    where, rng = SampleNumbers(source), np.random.default_rng(seed)
    captions = [(*source.read_captions(*place), b"")[0].decode() for place in where]
    if "texts" not in embedder.gives or len({*captions}) < 4 or "" in captions:
        raise UserError("this needs a model of images and texts, a caption for each picture, and four different ones")
    texts = embedder.texts(captions).to(embedder.accelerator.device)
    chosen, places = [], rng.integers(4, size=len(where)).tolist()
    for row, place in enumerate(places):
        others: list[int] = []
        while len(others) < 3:
            other = int(rng.integers(len(where)))
            if captions[other] not in {captions[number] for number in (row, *others)}:
                others.append(other)
        chosen.append([*others[:place], row, *others[place:]])
    for first in range(0, len(where), _AT_ONCE):
        rows = range(first, min(first + _AT_ONCE, len(where)))
        mosaics = [_mosaic([source.read(*where[number]).image for number in chosen[row]]) for row in rows]
        files = (cv2.imencode(".png", mosaic[..., ::-1])[1].tobytes() for mosaic in mosaics)
        batch = packed((embedder.decoder()(file, 0) for file in files), len(rows))
        columns = batch.to(embedder.accelerator.device).with_image_size(embedder.pixels)
        maps = torch.einsum("nrcd,nd->nrc", patch_embeds(embedder, **columns), texts[rows.start : rows.stop])
        for row, mosaic, heat in zip(rows, mosaics, maps.cpu().numpy(), strict=True):
            down, across = np.unravel_index(heat.argmax(), heat.shape)
            pointed = int(2 * (2 * down >= heat.shape[0]) + (2 * across >= heat.shape[1]))
            yield Pointed(mosaic, captions[row], places[row], pointed, heat)


def _mosaic(files: Sequence[bytes]) -> np.ndarray:
    squares = [decode_processed(file, _SIDE) for file in files]
    return np.vstack([np.hstack(squares[:2]), np.hstack(squares[2:])])


def draw(pointed: Sequence[Pointed], path: Path) -> None:
    """Draw mosaics under their maps, with the captions."""
    size = (1.6 * len(pointed), 3.6)
    figure, axes = drawing_pyplot().subplots(2, len(pointed), figsize=size, constrained_layout=True)
    for (above, below), one in zip(axes.T, pointed, strict=True):
        colour = "black" if one.pointed == one.place else "C3"
        above.set_title(one.caption.replace(" ", "\n", 1), fontsize=8, color=colour)
        above.imshow(one.mosaic)
        below.imshow(one.mosaic)
        below.imshow(one.heat, cmap="Reds", alpha=0.65, extent=(0, 128, 128, 0), interpolation="bicubic")
        for axis in (above, below):
            axis.set_axis_off()
    save_figure(figure, path)


@dataclass(frozen=True)
class Options:
    """Point at one of four pictures of a mosaic by its caption. Chance is 25 %.

    Args:
        model: A model, as for `flipscale evaluate`.
        test: Folder of a test set.
        image_size: Image size of the mosaics, for flipscale's models. Default: the model's own.
        seed: Seed of the mosaics.
        figure: Draw the first eight mosaics with their maps to this PNG file. A red caption was missed.
    """

    model: str
    test: str
    _: KW_ONLY
    image_size: Pixels | None = None
    seed: Seed = 0
    figure: Path | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the share of mosaics in which the highest patch is in the right picture."""
    with report_user_errors():
        start_logging()
        options = parse_command(Options, arguments)
        embedder = open_embedder(options.model, start_accelerator([], ".")).at(options.image_size)
        pointed = list(points(embedder, TarSource(options.test), options.seed))
        hits, count = sum(one.pointed == one.place for one in pointed), len(pointed)
        low, high = wilson(hits, count)
        print(f"{hits} of {count} mosaics: {hits / count:.1%} ({low:.1%} to {high:.1%}); chance is 25 %")
        if options.figure:
            draw(pointed[:8], options.figure)


if __name__ == "__main__":
    main()
