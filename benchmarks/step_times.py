"""Speed, operations and memory of a training step, on random pairs that are already on the device."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from flipscale.engines.device import best_attention, choose_kernels, fastest_product, wait_for
from flipscale.engines.first_weights import compile_blocks
from flipscale.engines.optimizers import build_optimizers, set_learning_rate
from flipscale.model import FlipConfig, FlipModel
from flipscale.model.patches import keep_lowest, num_kept
from flipscale.objectives.contrastive import contrastive_loss
from flipscale.planning.flops import StepShape, forward_flops
from flipscale.recipe.optim import OptimRecipe

TrainingStep = Callable[[], None]
Figures = dict[str, str | int | float | bool]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class StepSetting:
    """Model and batch of a measured step.

    Args:
        size: label of the model in the figures.
        mask_ratio: fraction of the patches that is removed.
        batch_size: pairs in a step.
        dtype: `bf16` (autocast over fp32 weights, as accelerate's mixed precision) or `fp32`.
        compile: whether the blocks are compiled, as with `model.compile` of a recipe.
        num_steps: timed steps, after two untimed steps.
    """

    config: FlipConfig
    size: str = "b16"
    mask_ratio: float = 0.75
    batch_size: int = 32
    dtype: str = "bf16"
    compile: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    num_steps: int = 10

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16")

    def captions(self) -> torch.Tensor:
        """Return random token ids `(batch_size, max_position_embeddings)`, without padding."""
        text = self.config.text_config
        shape = (self.batch_size, text.max_position_embeddings)
        return torch.randint(1, text.vocab_size, shape, device=self.device)


@dataclass(frozen=True)
class StepTimes:
    """Wall seconds of each step, and the median share of CPU time in wall time times threads.

    A share below 0.9 means that other programs ran on the same cores.
    """

    seconds: list[float]
    cpu_share: float

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def flip_batch(setting: StepSetting) -> dict[str, torch.Tensor]:
    """Return a random batch in the loader's format: `patches` uint8, `input_ids`, and `patch_index` int16 if masked."""
    vision = setting.config.vision_config
    kept, pixels = num_kept(vision.num_patches, setting.mask_ratio), vision.num_channels * vision.patch_size**2
    shape = (setting.batch_size, kept, pixels)
    batch = {
        "patches": torch.randint(0, 256, shape, dtype=torch.uint8, device=setting.device),
        "input_ids": setting.captions(),
    }
    if setting.mask_ratio > 0.0:
        side = vision.image_size // vision.patch_size
        noise = torch.rand(setting.batch_size, side, side, device=setting.device)
        batch["patch_index"] = keep_lowest(noise, kept)[:, 0].to(torch.int16)
    return batch


def flip_step(setting: StepSetting) -> TrainingStep:
    """Return a whole training step: both towers, the loss in fp32, backward and AdamW."""
    model = FlipModel(setting.config).train()
    # `.to` of a transformers model is typed as taking a model.
    cast(nn.Module, model).to(setting.device)
    model.set_attn_implementation(best_attention(setting.device, DTYPES[setting.dtype]))
    if setting.compile:
        compile_blocks(model)
    batch = flip_batch(setting)

    def loss() -> torch.Tensor:
        choose_kernels()  # each time, because the step of another trainer may run in turn
        with setting.autocast():
            output = model(**batch, return_logits=False)
        return contrastive_loss(output.image_embeds, output.text_embeds, output.logit_scale)

    return training_step(model, loss)


def training_step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> TrainingStep:
    """Return a step that computes `loss` and its gradients and updates the parameters of `model` by AdamW."""
    optimizers = build_optimizers(model, OptimRecipe())
    set_learning_rate(optimizers, 1e-6)

    def step() -> None:
        loss().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def time_in_turn(steps: Mapping[str, TrainingStep], num_steps: int, device: torch.device) -> dict[str, StepTimes]:
    """Return the times of `num_steps` steps of each kind, run in turn (A B A B) after two untimed turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    shares: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-2, num_steps):
        for name, step in steps.items():
            wall, cpu = timed(step, device)
            if turn >= 0:
                seconds[name].append(wall)
                shares[name].append(cpu / (wall * torch.get_num_threads()))
    return {name: StepTimes(seconds[name], statistics.median(shares[name])) for name in steps}


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return the wall and CPU seconds of a call, including its work on the device."""
    wait_for(device)
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    wait_for(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def matmul_peak(device: torch.device, dtype: str) -> float:
    """Return the operations per second of the fastest of a few square matrix products."""
    return fastest_product(device, DTYPES[dtype], sides=(4096, 8192) if device.type == "cuda" else (1024, 2048))


def step_figures(setting: StepSetting, times: StepTimes, peak: float) -> Figures:
    """Return the setting and the figures that follow from its `times`, ready for JSON."""
    flops = forward_flops(setting.config, StepShape(1, setting.mask_ratio)).training
    images_per_s = setting.batch_size / times.median_s
    return {
        **{name: getattr(setting, name) for name in ("size", "mask_ratio", "batch_size", "dtype", "compile")},
        "device": device_label(setting.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "images_per_s": images_per_s,
        "median_s": times.median_s,
        "steps": len(times.seconds),
        "cpu_share": times.cpu_share,
        "flops_per_pair": flops,
        "matmul_peak_flops": peak,
        "share_of_matmul_peak": flops * images_per_s / peak,
    }


def device_label(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
