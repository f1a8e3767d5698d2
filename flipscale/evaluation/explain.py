"""Where in a picture a text is: its similarity with each patch."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from flipscale.data.decode import UndecodableImage
from flipscale.data.samples import BadSample, wrap_errors
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.whole_images import packed
from flipscale.io.errors import UserError
from flipscale.io.paths import is_utf8
from flipscale.model import FlipModel
from flipscale.objectives.objective import recorded_inputs


@torch.no_grad()
def patch_embeds(embedder: Embedder, **columns: torch.Tensor) -> torch.Tensor:
    """Return an embedding of each patch of whole images, fp32 `(batch, rows, columns, dim)`.

    Its product with a text's embedding is a map of where the text is. How it is made depends on the pooling:

    * flipscale's own towers, means over tokens: the projected token, divided by the norm of the image's embedding. With
      a projection of one layer, the mean over all tokens, with the class token, is the cosine of image and text.
    * CLIP, a class token: the token's value in the attention of the last block, normed and projected, of unit length.
      The block's queries and keys, its MLP and the residual are left out (MaskCLIP, arXiv 2112.01071).
    * SigLIP, an attention that pools: the pooled embedding of this token alone, of unit length. This is its value, too.

    Raises:
        UserError: the model is none of these, or its patches form no square grid.
    """
    model: Any = embedder.model
    vision: Any = getattr(model, "vision_model", None)
    with embedder.accelerator.autocast():
        if isinstance(model, FlipModel) and not model.config.vision_config.embedded_by:
            output = model.vision_model(**columns)
            tokens, whole = (model.image_projection(part) for part in (output.last_hidden_state, output.pooler_output))
            norms = whole[:, : embedder.dims].float().norm(dim=-1)[:, None, None]
            embeds = tokens[:, model.config.vision_config.num_prefix_tokens :, : embedder.dims].float() / norms
        elif hasattr(vision, "head") and hasattr(vision.head, "probe"):
            tokens = vision(**columns).last_hidden_state
            pooled = vision.head(tokens.flatten(0, 1).unsqueeze(1))
            embeds = embedder.unit_embeds(pooled).unflatten(0, tokens.shape[:2])
        elif hasattr(vision, "post_layernorm") and hasattr(model, "visual_projection"):
            embeds = _values(embedder, model, **columns)
        else:
            raise UserError(
                f"{embedder.name} is a {type(model).__name__}, whose patches have no embeddings; use a model of "
                "flipscale, or a CLIP or SigLIP of transformers"
            )
    side = round(embeds.shape[1] ** 0.5)
    if side**2 != embeds.shape[1]:
        raise UserError(f"{embedder.name} has {embeds.shape[1]} patches, not a square grid; use another model")
    return embeds.unflatten(1, (side, side))


def _values(embedder: Embedder, model: Any, **columns: torch.Tensor) -> torch.Tensor:
    """Return the projected values `(batch, patches, dim)` of a CLIP's last block."""
    block = model.vision_model.encoder.layers[-1]
    with recorded_inputs(block.layer_norm1) as inputs:
        model.vision_model(**columns)
    states = block.layer_norm1(inputs[0])[:, 1:]
    values = block.self_attn.out_proj(block.self_attn.v_proj(states))
    projected = model.visual_projection(model.vision_model.post_layernorm(values))
    return embedder.unit_embeds(projected.flatten(0, 1)).unflatten(0, projected.shape[:2])


def heat_map(embedder: Embedder, image: Path, text: str) -> np.ndarray:
    """Return the similarity of each patch of a picture file with a text, fp32 `(rows, columns)`. Raise UserError as
    `patch_embeds`, and for a model without texts, a text without words, or a file that is not a picture."""
    if "texts" not in embedder.gives:
        raise UserError(f"{embedder.name} takes no texts; use a model with a text tower")
    if not isinstance(text, str) or not text.strip() or not is_utf8(text):
        raise UserError(f"text is {text!r:.60}; expected words, as UTF-8")
    try:
        with wrap_errors(UndecodableImage):
            batch = packed([embedder.decoder()(image.read_bytes(), 0)], 1)
    except (OSError, BadSample) as error:
        raise UserError(f"{image} cannot be read as a picture ({error})") from error
    columns = batch.to(embedder.accelerator.device).with_image_size(embedder.pixels)
    return (patch_embeds(embedder, **columns)[0].cpu() @ embedder.texts([text])[0]).numpy()
