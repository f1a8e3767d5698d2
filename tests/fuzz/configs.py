"""The bytes of one file of a model folder, of an adapter's, or of the prompts of a test set."""

import functools
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from conftest import TOWER, write_tokenizer
from transformers import AutoTokenizer

from flipscale.evaluation.model_results import read_result_lines
from flipscale.evaluation.test_set import TEMPLATES
from flipscale.evaluation.test_set import read_lines as read_texts
from flipscale.hub.export import build_processor, export_model
from flipscale.hub.loading import open_embedder
from flipscale.model import FlipConfig, FlipModel

ADAPTER = "adapter_config.json"
# The first byte of an input chooses among these, the rest is what the file holds.
FILES = [
    *("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"),
    *("tokenizer_config.json", "processor_config.json", "results.jsonl", TEMPLATES, ADAPTER),
]


@functools.cache
def _model() -> Path:
    """A small model folder whose weights are in two files, made once."""
    folder = Path(tempfile.mkdtemp())
    config = FlipConfig(
        vision_config={**TOWER, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8},
        text_config={**TOWER, "num_hidden_layers": 1, "vocab_size": 16, "max_position_embeddings": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(folder / "tokenizer"))
    flip = FlipModel(config)
    model = export_model(flip, build_processor(config, tokenizer), folder / "model")
    flip.save_pretrained(model, max_shard_size="60KB")
    (model / TEMPLATES).write_text("a {c}\nthe {c}\n")
    (model / ADAPTER).write_text('{"base_model_name_or_path": "base", "peft_type": "LORA"}')
    (model / "results.jsonl").write_text('{"group": "0123456789abcdef", "lines": 1}\n')
    return model


def seeds() -> list[bytes]:
    """The good files."""
    return [bytes([number]) + (_model() / name).read_bytes() for number, name in enumerate(FILES)]


def attack(data: bytes, folder: Path) -> None:
    """Open the model as `flipscale evaluate` does."""
    model = Path(shutil.copytree(_model(), folder / "model", copy_function=os.link))
    name = FILES[(data[0] if data else 0) % len(FILES)]
    (model / name).unlink()
    (model / name).write_bytes(data[1:])
    with suppress(ValueError):
        if name == TEMPLATES:
            read_texts(model, TEMPLATES, "the prompts")
        elif name == "results.jsonl":
            read_result_lines(model / name)
        else:
            if name == ADAPTER:
                (model / "config.json").unlink()
            open_embedder(str(model), Accelerator(cpu=True))
