"""A text tower and its tokenizer as data of a page, where templates/search.js computes them."""

import base64
import json
from typing import Any

import numpy as np

from flipscale.evaluation.embedding import Embedder
from flipscale.model import FlipModel

MOST_TOWER_BYTES = 20_000_000
_ACTIVATIONS = ("relu", "gelu_pytorch_tanh")
_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "layer_norm_eps"),
    *("hidden_act", "attend_to_padding", "pooling", "pad_token_id"),
)
# Steps of the tokenizers that `flipscale prepare tokenizer` writes, and all special tokens that these may have.
_STEPS = [
    "Precompiled",
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "Unigram",
]
_SPECIAL = {"<pad>", "<unk>", "<s>", "</s>"}


def text_tower(embedder: Embedder) -> dict[str, Any] | str:
    """Return what templates/text_tower.js reads of a model and its tokenizer; or the reason why a page cannot."""
    model = embedder.model
    if not isinstance(model, FlipModel) or embedder.tokenizer is None:
        return f"{embedder.name} is not a flipscale model with a text tower"
    config = model.config.text_config
    weights = {**model.text_model.state_dict(), "projection.weight": model.text_projection.weight}
    arrays = {name: weight.detach().float().cpu().numpy() for name, weight in weights.items()}
    num_bytes = sum(array.nbytes for array in arrays.values())
    if num_bytes > MOST_TOWER_BYTES:
        return f"the text tower has {num_bytes / 1e6:.1f} MB, more than {MOST_TOWER_BYTES / 1e6:.0f} MB"
    if config.num_hidden_layers and config.hidden_act not in _ACTIVATIONS:
        return f"the text tower's hidden_act is {config.hidden_act}, not {' or '.join(_ACTIVATIONS)}"
    tokenizer = json.loads(embedder.tokenizer.backend_tokenizer.to_str())
    pieces, steps = tokenizer["model"], (tokenizer["normalizer"] or {}).get("normalizers", [{}])
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    adds = pieces.get("byte_fallback") or (tokenizer["post_processor"] or {}).get("special_tokens")
    its_steps = [steps[0].get("type"), *steps[1:], tokenizer["pre_tokenizer"], pieces["type"]]
    if adds or its_steps != _STEPS or not special.keys() <= _SPECIAL:
        return "`flipscale prepare tokenizer` did not write the tokenizer"
    return {
        **{name: getattr(config, name) for name in _FIELDS},
        "pieces": pieces["vocab"],
        "longest": max(len(piece) for piece, _ in pieces["vocab"]),
        # The penalty of an unknown letter is SentencePiece's.
        "unknown": {"id": pieces["unk_id"], "score": min(score for _, score in pieces["vocab"]) - 10.0},
        "special": special,
        "characters": steps[0]["precompiled_charsmap"],
        "weights": {name: as_base64(array.astype("<f4")) for name, array in arrays.items()},
    }


def as_base64(array: np.ndarray) -> str:
    """Return the bytes of an array for a page's script."""
    return base64.b64encode(array.tobytes()).decode()
