"""The weights that a run starts from: drawn, or read from a model folder, one module at a time.

The model is built on the meta device and gets memory block by block, so no process holds more than its shard and one
block. Draws are keyed by (seed, module name): a recipe starts from the same numbers with all engines and processes.
"""

import hashlib
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from flipscale.engines.device import share_compilers
from flipscale.io.digests import check_weight, weights_digest
from flipscale.io.errors import UserError, first_line
from flipscale.io.model_folder import fetch_folder, open_weight_file
from flipscale.model import FlipConfig, FlipModel, FlipPreTrainedModel
from flipscale.recipe.model import Towers

# Sets a module's own parameters, given its name, the module, and the model or tower whose rules it follows.
ParameterInit = Callable[[str, nn.Module, PreTrainedModel], None]

_log = logging.getLogger(__name__)

# Learned positions of a text tower, and how many of the first ones LongCLIP (arXiv 2403.15378) leaves as they are.
_TEXT_POSITIONS = re.compile(r"text_model\.embeddings\.position_embedding\.weight")
_LONGCLIP_KEPT = 20
# The table of a text tower's pieces.
_TEXT_ROWS = re.compile(r"text_model\.((embeddings\.)?(token|word|tok)_embeddings?|embed_tokens)\.weight")
# Names of weights that a line of the log has.
_MOST_LISTED = 8

# More than any list of stages needs. A limit is needed to notice a fault that makes a graph for every step.
_MAX_GRAPHS = 256


def build_weights(
    config: FlipConfig,
    configure: Callable[[FlipPreTrainedModel], None],
    init: ParameterInit,
    place: Callable[[nn.Module], object],
    kind: type[FlipPreTrainedModel] = FlipModel,
) -> FlipPreTrainedModel:
    """Return a model of `config` in fp32, allocated block by block.

    Args:
        configure: function that changes the model before it has weights (attention kernel, recomputation, compilation).
        init: function that sets a module's weights; result of `initial_weights`, or `no_weights`.
        place: function that shards a block or moves it to its device, called as soon as the block has weights.
    """
    model = model_without_storage(config, kind)
    configure(model)
    blocks = tuple(type(module) for module in model.modules() if type(module).__name__ in model._no_split_modules)
    for name, module, owner in _modules(model, "", model):
        for field, parameter in module.named_parameters(recurse=False):
            empty = torch.empty_like(parameter, device="cpu")
            setattr(module, field, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        tables: dict[str, torch.Tensor] = getattr(module, "fixed_tables", dict)()
        for field, buffer in list(module.named_buffers(recurse=False)):
            if tables or field == "position_ids":
                setattr(module, field, tables[field] if tables else torch.arange(buffer.shape[-1]).expand(1, -1))
            else:
                setattr(module, field, torch.empty_like(buffer, device="cpu"))
                fresh_weights(0)(name, module, owner)  # transformers computes other buffers with the weights
        init(name, module, owner)
        if isinstance(module, blocks):
            place(module)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"never allocated: {left}"
    return model


def model_without_storage(config: FlipConfig, kind: type[FlipPreTrainedModel] = FlipModel) -> FlipPreTrainedModel:
    with torch.device("meta"):
        return kind(config)


def compile_blocks(model: FlipPreTrainedModel, packs_captions: bool = False) -> None:
    """Compile the encoder blocks with torch.compile, one graph for each shape.

    The image tower has a graph for every number of visible patches, the text tower for every number of tokens. With
    packed captions, the text tower has two: one for the first number of rows, one for all others. More would make ranks
    wait for one that compiles at a later step. With micro-batches there are twice as many, because the first pass has
    no gradients. All blocks of a tower share graphs.

    Evaluations run the uncompiled blocks (`loop.between_steps`), because their last batch has another size.
    """
    # torch's limit is 8 graphs of one code, and both towers share one code, so a third stage could end the run.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_GRAPHS)
    # DDP would split a block's graph wherever one of its buckets of gradients is full. Blocks are small enough as they
    # are: messages overlap with the backward passes of other blocks.
    torch._dynamo.config.optimize_ddp = False
    # torch's key of stored code leaves the CPU's vectors out: code of 512 bits, loaded for 256, computes NaN.
    own_tag = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "")  # torch's default
    torch.compiler.config.cache_key_tag = f"{own_tag}{torch.backends.cpu.get_cpu_capability()}"
    share_compilers()
    texts = set(model.get_submodule("text_model").modules()) if packs_captions else set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            # By default, torch takes a size that has changed once for one that changes.
            module.compile(fullgraph=True, dynamic=None if module in texts else False)


def initial_weights(
    init_from: str | Towers | None,
    config: Any,
    seed: int,
    kind: type[FlipPreTrainedModel] = FlipModel,
    text_positions: str | None = None,
    embedded: Mapping[str, tuple[str, str]] | None = None,
    rows: Mapping[int, int] | None = None,
) -> ParameterInit:
    """Collective. Return the initialiser of a new run. All processes call it for the same modules.

    Process 0 alone reads stored weights, one tensor at a time, and sends them to the others. Missing parameters are
    drawn in the order and with the generator of `from_pretrained` after `torch.manual_seed(seed)`.

    Args:
        init_from: folder or Hub name of a model, or those of two towers; None for fresh draws.
        text_positions: `ModelRecipe.text_positions`.
        rows: result of `text_rows`: the stored row of each piece that has one. Rows of other pieces are drawn.
        embedded: folder of the stored features of each tower, by its name in the model, and the digest of the weights
            that made them.

    Raises:
        UserError: on every process: no such weights, or one is not finite or not of the shape in a model of `config`.
    """
    if isinstance(init_from, Towers) and not any(name and not name.startswith("hf:") for name in init_from):
        init_from = None  # other libraries' models have no weights in ours
    if init_from is None:
        return fresh_weights(seed)
    stored: dict[str, Callable[[], torch.Tensor]] = {}
    several = dist.is_initialized() and dist.get_world_size() > 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names_or_fault: list[set[str] | str] = [set()]
    start = "model.init_from" if isinstance(init_from, str) else str(init_from)
    if not several or dist.get_rank() == 0:
        try:
            stored, shapes = _stored(init_from, config)
            model = model_without_storage(config, kind)
            usable = _usable(shapes, model, start, text_positions, rows is not None)
            for name in usable:
                check_weight(name, stored[name]())
            for tower, (folder, digest) in (embedded or {}).items():
                if weights_digest(stored[name]() for name in usable if name.startswith(f"{tower}.")) != digest:
                    raise UserError(f"its {tower} is not that of the features in {folder}; embed by this model")
            names_or_fault = [usable]
        except (ValueError, OSError, SafetensorError) as error:
            named = f"{start} {init_from!r}" if isinstance(init_from, str) else start
            names_or_fault = [f"{named} cannot be loaded ({first_line(error)})"]
    if several:
        dist.broadcast_object_list(names_or_fault, device=device)
    (names,) = names_or_fault
    if isinstance(names, str):
        raise UserError(names)
    generator = torch.Generator().manual_seed(seed)

    def draw(module: nn.Module, owner: PreTrainedModel) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator.get_state())
            owner._init_weights(module)
            generator.set_state(torch.get_rng_state())

    def init(name: str, module: nn.Module, owner: PreTrainedModel) -> None:
        prefix = f"{name}." if name else ""
        for field, parameter in module.named_parameters(recurse=False):
            if prefix + field not in names:
                continue
            is_matched = rows is not None and _TEXT_ROWS.fullmatch(prefix + field)
            if is_matched:
                draw(module, owner)
            if stored:
                weight = stored[prefix + field]()
                if _TEXT_POSITIONS.fullmatch(prefix + field) and len(weight) != len(parameter):
                    assert text_positions is not None, "`_usable` refuses"
                    weight = longer_positions(weight, len(parameter), text_positions)
                if is_matched and rows is not None:
                    known = {row: there for row, there in rows.items() if there < len(weight)}
                    parameter.data[[*known]] = weight[[*known.values()]].to(parameter.dtype)
                else:
                    parameter.data.copy_(weight.reshape(parameter.shape))
            if several:
                sent = parameter.data.to(device)
                dist.broadcast(sent, 0)
                parameter.data.copy_(sent)
            # transformers' initialisers skip parameters with this mark.
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        if any(prefix + field not in names for field, _ in module.named_parameters()):
            draw(module, owner)

    return _with_lora(init, seed)


def _with_lora(init: ParameterInit, seed: int) -> ParameterInit:
    """Return an initialiser also of a model with LoRA, which changes nothing at first: A is drawn, and B is zero."""

    def of_module(name: str, module: nn.Module, owner: PreTrainedModel) -> None:
        if ".lora_" not in name:
            return init(name.replace(".base_layer", ""), module, owner)
        for parameter in module.parameters(recurse=False):
            nn.init.zeros_(parameter)
            if ".lora_A." in name:
                with _draws_of(seed, name):
                    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))  # as PEFT does

    return of_module


def longer_positions(table: torch.Tensor, count: int, kind: str) -> torch.Tensor:
    """Return positions for `count` tokens, interpolated between those of `table`, `(positions, width)`.

    `stretched` keeps the first and the last position. `longclip` keeps the first 20 and stretches the others, so that
    the positions after the last old one are extrapolated, as in LongCLIP (77 become 248).
    """
    places = torch.arange(count, dtype=torch.float64)
    if kind == "longclip":
        rest = places[_LONGCLIP_KEPT:] - _LONGCLIP_KEPT
        places[_LONGCLIP_KEPT:] = _LONGCLIP_KEPT + rest * (len(table) - _LONGCLIP_KEPT) / (count - _LONGCLIP_KEPT)
    else:
        places *= (len(table) - 1) / (count - 1)
    lower = places.long().clamp(max=len(table) - 2)
    return torch.lerp(table[lower], table[lower + 1], (places - lower)[:, None].to(table.dtype))


def _stored(start: str | Towers, config: Any) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, list[int]]]:
    """Return a reader and the shape of each stored weight, by its name in the model of a configuration."""
    if config.model_type == "vision-text-dual-encoder":
        from flipscale.engines.pretrained_towers import tower_weights  # imports the models

        weights = tower_weights(start, config)
        readers: dict[str, Callable[[], torch.Tensor]] = {name: partial(weights.__getitem__, name) for name in weights}
        return readers, {name: list(weight.shape) for name, weight in weights.items()}
    folders = {"": start} if isinstance(start, str) else {"vision_model.": start.vision, "text_model.": start.text}
    owners = {
        name: file
        for prefix, folder in folders.items()
        if folder and not folder.startswith("hf:")
        for name, file in open_weight_file(fetch_folder(folder)).items()
        if name.startswith(prefix)
    }
    shapes = {name: file.get_slice(name).get_shape() for name, file in owners.items()}
    readers = {name: partial(file.get_tensor, name) for name, file in owners.items()}
    return readers, shapes


def _usable(
    stored: dict[str, list[int]], model: FlipPreTrainedModel, start: str, positions: str | None, matches: bool
) -> set[str]:
    """Return the names of the tensors that `model` uses, and log missing and unused names. Raise UserError if a tensor
    has another shape, or under half of a tower is there. One whole tower may be missing."""
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for name in filter(stored.__contains__, shapes):
        found = stored[name] or [1]  # transformers' CLIP has a logit_scale of shape ()
        if _TEXT_POSITIONS.fullmatch(name) and found[1:] == shapes[name][1:] and found != shapes[name]:
            _check_longer(found[0], shapes[name][0], positions)
        elif matches and _TEXT_ROWS.fullmatch(name) and found[1:] == shapes[name][1:]:
            continue
        elif found != shapes[name]:
            # A decoder that predicts in parallel has a row for masked words.
            one_more = (
                name.startswith("decoder.") and found[1:] == shapes[name][1:] and abs(found[0] - shapes[name][0]) == 1
            )
            fix = "; give it the start's loss.caption_kind or loss.options.prediction" if one_more else ""
            raise UserError(f"{name} has the shape {found} there, {shapes[name]} in this recipe's model{fix}")
    # Expected names, such as the text tower's for a classifier, are not logged.
    others = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ["$^"]))
    left = {name for name in stored.keys() - shapes.keys() if not others.search(name)}
    for names, words in ((shapes.keys() - stored.keys(), "drawn"), (left, "left out")):
        if names:
            listed = ", ".join(sorted(names)[:_MOST_LISTED]) + (", ..." if len(names) > _MOST_LISTED else "")
            _log.warning("of the weights in %s, %d are %s: %s", start, len(names), words, listed)
    taken = shapes.keys() & stored.keys()
    counts = []
    for tower, prefix in (("image", "vision_model."), ("text", "text_model.")):
        if own := {name for name in shapes if name.startswith(prefix)}:
            counts.append((len(own & taken), len(own), tower))
    words = " and ".join(f"{count} of {own} tensors of the {tower} tower" for count, own, tower in counts)
    under_half = [count for count, own, _ in counts if 2 * count < own]
    if any(under_half) or len(under_half) == len(counts):
        raise UserError(f"it has {words} of this recipe's model; use weights of its family, or convert them")
    _log.info("%s: %s", start, words)
    return taken


def _check_longer(before: int, count: int, text_positions: str | None) -> None:
    """Raise unless `longer_positions` can make a text tower's positions longer."""
    if text_positions is None or not (_LONGCLIP_KEPT if text_positions == "longclip" else 1) < before < count:
        raise UserError(
            f"it has {before} text positions, and text_config.max_position_embeddings is {count}; use {before}, or a "
            f"larger one and model.text_positions, now {text_positions}: stretched, or longclip if the weights have "
            f"more than {_LONGCLIP_KEPT}"
        )


def fresh_weights(seed: int) -> ParameterInit:
    """Return an initialiser that draws weights by the model's own `_init_weights`."""

    def init(name: str, module: nn.Module, owner: PreTrainedModel) -> None:
        with _draws_of(seed, name):
            owner._init_weights(module)

    return init


@contextmanager
def _draws_of(seed: int, name: str) -> Iterator[None]:
    """Draw random numbers that depend only on the seed and the module's name."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(key[:8], "big") >> 1)
        yield


def no_weights(name: str, module: nn.Module, owner: PreTrainedModel) -> None:
    """Leave the memory uninitialised, because a checkpoint fills it."""


def _modules(module: nn.Module, name: str, owner: PreTrainedModel) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """Yield children before their parents, as transformers initialises them: a parent may overwrite its children."""
    for child_name, child in module.named_children():
        child_owner = child if isinstance(child, PreTrainedModel) else owner
        yield from _modules(child, f"{name}.{child_name}" if name else child_name, child_owner)
    yield name, module, owner
