"""The peak memory of a training step's activations, by running the step on tensors without storage.

The model's own code runs, forward and backward, with recomputation, so a laptop can plan a model of any size.
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
from flipscale.engines.optimizers import encoder_blocks
from flipscale.model import FlipConfig
from flipscale.model.patches import num_kept
from flipscale.objectives.contrastive import Contrastive
from flipscale.objectives.objective import Objective

# The default objective of a recipe.
PLAIN = Contrastive()


@dataclass(frozen=True)
class Step:
    """Everything that decides the activations of one process in a step.

    Args:
        batch_size: pairs in the forward pass.
        bf16: whether matrix products are in bf16; otherwise they are in fp32.
        autocast: whether fp32 weights are cast for each product, as in data parallel and ZeRO; otherwise weights are in
            the precision of the products, as FSDP2 gathers them.
        device_type: `cuda` or `cpu`, which differ in the attention kernel and in autocast's operations.
        added_gradients: share of each fp32 gradient that stays on the process when it is ready; below 0 if a block's
            gradients from earlier passes are then sent away.
        image_size: image size in pixels; None for the model's own.
    """

    batch_size: int
    mask_ratio: float = 0.0
    views: int = 1
    text_mask_ratio: float = 0.0
    gradient_checkpointing: bool = False
    bf16: bool = True
    autocast: bool = True
    device_type: str = "cuda"
    added_gradients: float = 0.0
    image_size: int | None = None


@dataclass(frozen=True)
class Activations:
    """Bytes of activations, without weights and the batch.

    Args:
        saved: activations kept for the backward pass while the loss is computed.
        peak: activations and their gradients at the peak of these and the weights' gradients together.
        gradients: the weights' gradients kept at that peak.
    """

    saved: int
    peak: int
    gradients: int


def activation_bytes(config: FlipConfig, step: Step, objective: Objective = PLAIN) -> Activations:
    """Return the activations of a forward and a backward pass of the objective's model."""
    return _simulated(config.to_json_string(use_diff=False), step, objective)


@functools.lru_cache(maxsize=64)
def _simulated(config: str, step: Step, objective: Objective) -> Activations:
    with FakeTensorMode():
        return measured(FlipConfig(**json.loads(config)), step, objective)


def measured(config: FlipConfig, step: Step, objective: Objective = PLAIN) -> Activations:
    """Return `activation_bytes` by running both passes, on fake tensors if that mode is on, else on real tensors. The
    memory of the loss's own computation is not included."""
    weights_dtype = torch.bfloat16 if step.bf16 and not step.autocast else torch.float32
    model = objective.model_class._from_config(config, dtype=weights_dtype).train()
    products_dtype = torch.bfloat16 if step.bf16 else torch.float32
    model.set_attn_implementation(best_attention(torch.device(step.device_type), products_dtype))
    if step.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if step.bf16 and step.autocast and step.device_type == "cuda":
        cast_norms_as_cuda_does(model)
    batch = example_batch(config, step, objective)
    with LiveBytes([*model.parameters(), *model.buffers(), *batch.values()]) as live:
        in_blocks = {id(parameter) for block in encoder_blocks(model) for parameter in block.parameters()}

        def count_gradient(parameter: torch.Tensor) -> None:
            parameter.grad = None
            if step.added_gradients > 0.0 or id(parameter) in in_blocks:
                live.kept += int(4 * parameter.numel() * step.added_gradients)

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(count_gradient)
        with torch.autocast("cpu", torch.bfloat16, enabled=step.bf16 and step.autocast):
            output = model(**batch, image_size=step.image_size, return_logits=False)
        loss = objective.mean_loss(output)
        values = [*objective.compared(output), *objective.parameters(output).values()]
        if values:
            loss = torch.stack([value.float().sum() for value in values]).sum() + loss
        saved = live.now
        loss.backward()
    return Activations(saved, live.peak, live.kept_at_peak)


def cast_norms_as_cuda_does(model: nn.Module) -> None:
    """Cast the inputs of layer norms to fp32. CUDA's autocast does so and keeps them; the CPU's does not."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))


def example_batch(config: FlipConfig, step: Step, objective: Objective = PLAIN) -> dict[str, torch.Tensor]:
    """Return a batch with the loader's columns and shapes."""
    vision, text, decoder = config.vision_config, config.caption_config, config.decoder_config
    num_patches = vision.patches_along(step.image_size) ** 2
    kept = num_kept(num_patches, step.mask_ratio)
    images, pixels = step.batch_size * step.views, vision.num_channels * vision.patch_size**2
    tokens = num_kept(text.max_position_embeddings, step.text_mask_ratio, "tokens")
    batch = {"patches": torch.zeros(images, kept, pixels, dtype=torch.uint8)}
    if objective.takes_text:
        batch["input_ids"] = torch.zeros(step.batch_size, tokens, dtype=torch.int64)
        batch["attention_mask"] = torch.ones(step.batch_size, tokens, dtype=torch.int64)
    if decoder is not None and decoder.mask_token_id is not None:
        batch["in_parallel"] = torch.ones(step.batch_size, dtype=torch.bool)
    if "labels" in objective.columns:
        batch["labels"] = objective.example_labels(step.batch_size)
    if step.mask_ratio > 0.0:
        batch["patch_index"] = torch.zeros(images, kept, dtype=torch.int16)
        if "masked_patches" in objective.columns:
            batch["masked_patches"] = torch.zeros(images, num_patches - kept, pixels, dtype=torch.uint8)
    if step.text_mask_ratio > 0.0:
        batch["position_ids"] = torch.zeros(step.batch_size, tokens, dtype=torch.int64)
    return batch


class LiveBytes(TorchDispatchMode):
    """Count the bytes of live tensors made while this mode is on, and the bytes added to `kept`.

    `peak` and `kept_at_peak` are values at the peak of their sum.
    """

    def __init__(self, already_there: list[torch.Tensor]):
        super().__init__()
        self.now = self.peak = self.kept = self.kept_at_peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in already_there}

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known.add(key)
                self.now += size
                if self.now + self.kept > self.peak + self.kept_at_peak:
                    self.peak, self.kept_at_peak = self.now, self.kept
                weakref.finalize(storage, self._remove, key, size)
        return result

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
