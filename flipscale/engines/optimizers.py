"""The optimisers: AdamW with the original's decay groups, or with Muon for the blocks' matrices.

The model decides the groups of its parameters (`loss_parameters`, `no_weight_decay`, its modules' types).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.adamw import adamw

from flipscale.engines.launch import Launch
from flipscale.engines.muon import Muon, buffer_elements, local
from flipscale.engines.trainable import part_of_model
from flipscale.recipe.optim import OptimRecipe


class ShardedAdamW(torch.optim.AdamW):
    """torch's fused AdamW for parameters that are DTensors.

    Its kernel gets this process's rows of each as plain tensors, and moments are plain tensors too. DTensor's own
    dispatch of a kernel with 900 parameters (H/14) takes longer than it runs. Parameters without rows here are skipped.
    """

    found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the weights, or nothing if `found_inf` is 1."""
        for group in self.param_groups:
            values, gradients, states = [], [], []
            for parameter in group["params"]:
                if parameter.grad is None or (held := local(parameter)).numel() == 0:
                    continue
                if parameter not in self.state:
                    self.state[parameter] = empty_state(self, parameter, 0)
                values.append(held)
                gradients.append(local(parameter.grad))
                states.append(self.state[parameter])
            means, squares, steps = ([s[name] for s in states] for name in (*moment_names(self), "step"))
            adamw(
                values, gradients, means, squares, [], steps, fused=True, found_inf=self.found_inf, amsgrad=False,
                beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], eps=group["eps"],
                weight_decay=group["weight_decay"], maximize=False,
            )  # fmt: skip


def encoder_blocks(model: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer  # takes seconds to import

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def num_trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def decays(model: nn.Module) -> dict[str, bool]:
    """Return for each parameter, by name, whether weight decay applies to it.

    Biases, norms and the modules in a FLIP model's `no_weight_decay` do not decay. For the parameters of the loss the
    model decides. The class token, token embedding and `logit_scale` decay, as in the original.
    """
    named = getattr(model, "no_weight_decay", None)
    exempt: frozenset[str] = named if isinstance(named, frozenset) else frozenset()  # timm has a method of this name
    decayed = {}
    for path, module in model.named_modules():
        is_norm = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
        is_exempt = is_norm or bool(exempt & set(path.split(".")))
        for field, _ in module.named_parameters(recurse=False):
            decayed[f"{path}.{field}" if path else field] = not (is_exempt or field.endswith("bias") or field in exempt)
    for name, does_decay in getattr(model, "loss_parameters", {}).items():
        if name in decayed:
            decayed[name] = does_decay
    return decayed


def layer_scales(
    model: nn.Module, decay: float | None, tower_ratio: float = 1.0, ratios: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return the factor of each parameter's learning rate, by name.

    The factor is `tower_ratio` in the towers and 1 elsewhere, times a power of `decay`. In a tower of N blocks, the
    embeddings are group 0, block k (from 0) is group k + 1, and the final norm is group N + 1. All parameters outside
    of the towers are group N + 1 too. Group i has `decay ** (N + 1 - i)` (BEiT, arXiv 2106.08254, and MAE's
    fine-tuning). `ratios` are further factors of parts by their names; the longest name that fits counts.
    """
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    for path, tower in model.named_modules():
        if path in ("vision_model", "text_model") and (decay is not None or tower_ratio != 1.0):
            blocks = encoder_blocks(tower)
            groups = {id(p): group for group, block in enumerate(blocks, 1) for p in block.parameters()}
            for name, parameter in tower.named_parameters():
                # CLIP has a norm before the first block.
                outside = 0 if "embed" in name or name.startswith("pre_") else len(blocks) + 1
                group = groups.get(id(parameter), outside)
                scales[f"{path}.{name}"] = tower_ratio * (decay or 1.0) ** (len(blocks) + 1 - group)
    of_parts: dict[str, float] = {}
    for part, ratio in sorted((ratios or {}).items()):
        of_parts |= dict.fromkeys(part_of_model(model, part, "optim.part_lr_ratios"), ratio)
    return {name: scale * of_parts.get(name, 1.0) for name, scale in scales.items()}


def muon_matrices(model: nn.Module) -> set[str]:
    """Return the names of Muon's parameters: the trained matrices of the encoders' layers."""
    matrices = {id(p) for block in encoder_blocks(model) for p in block.parameters() if p.ndim == 2 and p.requires_grad}
    return {name for name, parameter in model.named_parameters() if id(parameter) in matrices}


def build_optimizers(
    model: nn.Module,
    recipe: OptimRecipe,
    muon_dtype: torch.dtype = torch.bfloat16,
    muon_group: dist.ProcessGroup | None = None,
) -> list[torch.optim.Optimizer]:
    """Return the optimisers of all trainable parameters. `set_learning_rate` sets their rates before each step.

    Args:
        muon_dtype: dtype of Muon's iteration.
        muon_group: processes that share Muon's work on whole matrices; None if each does all of it.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    scales = layer_scales(model, recipe.layer_decay, recipe.tower_lr_ratio, recipe.part_lr_ratios)
    optimizers: list[torch.optim.Optimizer] = []
    if recipe.name == "muon":
        names = muon_matrices(model)
        matrices = [
            {"params": [parameters[name] for name in group], "lr_ratio": recipe.muon_lr_ratio * scales[group[0]]}
            for group in _alike({name: scales[name] for name in parameters if name in names})
        ]
        if matrices:
            optimizers.append(Muon(matrices, recipe.weight_decay, recipe.muon_momentum, muon_dtype, muon_group))
        parameters = {name: parameter for name, parameter in parameters.items() if name not in names}
    decayed = decays(model)
    groups = [
        {
            "params": [parameters[name] for name in group],
            "weight_decay": recipe.weight_decay if decayed[group[0]] else 0.0,
            "lr_ratio": scales[group[0]],
        }
        for group in _alike({name: (not decayed[name], scales[name]) for name in parameters})
    ]
    kind = ShardedAdamW if any(hasattr(p, "to_local") for p in parameters.values()) else torch.optim.AdamW
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    return [*optimizers, kind(groups, lr=0.0, betas=betas, eps=recipe.adam_epsilon, fused=True)]


def _alike(values: Mapping[str, Any]) -> list[list[str]]:
    """Group the names by value, in the order of the values."""
    return [[name for name in values if values[name] == value] for value in sorted(set(values.values()))]


def num_moments(model: nn.Module, recipe: OptimRecipe) -> dict[str, int]:
    """Return the number of moments of each trained parameter, by name."""
    matrices = muon_matrices(model) if recipe.name == "muon" else set()
    return {name: 1 if name in matrices else 2 for name, p in model.named_parameters() if p.requires_grad}


def muon_buffer_bytes(model: nn.Module, launch: Launch) -> int:
    """Return the bytes of Muon's step on the fullest process, besides weights, gradients and momentum."""
    names, is_sharded = muon_matrices(model), launch.engine == "fsdp2"
    shapes = [parameter.shape for name, parameter in model.named_parameters() if name in names]
    count = (launch.shard_size or launch.num_processes) if is_sharded else launch.neighbours
    return buffer_elements(shapes, count, is_sharded) * (2 if launch.bf16 else 4)


def moment_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the names of an optimiser's moments, which have the shapes of their parameters."""
    return ("momentum_buffer",) if isinstance(optimizer, Muon) else ("exp_avg", "exp_avg_sq")


def empty_state(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    """Return the optimiser's state of this process's part of a parameter: zero moments and the step count `steps`."""
    held = local(parameter)
    state = {name: torch.zeros_like(held) for name in moment_names(optimizer)}
    # The fused AdamW keeps its step count, like the moments, on the parameter's device.
    return {**state, "step": torch.full((), float(steps), device=held.device)}


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], learning_rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
