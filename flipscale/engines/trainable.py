"""The trained part of a model: all weights but the frozen ones, or low-rank changes of some of them (LoRA).

PEFT puts two small matrices next to each chosen linear layer, which becomes `base_layer`: with them it computes
`W x + factor * B A x`. They begin as a draw (A) and zero (B).
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from flipscale.io.errors import UserError, needed
from flipscale.recipe.optim import LoraRecipe

_MATRIX = ".lora_{}.default.weight"
ReadWeight = Callable[[str], torch.Tensor]


def freeze(model: nn.Module, parts: Sequence[str], field: str = "model.frozen") -> None:
    """Freeze `parts` of a model, which are names of modules or parameters. `field` is the recipe's field of them."""
    for part in parts:
        for parameter in part_of_model(model, part, field).values():
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"{field} is {list(parts)}, which leaves nothing to learn; leave a part out")


def part_of_model(model: nn.Module, part: str, field: str) -> dict[str, nn.Parameter]:
    """Return the parameters of a module or parameter that is named in a field of the recipe."""
    named = dict(model.named_parameters())
    if found := {name: p for name, p in named.items() if name == part or name.startswith(f"{part}.")}:
        return found
    known = ", ".join(dict.fromkeys(name.split(".")[0] for name in named))
    raise UserError(f"{field} has {part!r}; expected {known}, or a part of one such as vision_model.encoder.layers.0")


def add_lora(model: nn.Module, recipe: LoraRecipe) -> None:
    """Put LoRA's matrices into a model, on the meta device, if the recipe has a rank. Freeze everything else. Raise
    UserError if peft is not installed, or a tower or a module is not in the model."""
    if recipe.rank is None:
        return
    from transformers.modeling_layers import GradientCheckpointingLayer  # takes seconds to import

    layers: list[str] = []
    for tower in recipe.towers:
        part_of_model(model, tower, "optim.lora.towers")
        linear = [
            f"{path}.{name}"
            for path, block in model.named_modules()
            if isinstance(block, GradientCheckpointingLayer) and path.startswith(f"{tower}.")
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        ]
        chosen = [name for name in linear if name.split(".")[-1] in recipe.modules]
        if not chosen:
            known = ", ".join(dict.fromkeys(name.split(".")[-1] for name in linear)) or "no linear layer"
            raise UserError(f"optim.lora.modules is {[*recipe.modules]}; expected some of {tower}'s: {known}")
        layers += chosen
    for module in set(recipe.modules) - {name.split(".")[-1] for name in layers}:
        raise UserError(f"optim.lora.modules has {module!r}, which no block of {', '.join(recipe.towers)} has")
    least = min(min(model.get_submodule(name).weight.shape) for name in layers)  # type: ignore[union-attr, arg-type]
    if recipe.rank > least:
        raise UserError(
            f"optim.lora.rank is {recipe.rank}; it must be at most {least}, the smallest side of its layers"
        )
    _peft().inject_adapter_in_model(lora_config(layers, recipe), model, low_cpu_mem_usage=True)


def lora_config(layers: list[str], recipe: LoraRecipe, base: str | None = None) -> Any:
    """Return PEFT's configuration of LoRA on the named layers of the model `base`."""
    return _peft().LoraConfig(
        r=recipe.rank, lora_alpha=recipe.factor * (recipe.rank or 1), target_modules=layers,
        base_model_name_or_path=base, inference_mode=base is not None,
    )  # fmt: skip


def _peft() -> Any:
    return needed("peft", "optim.lora needs the package peft", "'flipscale[lora]'")


def merged(read: ReadWeight, names: Collection[str], recipe: LoraRecipe) -> ReadWeight:
    """Return a reader of a model's weights with the changes added, given a reader of the weights with LoRA."""

    def merge(name: str) -> torch.Tensor:
        layer, _, field = name.rpartition(".")
        base = f"{layer}.base_layer.{field}"
        weight = read(base if base in names else name)
        if layer + _MATRIX.format("A") not in names or field != "weight":
            return weight
        down, up = (read(layer + _MATRIX.format(letter)) for letter in "AB")
        return weight + recipe.factor * (up @ down)

    return merge


def lora_layers(names: Collection[str]) -> list[str]:
    return [name.removesuffix(_MATRIX.format("A")) for name in names if name.endswith(_MATRIX.format("A"))]
