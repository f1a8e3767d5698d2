"""Embed picture files and texts as arrays, for a search index, a linear probe or anything else that takes arrays."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from flipscale.io.errors import UserError
from flipscale.model import FlipModel, FlipProcessor
from flipscale.model.modeling_flip import normalise_embeds

Picture = str | Path | Image.Image


def image_embeds(
    model: FlipModel, processor: FlipProcessor, pictures: Sequence[Picture], batch_size: int = 64
) -> np.ndarray:
    """Return the embeddings of `pictures` (files or PIL images): fp32 `(pictures, dim)` of unit length, so that inner
    products are cosines.

    Raises:
        ValueError: a file is not a picture, or there are none.
    """
    batches = _batches(pictures, batch_size, "pictures")
    inputs = (processor(images=[_rgb(picture) for picture in batch], return_tensors="pt") for batch in batches)
    return _embeds(model, (model.get_image_features(**i.to(model.device)).pooler_output for i in inputs))


def text_embeds(model: FlipModel, processor: FlipProcessor, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
    """Return the embeddings of `texts`: fp32 `(texts, dim)` of unit length."""
    batches = _batches(texts, batch_size, "texts")
    inputs = (processor(text=list(batch), return_tensors="pt") for batch in batches)
    return _embeds(model, (model.get_text_features(**i.to(model.device)).pooler_output for i in inputs))


def _batches(items: Sequence, batch_size: int, what: str) -> Iterator[Sequence]:
    if not len(items):
        raise UserError(f"there are no {what} to embed; is the folder's name right?")
    with tqdm(total=len(items), desc="embedding", unit=f" {what}", disable=None) as bar:
        for first in range(0, len(items), batch_size):
            yield items[first : first + batch_size]
            bar.update(min(batch_size, len(items) - first))


def _rgb(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return _on_white(picture)
    try:
        with Image.open(picture) as image:
            return _on_white(image)
    except OSError as error:
        raise UserError(f"{picture} cannot be read as a picture ({error})") from error


def _on_white(image: Image.Image) -> Image.Image:
    """Return an image as RGB, what is transparent in it white, as in training."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@torch.no_grad()
def _embeds(model: FlipModel, features: Iterator[torch.Tensor]) -> np.ndarray:
    model.eval()
    return np.concatenate([normalise_embeds(batch).cpu().numpy() for batch in features])
