"""One file of a PEFT folder of LoRA changes, or of the start weights with which a run's changes are compared."""

import functools
import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from conftest import TOWER, write_tokenizer
from safetensors.torch import load_file, save
from transformers import AutoTokenizer

from flipscale.engines.trainable import add_lora
from flipscale.hub.export import build_processor, export_adapter, export_model
from flipscale.hub.loading import open_embedder
from flipscale.io.digests import digest_of, digests_to_json
from flipscale.io.model_folder import open_weights
from flipscale.model import FlipConfig, FlipModel
from flipscale.objectives.build import build_config
from flipscale.recipe.data import DataRecipe
from flipscale.recipe.model import ModelRecipe
from flipscale.recipe.optim import LoraRecipe, OptimRecipe, StageRecipe
from flipscale.recipe.recipe import Recipe, to_yaml
from flipscale.runs.complete_recipe import parse_recipe

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "config.json")
_BASE = ("config.json", "model.safetensors")
# The first byte of an input chooses among these, the rest is what the file holds.
_PLACES = (*(f"adapter/{name}" for name in _ADAPTER), *(f"base/{name}" for name in _BASE))
_STATE = {"step": 4, "samples_seen": 64, "num_processes": 1}


@functools.cache
def _made() -> Path:
    """A folder with a small model, a checkpoint that changes it, and the adapter of that checkpoint."""
    folder = Path(tempfile.mkdtemp())
    vision = {**TOWER, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    text = {**TOWER, "num_hidden_layers": 1, "vocab_size": 16, "max_position_embeddings": 8}
    config = FlipConfig(vision_config=vision, text_config=text, projection_dim=8)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(folder / "tokenizer"))
    flip = FlipModel(config)
    base = export_model(flip, build_processor(config, tokenizer), folder / "base")
    lora = LoraRecipe(rank=2)
    recipe = Recipe(
        model=ModelRecipe(init_from=str(base), vision_config=vision, text_config={**text, "projection_dim": 8}),
        data=DataRecipe(shards="made", tokenizer=str(folder / "tokenizer"), global_batch_size=16),
        optim=OptimRecipe(lora=lora),
        stages=[StageRecipe(name="tuned", samples=96, base_lr=0.1)],
    )
    with torch.device("meta"):
        changed = FlipModel(config)
    add_lora(changed, lora)
    weights = flip.state_dict()
    shapes = {name: [*weight.shape] for name, weight in changed.state_dict().items()}
    parts = {
        f"weight.{name}": weights.get(name.replace(".base_layer", ""), torch.ones(shape)).flatten().contiguous()
        for name, shape in shapes.items()
    }
    bounds = {name: [0, parts[f"weight.{name}"].numel()] for name in shapes}
    checkpoint = folder / "run/checkpoints/step-00000004"
    checkpoint.mkdir(parents=True)
    files = {
        "recipe.yaml": to_yaml(recipe).encode(),
        "index.json": json.dumps({"shapes": shapes, "bounds": bounds}).encode(),
        "part-00000.safetensors": save(parts),
        "state.json": json.dumps(_STATE).encode(),
    }
    digests = digests_to_json({name: digest_of(content) for name, content in files.items()})
    for name, content in {**files, "digests.json": digests.encode()}.items():
        (checkpoint / name).write_bytes(content)
    export_adapter(checkpoint, folder / "adapter")
    shutil.copy(base / "config.json", folder / "adapter")
    return folder


def seeds() -> list[bytes]:
    """The good files."""
    return [bytes([number]) + (_made() / place).read_bytes() for number, place in enumerate(_PLACES)]


def attack(data: bytes, folder: Path) -> None:
    """Open the adapter as each command does that takes a model; or export the run's changes, also over other files."""
    place = _PLACES[(data or b"\0")[0] % len(_PLACES)]
    changed = Path(shutil.copytree((_made() / place).parent, folder / "changed", copy_function=os.link))
    (changed / place.split("/")[1]).unlink()
    (changed / place.split("/")[1]).write_bytes(data[1:])
    if place.startswith("adapter/"):
        for model in (str(changed), f"hf:{changed}"):
            with suppress(ValueError, OSError):
                open_embedder(model, Accelerator(cpu=True))
        with suppress(ValueError, OSError):
            build_config(parse_recipe([f"--model.init_from={changed}", "--data.shards=made"]))
        with suppress(ValueError, OSError):
            open_weights(changed)
        return
    # The folder that the run's recipe names, which others may have changed since.
    base = _made() / "base"
    base.rename(kept := _made() / "kept")
    changed.rename(base)
    (others := folder / "others").mkdir()
    (others / "notes.txt").write_text("mine")
    shutil.copy(_made() / "adapter/adapter_config.json", others)
    try:
        for out in (others, folder / "new"):
            with suppress(ValueError, OSError):
                export_adapter(_made() / "run/checkpoints/step-00000004", out)
                exported = load_file(out / "adapter_model.safetensors")
                assert exported.keys() == load_file(_made() / "adapter/adapter_model.safetensors").keys()
    finally:
        shutil.rmtree(base)
        kept.rename(base)
    assert (others / "notes.txt").read_text() == "mine"
