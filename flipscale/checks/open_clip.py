"""The trainer's step beside open_clip's, in turn on the same GPUs."""

import itertools
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from flipscale.checks.node import Bench, CheckError, Finding, NotRun, Row
from flipscale.checks.steps import ALONE_VARIABLES, WARM_UP, Loop, engine_variables
from flipscale.checks.timing import over_starts, timed_steps
from flipscale.engines.device import choose_kernels
from flipscale.engines.optimizers import build_optimizers, set_learning_rate
from flipscale.engines.watchdog import end_process
from flipscale.model import FlipConfig
from flipscale.objectives.build import build_config
from flipscale.recipe.optim import OptimRecipe
from flipscale.runs.complete_recipe import parse_recipe

MASK_RATIOS = (0.0, 0.5, 0.75)
CODES = ("flipscale", "open_clip")


def open_clip_step(
    config: FlipConfig, batch_size: int, mask_ratio: float, device: torch.device, bf16: bool, compiled: bool
) -> Callable[[], None]:
    """Return a training step of open_clip's CLIP with the same widths, layers, heads and lengths, as its trainer takes
    it: blocks compiled one by one, model and loss under autocast, patch dropout as mask. Several processes have DDP
    with a static graph, and a local loss with gathered gradients. AdamW is fused, as ours.

    It gets whole images in fp32, the format of its loader, which are on the device already.
    """
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision, text = config.vision_config, config.text_config

    def sizes(tower: Any) -> Row:
        ratio = tower.intermediate_size / tower.hidden_size
        return {"layers": tower.num_hidden_layers, "width": tower.hidden_size, "mlp_ratio": ratio}

    head_width, length = vision.hidden_size // vision.num_attention_heads, text.max_position_embeddings
    pixels = {"patch_size": vision.patch_size, "image_size": vision.image_size, "patch_dropout": mask_ratio}
    words = {"context_length": length, "vocab_size": text.vocab_size, "heads": text.num_attention_heads}
    towers = CLIPVisionCfg(**sizes(vision), **pixels, head_width=head_width), CLIPTextCfg(**sizes(text), **words)
    with device:
        model = CLIP(vision.projection_dim, *towers).train()  # patch dropout does nothing in eval mode
    for block in (*model.visual.transformer.resblocks, *model.transformer.resblocks) if compiled else ():
        block.compile()
    images = torch.randn(batch_size, vision.num_channels, vision.image_size, vision.image_size, device=device)
    captions = torch.randint(1, text.vocab_size, (batch_size, length), device=device)
    called, clip_loss = model, ClipLoss()
    if dist.is_initialized() and (world := dist.get_world_size()) > 1:
        called = DistributedDataParallel(model, static_graph=True)
        clip_loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=dist.get_rank(), world_size=world)
    optimizers = build_optimizers(model, OptimRecipe())
    set_learning_rate(optimizers, 1e-6)

    def step() -> None:
        torch.backends.cuda.enable_cudnn_sdp(True)  # torch's default, which open_clip leaves as it is
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = clip_loss(*called(images, captions))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    return step


def beside(recipe: str, batch_size: int, mask_ratio: float, folder: str, count: int) -> Iterator[Row]:
    """Collective. Yield the row of the trainer's steps, then of open_clip's. They take turns in each start."""
    loop = Loop(recipe, batch_size, True, folder, mask_ratio)
    loop.engine.recompute(False)
    row, batches = loop.row(batch_size), loop.batches(batch_size)
    try:
        theirs = open_clip_step(build_config(loop.recipe), batch_size, mask_ratio, loop.device, True, True)

        def ours() -> None:
            choose_kernels()  # because open_clip's step has chosen others
            loop.step(batches)

        for step in (ours, theirs):
            timed_steps(step, WARM_UP, loop.device)
        for step in (ours, theirs):
            yield row | timed_steps(step, count, loop.device)
    except torch.OutOfMemoryError:
        yield from [row | {"out_of_memory": True}] * len(CODES)
        end_process(0)  # the other ranks may wait for this one


def check_open_clip(bench: Bench) -> None:
    """Compare the step with open_clip's at three masks, on one GPU and on all."""
    if find_spec("open_clip") is None:
        raise NotRun("open_clip is absent; `pip install open_clip_torch`")
    worlds = dict.fromkeys((bench.num_gpus,) if len(bench.nodes.hosts) > 1 else (1, bench.num_gpus))
    for recipe, world, mask_ratio in itertools.product(bench.compared, worlds, MASK_RATIOS):
        name = f"open_clip {Path(recipe).stem} {mask_ratio:.0%}, {world} GPU{'s' * (world > 1)}"
        if (loss := parse_recipe(["--config", recipe]).loss.kind) != "infonce":
            bench.findings.append(Finding(name, "not run", f"the loss is {loss}, and open_clip's is infonce"))
            continue
        variables = ALONE_VARIABLES if world == 1 else engine_variables("ddp", world)
        given = {"recipe": recipe, "batch_size": bench.batch_size, "mask_ratio": mask_ratio, "count": bench.timed_steps}
        given["folder"] = str(bench.folder)
        try:
            starts = [bench.run(beside, world, variables, **given) for _ in range(bench.starts)]
        except CheckError as error:
            bench.add(name, "", [str(error)])
            continue
        common = {"recipe": recipe, "gpus": world, "mask_ratio": mask_ratio}
        places = [[[rows[place] for rows in ranks] for ranks in starts] for place in range(len(CODES))]
        both = [common | {"code": code} | over_starts(own) for code, own in zip(CODES, places, strict=True)]
        bench.figures.setdefault("open_clip", []).extend(both)
        words = [f"{row['code']} {world * row['pairs_per_s']:,.0f} pairs/s" for row in both if "seconds" in row]
        ratio = f"{both[1]['seconds'] / both[0]['seconds']:.2f} times as fast" if len(words) == 2 else "out of memory"
        bench.add(name, ", ".join([*words, ratio]))
