"""Measure the trainer's step and open_clip's in turn, at three masks, on one GPU of this machine and on all. open_clip
counts as the fastest way in which it compiles or shards its step.

    python benchmarks/gpu_step.py --config b16_laion400m l16_laion400m

It writes all figures to `gpu_step.json`, and their tables and figure next to it.
"""

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.open_clip_step import WAYS, missing, open_clip_step
from flipscale.checks.machine import check_machine
from flipscale.checks.node import Bench, CheckError, Finding, Row
from flipscale.checks.report import as_json, findings_block, run_checks, write_report
from flipscale.checks.steps import ALONE_VARIABLES, WARM_UP, Loop, engine_variables, first_stage, operations
from flipscale.checks.timing import over_starts, timed_steps
from flipscale.engines.build_engine import start_accelerator
from flipscale.evaluation.presentation.figures import COLOURS, can_draw, drawing_pyplot, save_figure, tidy
from flipscale.io.atomic import write_text
from flipscale.io.command_line import parse_command
from flipscale.io.errors import UserError
from flipscale.io.options import Pairs
from flipscale.objectives.build_objective import build_config
from flipscale.process.console import report_user_errors
from flipscale.process.watchdog import end_process
from flipscale.recipe.recipe import Recipe
from flipscale.start.complete_recipe import parse_recipe

MASK_RATIOS = (0.0, 0.5, 0.75)
OURS = "flipscale"


def beside(recipe: str, code: str, batch_size: int, mask_ratio: float, folder: str, count: int) -> Iterator[Row]:
    """Collective. Yield the row of the trainer's steps, or of open_clip's."""
    row: Row = {}
    step: Callable[[], object]
    try:
        if code == OURS:
            loop = Loop(recipe, batch_size, True, folder, mask_ratio)
            loop.engine.recompute(False)
            row, device, step = loop.row(batch_size), loop.device, partial(loop.step, loop.batches(batch_size))
        else:
            accelerator = start_accelerator([], folder)
            planned, device = first_stage(recipe, batch_size, mask_ratio=mask_ratio), accelerator.device
            row = operations(planned, batch_size, accelerator)
            pixels = planned.stages[0].image_size
            way = code.removeprefix("open_clip ")
            step = open_clip_step(build_config(planned), pixels, batch_size, mask_ratio, device, True, way)
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
    """Compare the step with open_clip's at three masks, on one GPU and on all."""
    worlds = dict.fromkeys((1, bench.num_gpus))
    for way, world in itertools.product(WAYS, worlds):
        if lack := missing(way, world):
            bench.findings.append(Finding(f"open_clip {way}, {gpus(world)}", "not run", lack))
    for recipe, world, mask_ratio in itertools.product(bench.recipes, worlds, MASK_RATIOS):
        name = f"open_clip {Path(recipe).stem} {mask_ratio:.0%}, {gpus(world)}"
        if other := unlike(parse_recipe(["--config", recipe])):
            bench.findings.append(Finding(name, "not run", f"open_clip has no {other}"))
        else:
            compare(bench, name, recipe, world, mask_ratio)


def compare(bench: Bench, name: str, recipe: str, world: int, mask_ratio: float) -> None:
    """Add a finding on the step and open_clip's, and their rows.

    A first start measures each way of open_clip, the others only its fastest; the two codes are first by turns."""
    variables = ALONE_VARIABLES if world == 1 else engine_variables("ddp", world)
    given = {"recipe": recipe, "batch_size": bench.batch_size, "mask_ratio": mask_ratio, "count": bench.timed_steps}
    given["folder"] = str(bench.folder)
    starts: dict[str, list[list[Row]]] = {}
    faults = []

    def start(code: str) -> None:
        try:
            ranks = bench.run(beside, world, variables, code=code, **given)
            starts.setdefault(code, []).append([row for (row,) in ranks])
        except CheckError as error:
            faults.append(f"{code}: {error}")

    for code in (OURS, *(f"open_clip {way}" for way in WAYS if not missing(way, world))):
        start(code)
    rates = {code: over_starts(ranks).get("pairs_per_s", 0.0) for code, ranks in starts.items() if code != OURS}
    pair = (OURS, *sorted(rates, key=lambda code: -rates[code])[:1])
    for number in range(1, bench.starts):
        for code in pair if number % 2 == 0 else reversed(pair):
            start(code)
    common = {"recipe": recipe, "gpus": world, "mask_ratio": mask_ratio}
    rows = {code: common | {"code": code} | over_starts(ranks) for code, ranks in starts.items()}
    bench.figures.setdefault("open_clip", []).extend(rows.values())
    shown = [rows[code] for code in pair if code in rows]
    words = [f"{row['code']} {world * row['pairs_per_s']:,.0f} pairs/s" for row in shown if "seconds" in row]
    words += [f"{row['code']} out of memory" for row in shown if "seconds" not in row]
    if len(words) == 2 and all("seconds" in row for row in shown):
        words.append(f"flipscale is {shown[1]['seconds'] / shown[0]['seconds']:.2f} times as fast")
    bench.add(name, ", ".join(words), faults)


def gpus(world: int) -> str:
    """Return the number of GPUs in words."""
    return f"{world} GPU{'s' * (world > 1)}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the pairs per second of a GPU, with quartiles, for each recipe, mask and number of GPUs."""
    figure, axes = drawing_pyplot().subplots(figsize=(12, 5), constrained_layout=True)
    names = [f"{Path(row['recipe']).stem}\n{row['mask_ratio']:.0%} masked\n{gpus(row['gpus'])}" for row in rows]
    places, codes = list(dict.fromkeys(names)), list(dict.fromkeys(row["code"] for row in rows))
    width = 0.8 / len(codes)
    for number, code in enumerate(codes):
        own = [(places.index(name), row) for name, row in zip(names, rows, strict=True) if row["code"] == code]
        shown = [(place + width * number, row) for place, row in own if "seconds" in row]
        rates = [row["pairs_per_s"] for _, row in shown]
        ends = [[abs(row["pairs"] / row["quartiles"][end] - row["pairs_per_s"]) for _, row in shown] for end in (1, 0)]
        look = {"color": COLOURS[number], "yerr": ends, "capsize": 2.5, "label": code}
        axes.bar([place for place, _ in shown], rates, 0.95 * width, **look)
    axes.set_xticks([place + (0.8 - width) / 2 for place in range(len(places))], places, fontsize=7)
    axes.set_xlabel("recipe, mask, number of GPUs", fontsize=7)
    axes.set_ylabel("pairs/s of a GPU")
    figure.legend(loc="outside upper center", ncols=len(codes), frameon=False)
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
