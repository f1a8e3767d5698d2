"""Measure our training step and open_clip's in turn, masked and unmasked, in bf16 and fp32.

    python benchmarks/step.py --size b16 --batch_size 32
    python benchmarks/step.py --size l16 --batch_size 256 --compile --steps 50 --json   # on a GPU, three times

With `--compile`, the blocks of both are compiled, each by itself. A line of JSON has medians and quartiles, pairs per
joule, versions, the commit and the driver. `flipscale bench step` measures ours alone.
"""

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

import flipscale
from flipscale.bench import BenchStep
from flipscale.checks.machine import query_gpus
from flipscale.engines.device import wait_for
from flipscale.io.command_line import parse_command
from flipscale.io.options import Count
from flipscale.io.surroundings import known, own_commit
from flipscale.planning.bench_step import (
    Figures,
    StepSetting,
    StepTimes,
    TrainingStep,
    flip_step,
    matmul_peak,
    step_figures,
    time_in_turn,
    training_step,
)

MASK_RATIOS = (0.0, 0.5, 0.75)
# Steps in a GPU's queue while nvidia-smi answers.
_QUEUED = 5


def open_clip_step(setting: StepSetting) -> TrainingStep:
    """Return a training step of open_clip's CLIP with the same widths, layers, heads and lengths, and its own loss.

    Its patch dropout replaces our mask. It gets whole images in fp32, the format of its loader.
    """
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
        for block in (*model.visual.transformer.resblocks, *model.transformer.resblocks):
            block.compile()
    shape = (setting.batch_size, vision.num_channels, vision.image_size, vision.image_size)
    images, captions, clip_loss = torch.randn(shape, device=setting.device), setting.captions(), ClipLoss()

    def loss() -> torch.Tensor:
        torch.backends.cuda.enable_cudnn_sdp(True)  # torch's default, which open_clip leaves as it is
        with setting.autocast():
            image_features, text_features, logit_scale = model(images, captions)
        return clip_loss(image_features.float(), text_features.float(), logit_scale)

    return training_step(model, loss)


def compare_steps(setting: StepSetting) -> Iterator[Figures]:
    """Yield our figures with `open_clip_images_per_s` and `ratio` for each precision and mask ratio."""
    for dtype in ("bf16", "fp32"):
        peak = matmul_peak(setting.device, dtype)
        for mask_ratio in MASK_RATIOS:
            case = replace(setting, dtype=dtype, mask_ratio=mask_ratio)
            steps = {"flipscale": flip_step(case), "open_clip": open_clip_step(case)}
            times = time_in_turn(steps, case.num_steps, case.device)
            loads = {code: under_load(step, case.device) for code, step in steps.items()}
            # Free the models, because the next pair needs their memory.
            del steps
            gc.collect()
            ours, theirs = step_figures(case, times["flipscale"], peak), step_figures(case, times["open_clip"], peak)
            yield {
                **ours,
                "open_clip_images_per_s": theirs["images_per_s"],
                "open_clip_median_s": theirs["median_s"],
                "open_clip_share_of_matmul_peak": theirs["share_of_matmul_peak"],
                "ratio": times["open_clip"].median_s / times["flipscale"].median_s,
                **{"open_clip": open_clip.__version__, "commit": own_commit(Path(flipscale.__file__).parent) or ""},
                **beside("", times["flipscale"], loads["flipscale"], ours),
                **beside("open_clip_", times["open_clip"], loads["open_clip"], theirs),
            }


def under_load(step: TrainingStep, device: torch.device) -> dict[str, str]:
    """Return what nvidia-smi says of a GPU while it computes steps; empty without one."""
    if device.type != "cuda":
        return {}
    for _ in range(_QUEUED):
        step()
    states = query_gpus(device)
    wait_for(device)
    return next(iter(states), {})


def beside(prefix: str, times: StepTimes, state: dict[str, str], figures: Figures) -> Figures:
    """Return the quartiles of a step in seconds and, of a GPU, its driver, clock in MHz, watts and pairs per joule."""
    first, third = np.percentile(times.seconds, [25, 75]).tolist()
    found: Figures = {f"{prefix}first_quartile_s": first, f"{prefix}third_quartile_s": third}
    if (watts := known(lambda: float(state["power.draw"]))) is not None:
        found |= {"driver": state["driver_version"], f"{prefix}mhz": float(state["clocks.sm"]), f"{prefix}watts": watts}
        found[f"{prefix}pairs_per_joule"] = float(figures["images_per_s"]) / watts
    return found


@dataclass(frozen=True, kw_only=True)
class CompareSteps(BenchStep):
    """Measure the training step beside open_clip's.

    Args:
        steps: Timed steps, after two untimed steps.
    """

    steps: Count = 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a JSON line or a table row for each case, as soon as it is measured."""
    args = parse_command(CompareSteps, arguments)
    setting = args.setting()
    if not args.json:
        print(f"{setting.size}, batch {setting.batch_size}, {setting.device.type}, {torch.get_num_threads()} threads")
        print("| dtype | mask | flipscale, images/s | open_clip, images/s | ratio | of matmul peak | CPU share |")
        print("|---|---|---|---|---|---|---|")
    for row in compare_steps(setting):
        line = (
            "| {dtype} | {mask_ratio:.0%} | {images_per_s:.1f} | {open_clip_images_per_s:.1f} | {ratio:.2f} | "
            "{share_of_matmul_peak:.0%} and {open_clip_share_of_matmul_peak:.0%} | {cpu_share:.2f} |"
        )
        print(json.dumps(row) if args.json else line.format(**row), flush=True)


if __name__ == "__main__":
    main()
