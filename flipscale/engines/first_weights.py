"""The model's weights from nothing, a part at a time: no process ever holds more than its share and one block.

The draws of every module are keyed by (seed, its name), so the same recipe starts from the same numbers under every
engine and at every number of processes.
"""

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from flipscale.model import FlipConfig, FlipModel

# Fills one module's own parameters: (its name, the module, the model or tower whose rules it follows).
Fill = Callable[[str, nn.Module, PreTrainedModel], None]


def build_weights(
    config: FlipConfig,
    configure: Callable[[FlipModel], None],
    fill: Fill,
    keep: Callable[[nn.Module], None],
    kind: type[FlipModel] = FlipModel,
) -> FlipModel:
    """A model of `config` in fp32, built on the meta device and made real block by block.

    Args:
        configure: changes the model before it has weights (attention kernel, recomputation, compilation).
        fill: sets a module's weights; `fresh_weights`, `weights_of` or `no_weights`.
        keep: called with every block as soon as it is filled, to shard it or move it to its device.
        kind: the class of the model.
    """
    with torch.device("meta"):
        model = kind(config)
    configure(model)
    blocks = tuple(type(module) for module in model.modules() if type(module).__name__ in model._no_split_modules)
    for name, module, owner in _modules(model, "", model):
        _materialise(module)
        fill(name, module, owner)
        if isinstance(module, blocks):
            keep(module)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"never made real: {left}"
    return model


def compile_blocks(model: FlipModel) -> None:
    """Has torch.compile make one graph of every encoder block: one compilation for a tower, whatever its depth."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(fullgraph=True)


def fresh_weights(seed: int) -> Fill:
    """Weights drawn by the model's own `_init_weights`."""

    def fill(name: str, module: nn.Module, owner: PreTrainedModel) -> None:
        key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(key[:8], "big") >> 1)
            owner._init_weights(module)

    return fill


def initial_weights(init_from: str | None, config: FlipConfig, seed: int, kind: type[FlipModel] = FlipModel) -> Fill:
    """Return what fills the model of a fresh start: fresh weights, or those of the folder or Hub name `init_from`.

    Raises:
        ValueError: the weights cannot be loaded into a model of `config`.
    """
    if init_from is None:
        return fresh_weights(seed)
    try:
        torch.manual_seed(seed)
        return weights_of(kind.from_pretrained(init_from, config=config, dtype=torch.float32))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"model.init_from {init_from!r} cannot be loaded ({str(error).splitlines()[0]})") from error


def no_weights(name: str, module: nn.Module, owner: PreTrainedModel) -> None:
    """Leaves the memory as it is, for a checkpoint to fill."""


@torch.no_grad()
def weights_of(loaded: FlipModel) -> Fill:
    """The weights of a model that is already there."""
    tensors = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}

    def fill(name: str, module: nn.Module, owner: PreTrainedModel) -> None:
        for field, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            tensor.data.copy_(tensors[f"{name}.{field}" if name else field])

    return fill


def _modules(module: nn.Module, name: str, owner: PreTrainedModel) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """Children before their parents, as transformers initialises them: a parent may overrule its children."""
    for child_name, child in module.named_children():
        child_owner = child if isinstance(child, PreTrainedModel) else owner
        yield from _modules(child, f"{name}.{child_name}" if name else child_name, child_owner)
    yield name, module, owner


def _materialise(module: nn.Module) -> None:
    """Memory for the module's own parameters, and its fixed tables computed."""
    for field, parameter in module.named_parameters(recurse=False):
        empty = torch.empty_like(parameter, device="cpu")
        setattr(module, field, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    tables: dict[str, torch.Tensor] = getattr(module, "fixed_tables", dict)()
    for field, _ in list(module.named_buffers(recurse=False)):
        setattr(module, field, tables[field])
