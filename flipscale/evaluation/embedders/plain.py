"""Features that nothing was learned for: pixels, histograms of gradients, and a model of random weights."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator

from flipscale.data.decode import decode_box
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.images import Decoder
from flipscale.evaluation.nearest_neighbour import HOG_SIZE, hog_features, pixel_features
from flipscale.io.errors import UserError
from flipscale.io.model_folder import fetch_folder, read_object
from flipscale.model import FlipConfig, FlipModel

PLAIN: dict[str, Callable[[np.ndarray], np.ndarray]] = {"pixels": pixel_features, "hog": hog_features}
UNTRAINED = "untrained:"


@dataclass(frozen=True)
class PlainEmbedder(Embedder):
    """An embedder of images by a function, without a model: it has no texts, and its features are no more pooled than
    projected.

    Args:
        describe: from uint8 images `(n, 64, 64, 3)` to float32 `(n, dim)`.
    """

    describe: Callable[[np.ndarray], np.ndarray] = field(kw_only=True)

    @property
    def image_size(self) -> int:
        return HOG_SIZE

    def decoder(self) -> Decoder:
        return partial(_described, self.describe)

    def image_features(self, **columns: torch.Tensor) -> torch.Tensor:
        return columns["described"]

    def pooled_features(self, **columns: torch.Tensor) -> torch.Tensor:
        return columns["described"]


def plain_embedder(name: str, accelerator: Accelerator, batch_size: int = 256, num_workers: int = 0) -> Embedder:
    """Return the embedder of `pixels` (16 x 16, 768 numbers) or `hog` (1,764 numbers) of whole images."""
    return PlainEmbedder(
        torch.nn.Identity(), None, accelerator, batch_size, num_workers, name=name, describe=PLAIN[name]
    )


def untrained_embedder(folder: str, accelerator: Accelerator, batch_size: int = 256, num_workers: int = 0) -> Embedder:
    """Return the embedder of a new model of the configuration in `folder`: random weights, of seed 0.

    Raises:
        ValueError: there is no configuration of ours.
    """
    try:
        config = FlipConfig.from_own_fields(read_object(fetch_folder(folder) / "config.json"))
    except (ValueError, OSError) as error:
        raise UserError(f"{folder} has no configuration of a model ({error}); name a model's folder") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FlipModel(config).eval().to(accelerator.device)
    return Embedder(model, None, accelerator, batch_size, num_workers, name=f"{UNTRAINED}{folder}")


def _described(describe: Callable[[np.ndarray], np.ndarray], encoded: bytes, row: int) -> dict[str, np.ndarray]:
    return {"described": describe(decode_box(encoded, None, HOG_SIZE, (1.0, 1.0))[None])[0]}
