"""The most memory that a training step adds, found by running it on tensors that have shapes but no content.

The model's own code runs, forward and backward, recomputation included, so a model of any size is measured on a laptop.
"""

import functools
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flipscale.engines.device import best_attention
from flipscale.model import FlipConfig, FlipModel
from flipscale.model.patches import num_kept


@dataclass(frozen=True)
class Step:
    """What decides the activations of one process in a step.

    Args:
        bf16: whether matrix products are in bf16; otherwise they are in fp32.
        autocast: the weights are fp32 and cast for each product, as in data parallel and ZeRO; otherwise they are in
            the precision that they compute in, as FSDP2 gathers them.
        device_type: `cuda` or `cpu`, which differ in the attention kernel and in what autocast casts.
    """

    batch_size: int
    mask_ratio: float = 0.0
    views: int = 1
    text_mask_ratio: float = 0.0
    gradient_checkpointing: bool = False
    bf16: bool = True
    autocast: bool = True
    device_type: str = "cuda"


def activation_bytes(config: FlipConfig, step: Step) -> int:
    """Return the most bytes that the step holds at once, without weights, their gradients and the batch."""
    return _simulated(config.to_json_string(use_diff=False), step)


@functools.lru_cache(maxsize=64)
def _simulated(config: str, step: Step) -> int:
    with FakeTensorMode():
        return peak_bytes(FlipConfig(**json.loads(config)), step)


def peak_bytes(config: FlipConfig, step: Step) -> int:
    """Return `activation_bytes`, by running the step on fake tensors if that mode is on, and otherwise on real ones."""
    weights_dtype = torch.bfloat16 if step.bf16 and not step.autocast else torch.float32
    model = FlipModel._from_config(config, dtype=weights_dtype).train()
    products_dtype = torch.bfloat16 if step.bf16 else torch.float32
    model.set_attn_implementation(best_attention(torch.device(step.device_type), products_dtype))
    if step.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if step.bf16 and step.autocast and step.device_type == "cuda":
        _cast_norms_as_cuda_does(model)
    for parameter in model.parameters():
        # Gradients are counted apart: some engines keep them, others send them away at once.
        parameter.register_post_accumulate_grad_hook(_forget_gradient)
    batch = example_batch(config, step)
    with LiveBytes([*model.parameters(), *model.buffers(), *batch.values()]) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=step.bf16 and step.autocast):
            output = model(**batch, return_logits=False)
        (output.image_embeds.float().sum() + output.text_embeds.float().sum() + output.logit_scale.sum()).backward()
    return live.peak


def _forget_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _cast_norms_as_cuda_does(model: nn.Module) -> None:
    """Cast the inputs of layer norms to fp32, in which CUDA's autocast computes and keeps them; the CPU's does not."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))


def example_batch(config: FlipConfig, step: Step) -> dict[str, torch.Tensor]:
    """Return a batch with the columns and shapes that the loader sends."""
    vision, text = config.vision_config, config.text_config
    kept = num_kept(vision.num_patches, step.mask_ratio)
    images, pixels = step.batch_size * step.views, vision.num_channels * vision.patch_size**2
    tokens = num_kept(text.max_position_embeddings, step.text_mask_ratio, "tokens")
    batch = {
        "patches": torch.zeros(images, kept, pixels, dtype=torch.uint8),
        "input_ids": torch.zeros(step.batch_size, tokens, dtype=torch.int64),
        "attention_mask": torch.ones(step.batch_size, tokens, dtype=torch.int64),
    }
    if step.mask_ratio > 0.0:
        batch["patch_index"] = torch.zeros(images, kept, dtype=torch.int16)
    if step.text_mask_ratio > 0.0:
        batch["position_ids"] = torch.zeros(step.batch_size, tokens, dtype=torch.int64)
    return batch


class LiveBytes(TorchDispatchMode):
    """Count the bytes of live tensors that were made while this mode is on. `peak` is the most there were at once."""

    def __init__(self, already_there: list[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in already_there}

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
