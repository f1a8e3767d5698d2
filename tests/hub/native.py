"""Small models of the families that are transformers' own, with a tokenizer of each one's kind."""

from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any

import torch
from conftest import TOWER
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from flipscale.data.tokenizers import train_sentencepiece
from flipscale.hub.export import build_processor, export_model
from flipscale.model.families import config_class

NATIVE = ("clip", "siglip")
CAPTIONS = ["a photo of a cat", "a red disc", "The blue ring!", "some green bars and a grey cross"]
LENGTH = {"clip": 24, "siglip": 64, "towers": 16}


def small_tokenizer(family: str, folder: Path) -> PreTrainedTokenizerBase:
    """CLIP's pads with its end token, and SigLIP's has no end token."""
    if family != "clip":
        return train_sentencepiece(CAPTIONS * 3, folder, 80, LENGTH[family])
    letters = [*ascii_lowercase, *digits, "!", "'", ","]
    pieces = ["<|pad|>", *letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])


def export_native(family: str, folder: Path, **text: Any) -> Path:
    """Write the folder of a model with random weights as a run exports it."""
    tokenizer = small_tokenizer(family, folder / "tokenizer")
    fields = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH[family]}
    fields |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    vision = {**TOWER, "image_size": 32, "patch_size": 8}
    if family == "towers":  # a ViT and a BERT
        vision["model_type"], fields = "vit", {**fields, "model_type": "bert", "caption_tokens": LENGTH[family]}
    config = config_class(family).from_size("b16", vision, {**fields, **text})
    torch.manual_seed(0)
    model = config.exported_class(config.exported())
    with torch.no_grad():
        for parameter in model.parameters():  # biases begin as zeros and norms as ones
            parameter.add_(0.02 * torch.randn_like(parameter))
    return export_model(model, build_processor(config, tokenizer), folder / "model")
