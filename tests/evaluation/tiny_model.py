"""A FLIP model of two small towers with random weights, for images of 32 pixels and the captions of `write_shards`."""

from pathlib import Path

import torch
from accelerate import Accelerator
from conftest import TOWER
from transformers import AutoTokenizer

from flipscale.evaluation.embedding import Embedder
from flipscale.model import FlipConfig, FlipModel


def tiny_embedder(tokenizer_dir: str | Path, batch_size: int, projection_dim: int = 16) -> Embedder:
    """Return the embedder of the model; its weights are the same every time."""
    torch.manual_seed(0)
    config = FlipConfig(
        vision_config={**TOWER, "image_size": 32, "patch_size": 8},
        text_config={**TOWER, "vocab_size": 16, "max_position_embeddings": 8},
        projection_dim=projection_dim,
    )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return Embedder(FlipModel(config).eval(), tokenizer, Accelerator(cpu=True), batch_size=batch_size)
