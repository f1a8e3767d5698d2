"""The weights that a run starts from: drawn, or read from a model folder, one module at a time.

The model is built on the meta device and made real block by block, so no process ever holds more than its shard and
one block. The draws of every module are keyed by (seed, its name), so the same recipe starts from the same numbers
under every engine and at every number of processes.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from flipscale.io.digests import check_weight
from flipscale.io.errors import UserError
from flipscale.io.model_folder import check_folder, fetch_folder
from flipscale.model import FlipConfig, FlipModel, FlipPreTrainedModel

# Sets one module's own parameters, given its name, the module, and the model or tower whose rules it follows.
ParameterInit = Callable[[str, nn.Module, PreTrainedModel], None]

_log = logging.getLogger(__name__)

# More than any list of stages needs; without a limit, a fault that makes a graph for every step would go unseen.
_MAX_GRAPHS = 64


def build_weights(
    config: FlipConfig,
    configure: Callable[[FlipPreTrainedModel], None],
    init: ParameterInit,
    place: Callable[[nn.Module], None],
    kind: type[FlipPreTrainedModel] = FlipModel,
) -> FlipPreTrainedModel:
    """Return a model of `config` in fp32, made real block by block.

    Args:
        configure: changes the model before it has weights (attention kernel, recomputation, compilation).
        init: sets a module's weights; `initial_weights` or `no_weights`.
        place: called with every block as soon as it has weights, to shard it or move it to its device.
        kind: the class of the model.
    """
    model = model_without_storage(config, kind)
    configure(model)
    blocks = tuple(type(module) for module in model.modules() if type(module).__name__ in model._no_split_modules)
    for name, module, owner in _modules(model, "", model):
        _materialise(module)
        init(name, module, owner)
        if isinstance(module, blocks):
            place(module)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"never made real: {left}"
    return model


def model_without_storage(config: FlipConfig, kind: type[FlipPreTrainedModel] = FlipModel) -> FlipPreTrainedModel:
    """Return a model on the meta device."""
    with torch.device("meta"):
        return kind(config)


def freeze(model: FlipPreTrainedModel, parts: Sequence[str]) -> None:
    """Let the parameters of some parts, modules or single parameters by their names, stay as they start.

    Raises:
        ValueError: the model has no part of a name, or nothing is left to learn.
    """
    for part in parts:
        found = [p for name, p in model.named_parameters() if name == part or name.startswith(f"{part}.")]
        if not found:
            parts_there = dict.fromkeys(name.split(".")[0] for name, _ in model.named_parameters())
            raise UserError(
                f"model.frozen names {part!r}, which the model does not have; it has {', '.join(parts_there)}, and "
                "what is in them, such as vision_model.encoder.layers.0"
            )
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"model.frozen is {list(parts)}, which leaves nothing to learn; leave some of it out")


def compile_blocks(model: FlipPreTrainedModel) -> None:
    """Have torch.compile make graphs of the encoder blocks, each for one shape: of the image tower one for every number
    of visible patches, of the text tower one for every number of tokens, and twice as many with micro-batches, whose
    first pass has no gradients. All blocks of a tower share them.

    Evaluations run the blocks as they are (`training.evaluating`), since their last batch has a size of its own.
    """
    # By default torch takes 8 graphs of one code, and the next one ends a run that wants whole graphs. Both towers have
    # one code, so a third stage would.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_GRAPHS)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(fullgraph=True, dynamic=False)


def initial_weights(
    init_from: str | None, config: FlipConfig, seed: int, kind: type[FlipPreTrainedModel] = FlipModel
) -> ParameterInit:
    """Collective. Return what sets a new run's weights: fresh draws, or the weights of the folder or Hub name
    `init_from`, which process 0 alone reads, a tensor at a time, and sends to the others.

    Raises:
        ValueError: on every process, if there are no such weights, or one of them is not finite or has another shape in
            a model of `config`.
    """
    return fresh_weights(seed) if init_from is None else stored_weights(_Stored.of(init_from, config, kind), seed)


def fresh_weights(seed: int) -> ParameterInit:
    """Return what draws weights by the model's own `_init_weights`."""

    def init(name: str, module: nn.Module, owner: PreTrainedModel) -> None:
        key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(key[:8], "big") >> 1)
            owner._init_weights(module)

    return init


def no_weights(name: str, module: nn.Module, owner: PreTrainedModel) -> None:
    """Leave the memory as it is, for a checkpoint to fill."""


class _Stored:
    """Weights in safetensors files, of which process 0 alone has any open.

    Args:
        files: by the names of the tensors in them; empty on the other processes.
        names: of the tensors that the model takes.
    """

    def __init__(self, files: dict[str, Any], names: set[str]):
        self.files, self.names = files, names

    @classmethod
    def of(cls, init_from: str, config: FlipConfig, kind: type[FlipPreTrainedModel]) -> "_Stored":
        """Collective. Return the weights of a folder or Hub name, for a model of `config`.

        Raises:
            ValueError: on every process, as `initial_weights`.
        """
        files: dict[str, Any] = {}
        found: list[set[str] | str] = [set()]
        several = dist.is_initialized() and dist.get_world_size() > 1
        if not several or dist.get_rank() == 0:
            try:
                opened = [safe_open(file, "pt") for file in check_folder(fetch_folder(init_from))]
                files = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
                names = _usable(files, model_without_storage(config, kind))
                for name in names:
                    check_weight(name, files[name].get_tensor(name))
                found = [names]
            except (ValueError, OSError, SafetensorError) as error:
                found = [f"model.init_from {init_from!r} cannot be loaded ({str(error).splitlines()[0]})"]
        if several:
            dist.broadcast_object_list(found, device=_device())
        if isinstance(found[0], str):
            raise UserError(found[0])
        return cls(files, found[0])

    def fill(self, parameter: nn.Parameter, name: str) -> None:
        """Collective. Set a parameter that is in memory to the tensor of this name."""
        if self.files:
            parameter.data.copy_(self.files[name].get_tensor(name))
        if dist.is_initialized() and dist.get_world_size() > 1:
            sent = parameter.data.to(_device())
            dist.broadcast(sent, 0)
            parameter.data.copy_(sent)


def _device() -> torch.device:
    """Return where the process group takes tensors from."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _usable(files: dict[str, Any], model: FlipPreTrainedModel) -> set[str]:
    """Return the names of the tensors that `model` takes, and log those that it lacks and those that it leaves.

    Raises:
        ValueError: a tensor has another shape than its parameter.
    """
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for name in shapes.keys() & files.keys():
        found = files[name].get_slice(name).get_shape()
        if found != shapes[name]:
            raise UserError(f"{name} has the shape {found} there, {shapes[name]} in this recipe's model")
    # Such as the text tower's, of a classifier.
    others = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ["$^"]))
    left = {name for name in files.keys() - shapes.keys() if not others.search(name)}
    for names, words in ((shapes.keys() - files.keys(), "drawn"), (left, "left out")):
        if names:
            _log.warning("of the weights to start from, %d are %s: %s", len(names), words, ", ".join(sorted(names)))
    return shapes.keys() & files.keys()


def stored_weights(stored: _Stored, seed: int) -> ParameterInit:
    """Return what sets weights from `stored`, one tensor at a time: all processes call it for the same modules.

    Parameters that the files do not have are drawn, in the order and by the generator that `from_pretrained` draws them
    with after `torch.manual_seed(seed)`. The names of these and of tensors that the model does not have are logged.
    """
    generator = torch.Generator().manual_seed(seed)

    def init(name: str, module: nn.Module, owner: PreTrainedModel) -> None:
        prefix = f"{name}." if name else ""
        for field, parameter in module.named_parameters(recurse=False):
            if prefix + field in stored.names:
                stored.fill(parameter, prefix + field)
                # transformers' initialisers leave parameters with this mark alone.
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        if any(prefix + field not in stored.names for field, _ in module.named_parameters()):
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(generator.get_state())
                owner._init_weights(module)
                generator.set_state(torch.get_rng_state())

    return init


def _modules(module: nn.Module, name: str, owner: PreTrainedModel) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """Yield children before their parents, as transformers initialises them: a parent may overrule its children."""
    for child_name, child in module.named_children():
        child_owner = child if isinstance(child, PreTrainedModel) else owner
        yield from _modules(child, f"{name}.{child_name}" if name else child_name, child_owner)
    yield name, module, owner


def _materialise(module: nn.Module) -> None:
    """Allocate memory for the module's own parameters, and compute its fixed tables."""
    for field, parameter in module.named_parameters(recurse=False):
        empty = torch.empty_like(parameter, device="cpu")
        setattr(module, field, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    tables: dict[str, torch.Tensor] = getattr(module, "fixed_tables", dict)()
    for field, _ in list(module.named_buffers(recurse=False)):
        setattr(module, field, tables[field])
