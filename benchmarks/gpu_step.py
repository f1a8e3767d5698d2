"""Measure the trainer's step and open_clip's in turn, at three masks, on one GPU of this machine and on all.

    python benchmarks/gpu_step.py --config b16_laion400m l16_laion400m

It writes all figures to `gpu_step.json`, and their tables and figure next to it.
"""

import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
from flipscale.checks.machine import check_machine
from flipscale.checks.node import Bench, CheckError, Finding, NotRun, Row
from flipscale.checks.report import as_json, findings_block, run_checks, write_report
from flipscale.checks.steps import ALONE_VARIABLES, WARM_UP, Loop, engine_variables, first_stage, operations
from flipscale.checks.timing import over_starts, timed_steps
from flipscale.engines.build_engine import start_accelerator
from flipscale.engines.optimizers import build_optimizers, set_learning_rate
from flipscale.evaluation.presentation.figures import COLOURS, can_draw, drawing_pyplot, save_figure, tidy
from flipscale.io.atomic import write_text
from flipscale.io.command_line import parse_command
from flipscale.io.errors import UserError
from flipscale.io.options import Pairs
from flipscale.model import FlipConfig
from flipscale.objectives.build_objective import build_config
from flipscale.process.console import report_user_errors
from flipscale.process.watchdog import end_process
from flipscale.recipe.optim import OptimRecipe
from flipscale.recipe.recipe import Recipe
from flipscale.start.complete_recipe import parse_recipe

MASK_RATIOS = (0.0, 0.5, 0.75)
CODES = ("flipscale", "open_clip")


def open_clip_step(
    config: FlipConfig,
    image_size: int | None,
    batch_size: int,
    mask_ratio: float,
    device: torch.device,
    bf16: bool,
    compiled: bool,
) -> Callable[[], None]:
    """Return a training step of open_clip's CLIP with the same widths, layers, heads and lengths, as its trainer takes
    it: model and loss under autocast, patch dropout as mask. Several processes have DDP with a static graph, and a
    local loss with gathered gradients. Blocks are compiled one by one and AdamW is fused, as ours; its trainer compiles
    the whole model. `image_size` is a stage's, by default the model's.

    It gets whole images in fp32, the format of its loader, which are on the device already.
    """
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision, text = config.vision_config, config.text_config

    def sizes(tower: Any) -> Row:
        ratio = tower.intermediate_size / tower.hidden_size
        return {"layers": tower.num_hidden_layers, "width": tower.hidden_size, "mlp_ratio": ratio}

    head_width, length = vision.hidden_size // vision.num_attention_heads, text.max_position_embeddings
    size = image_size or vision.image_size
    pixels = {"patch_size": vision.patch_size, "image_size": size, "patch_dropout": mask_ratio}
    words = {"context_length": length, "vocab_size": text.vocab_size, "heads": text.num_attention_heads}
    towers = CLIPVisionCfg(**sizes(vision), **pixels, head_width=head_width), CLIPTextCfg(**sizes(text), **words)
    with device:
        model = CLIP(vision.projection_dim, *towers).train()  # patch dropout does nothing in eval mode
    for block in (*model.visual.transformer.resblocks, *model.transformer.resblocks) if compiled else ():
        block.compile()
    images = torch.randn(batch_size, vision.num_channels, size, size, device=device)
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


def beside(recipe: str, code: str, batch_size: int, mask_ratio: float, folder: str, count: int) -> Iterator[Row]:
    """Collective. Yield the row of the trainer's steps, or of open_clip's."""
    row: Row = {}
    step: Callable[[], object]
    try:
        if code == CODES[0]:
            loop = Loop(recipe, batch_size, True, folder, mask_ratio)
            loop.engine.recompute(False)
            row, device, step = loop.row(batch_size), loop.device, partial(loop.step, loop.batches(batch_size))
        else:
            accelerator = start_accelerator([], folder)
            planned, device = first_stage(recipe, batch_size, mask_ratio=mask_ratio), accelerator.device
            row = operations(planned, batch_size, accelerator)
            pixels = planned.stages[0].image_size
            step = open_clip_step(build_config(planned), pixels, batch_size, mask_ratio, device, True, True)
        timed_steps(step, WARM_UP, device)
        yield row | timed_steps(step, count, device)
    except torch.OutOfMemoryError:
        yield row | {"out_of_memory": True}
        end_process(0)  # the other ranks may wait for this one


def unlike(recipe: Recipe) -> str:
    """Return what of a recipe's first stage open_clip's step does not learn; empty if it is the same task."""
    stage, loss, data = recipe.stages[0], recipe.loss, recipe.data
    other = {
        f"loss.kind {loss.kind}": loss.kind != "infonce",
        "text_mask_ratio": stage.text_mask_ratio > 0.0,
        "mask.views": recipe.mask.views > 1,
        "captions_per_image": loss.captions_per_image > 1,
        "reconstruction_weight": loss.reconstruction_weight > 0.0,
        "caption_weight": loss.caption_weight > 0.0,
        "teachers": bool(data.teachers),
        "stored features": bool(data.image_features or data.text_features),
        "frozen": bool(recipe.model.frozen or stage.frozen),
        "lora": recipe.optim.lora.rank is not None,
    }
    return ", ".join(name for name, is_other in other.items() if is_other)


def check_open_clip(bench: Bench) -> None:
    """Compare the step with open_clip's at three masks, on one GPU and on all. The two are first by turns."""
    if find_spec("open_clip") is None:
        raise NotRun("open_clip is absent; `pip install git+https://github.com/mlfoundations/open_clip`")
    worlds = dict.fromkeys((1, bench.num_gpus))
    for recipe, world, mask_ratio in itertools.product(bench.recipes, worlds, MASK_RATIOS):
        name = f"open_clip {Path(recipe).stem} {mask_ratio:.0%}, {world} GPU{'s' * (world > 1)}"
        if other := unlike(parse_recipe(["--config", recipe])):
            bench.findings.append(Finding(name, "not run", f"open_clip has no {other}"))
            continue
        variables = ALONE_VARIABLES if world == 1 else engine_variables("ddp", world)
        given = {"recipe": recipe, "batch_size": bench.batch_size, "mask_ratio": mask_ratio, "count": bench.timed_steps}
        given["folder"] = str(bench.folder)
        starts: dict[str, list[list[Row]]] = {code: [] for code in CODES}
        try:
            for number in range(bench.starts):
                for code in CODES if number % 2 == 0 else reversed(CODES):
                    starts[code].append([row for (row,) in bench.run(beside, world, variables, code=code, **given)])
        except CheckError as error:
            bench.add(name, "", [str(error)])
            continue
        common = {"recipe": recipe, "gpus": world, "mask_ratio": mask_ratio}
        both = [common | {"code": code} | over_starts(starts[code]) for code in CODES]
        bench.figures.setdefault("open_clip", []).extend(both)
        rates = [f"{world * row['pairs_per_s']:,.0f} pairs/s" if "seconds" in row else "out of memory" for row in both]
        words = [f"{code} {rate}" for code, rate in zip(CODES, rates, strict=True)]
        if all("seconds" in row for row in both):
            words.append(f"flipscale is {both[1]['seconds'] / both[0]['seconds']:.2f} times as fast")
        bench.add(name, ", ".join(words))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the pairs per second of a GPU, with quartiles, for each recipe, mask and number of GPUs."""
    figure, axes = drawing_pyplot().subplots(figsize=(9, 4.5), constrained_layout=True)
    names = [f"{Path(row['recipe']).stem}\n{row['mask_ratio']:.0%} masked\non {row['gpus']}" for row in rows]
    places = list(dict.fromkeys(names))
    for number, code in enumerate(CODES):
        own = [(places.index(name), row) for name, row in zip(names, rows, strict=True) if row["code"] == code]
        shown = [(place + 0.4 * number, row) for place, row in own if "seconds" in row]
        rates = [row["pairs_per_s"] for _, row in shown]
        ends = [[abs(row["pairs"] / row["quartiles"][end] - row["pairs_per_s"]) for _, row in shown] for end in (1, 0)]
        look = {"color": COLOURS[number], "yerr": ends, "capsize": 2.5, "label": code}
        axes.bar([place for place, _ in shown], rates, 0.38, **look)
    axes.set_xticks([place + 0.2 for place in range(len(places))], places, fontsize=7)
    axes.set_xlabel("recipe, mask, number of GPUs", fontsize=7)
    axes.set_ylabel("pairs/s of a GPU")
    figure.legend(loc="outside upper center", ncols=len(CODES), frameon=False)
    tidy(axes)
    save_figure(figure, path)


@dataclass(frozen=True, kw_only=True)
class GpuStep:
    """Measure the trainer's step beside open_clip's on the GPUs of this machine.

    Args:
        config: Recipes whose first stage is measured: files, or names of the package.
        batch_size: Pairs of a GPU.
        output: File of all figures. report.md and report.png are written next to it.
    """

    config: list[str] = field(default_factory=lambda: ["b16_laion400m", "l16_laion400m"])
    batch_size: Pairs = 256
    output: Path = Path("gpu_step.json")

    def run(self) -> None:
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # for the processes of the check
        num_gpus = torch.cuda.device_count()
        if not num_gpus:
            raise UserError(f"torch {torch.__version__} sees no GPU. Fix: see what `nvidia-smi` prints")
        folder = Path(tempfile.mkdtemp(prefix="gpu-step-"))
        bench = Bench(num_gpus, folder, self.config, self.batch_size, starts=3, timed_steps=50)
        run_checks(bench, lambda line: print(line, file=sys.stderr, flush=True), [check_machine, check_open_clip])
        write_text(self.output, f"{json.dumps(as_json(bench))}\n")
        page = self.output.with_name("report.md")
        write_report([bench], page)
        if can_draw() and (rows := bench.figures.get("open_clip", [])):
            draw(rows, page.with_suffix(".png"))
        print(findings_block(bench))


if __name__ == "__main__":
    from benchmarks import gpu_step  # its processes import the check by this name

    with report_user_errors():
        parse_command(gpu_step.GpuStep).run()
