"""The training step of open_clip, measured beside ours."""

import gc
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from flipscale.benchmarks.step import (
    StepSetting,
    TrainingStep,
    flip_step,
    matmul_peak,
    step_figures,
    time_in_turn,
    training_step,
)
from flipscale.io.errors import UserError

MASK_RATIOS = (0.0, 0.5, 0.75)


def require_open_clip() -> None:
    """Raise if open_clip cannot be imported.

    Raises:
        ValueError: open_clip is not installed.
    """
    if importlib.util.find_spec("open_clip") is None:
        raise UserError("open_clip is not installed; pip install 'flipscale[peers]'")


def open_clip_step(setting: StepSetting) -> TrainingStep:
    """Return a training step of open_clip's CLIP with the same widths, layers, heads and lengths, and its own loss.

    Its patch dropout takes the place of our mask. It gets whole images in fp32, as its loader sends them.

    Raises:
        ValueError: open_clip is not installed.
    """
    require_open_clip()
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision, text = setting.config.vision_config, setting.config.text_config
    vision_cfg = CLIPVisionCfg(
        layers=vision.num_hidden_layers,
        width=vision.hidden_size,
        head_width=vision.hidden_size // vision.num_attention_heads,
        mlp_ratio=vision.intermediate_size / vision.hidden_size,
        patch_size=vision.patch_size,
        image_size=vision.image_size,
        patch_dropout=setting.mask_ratio,
    )
    text_cfg = CLIPTextCfg(
        context_length=text.max_position_embeddings,
        vocab_size=text.vocab_size,
        width=text.hidden_size,
        heads=text.num_attention_heads,
        layers=text.num_hidden_layers,
        mlp_ratio=text.intermediate_size / text.hidden_size,
    )
    # `train`, because patch dropout does nothing in eval mode.
    model = CLIP(vision.projection_dim, vision_cfg, text_cfg).to(setting.device).train()
    if setting.compile:
        model.compile()
    shape = (setting.batch_size, vision.num_channels, vision.image_size, vision.image_size)
    images, captions, clip_loss = torch.randn(shape, device=setting.device), setting.captions(), ClipLoss()

    def loss() -> torch.Tensor:
        with setting.autocast():
            image_features, text_features, logit_scale = model(images, captions)
        return clip_loss(image_features.float(), text_features.float(), logit_scale)

    return training_step(model, loss)


def compare_steps(setting: StepSetting) -> Iterator[dict[str, Any]]:
    """Time our step and open_clip's in turn, and yield our figures with `open_clip_images_per_s` and `ratio`.

    The cases are bf16 and fp32, each unmasked, half masked and three quarters masked.

    Raises:
        ValueError: open_clip is not installed.
    """
    require_open_clip()
    for dtype in ("bf16", "fp32"):
        peak = matmul_peak(setting.device, dtype)
        for mask_ratio in MASK_RATIOS:
            case = replace(setting, dtype=dtype, mask_ratio=mask_ratio)
            steps = {"flipscale": flip_step(case), "open_clip": open_clip_step(case)}
            times = time_in_turn(steps, case.num_steps, case.device)
            # The next pair of models needs their memory.
            del steps
            gc.collect()
            ours, theirs = step_figures(case, times["flipscale"], peak), step_figures(case, times["open_clip"], peak)
            yield {
                **ours,
                "open_clip_images_per_s": theirs["images_per_s"],
                "open_clip_median_s": theirs["median_s"],
                "open_clip_share_of_matmul_peak": theirs["share_of_matmul_peak"],
                "ratio": theirs["median_s"] / ours["median_s"],
            }
