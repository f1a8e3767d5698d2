"""The trainer's step under each engine: time, MFU, host, waits and memory, beside the plan's figures."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.autograd import DeviceType

from flipscale.checks.machine import contexts
from flipscale.checks.node import OFF, Bench, CheckError, Finding, Row
from flipscale.checks.timing import over_starts, timed_steps
from flipscale.data.loader import PackedBatch, on_device
from flipscale.engines.build_engine import engine_class, start_accelerator
from flipscale.engines.checkpoint import CheckpointWriter
from flipscale.engines.device import GPUS, peak_flops, peak_memory_bytes
from flipscale.engines.launch import launch_environment, launch_of
from flipscale.engines.launch_files import FOLDER
from flipscale.loop.inputs import Session
from flipscale.loop.step import forward_backward
from flipscale.loop.sync import StepSync
from flipscale.objectives.build_objective import build_config, build_objective
from flipscale.planning.flops import example_batch, pair_flops
from flipscale.planning.memory import micro_batch, recipe_memory
from flipscale.planning.time import Hardware, host_calls, speed_key, step_time, usual_share
from flipscale.process.preemption import StopRequest
from flipscale.process.slow_steps import StepWatch
from flipscale.process.watchdog import end_process
from flipscale.recipe.outputs import SaveRecipe
from flipscale.recipe.recipe import Recipe
from flipscale.recipe.schedule import Schedule, schedule_stages
from flipscale.start.complete_recipe import parse_recipe
from flipscale.start.processes import resume

ENGINES = ("ddp", "fsdp2", "hsdp", "zero3")
ALONE = "one GPU"
WARM_UP, _PROFILED = 4, 2
# With so few pairs, the host is slower than the GPU.
_HOST_PAIRS = 2
ALONE_VARIABLES = {"ACCELERATE_MIXED_PRECISION": "bf16"}


def engine_variables(engine: str, processes: int, nodes: int = 1) -> dict[str, str]:
    """Return accelerate's variables for a shipped launch file; under HSDP, each node has a copy, or half of one."""
    variables = launch_environment(FOLDER / "ds_configs" / f"{engine}.yaml", processes)
    if engine == "hsdp":
        variables["PARALLELISM_CONFIG_DP_SHARD_SIZE"] = str(processes // max(nodes, 2))
    return variables


def first_stage(
    name: str, batch_size: int, compiled: bool = False, recomputes: bool = False, mask_ratio: float | None = None
) -> Recipe:
    """Return a recipe from scratch with its first stage only, and a global batch in one piece on each process."""
    recipe = parse_recipe(["--config", name])
    first = recipe.stages[0]
    ratio = first.mask_ratio if mask_ratio is None else mask_ratio
    scratch: dict[str, Any] = dict.fromkeys(("init_from", "vision", "text", "text_positions"))
    length: dict[str, Any] = {"samples": 10**9, "share": None, "warmup_share": 0.0}
    return replace(
        recipe,
        model=replace(recipe.model, compile=compiled, gradient_checkpointing=recomputes, **scratch),
        data=replace(recipe.data, global_batch_size=batch_size, micro_batch_size=None),
        budget_minutes=None,
        stages=[replace(first, gradient_checkpointing=None, mask_ratio=ratio, **length)],
    )


class Loop:
    """Collective. The trainer's model, engine and step, on made-up batches that a thread copies to the GPU ahead."""

    def __init__(self, name: str, batch_size: int, compiled: bool, folder: str, mask_ratio: float | None = None):
        accelerator = start_accelerator([], folder)
        recipe = first_stage(name, batch_size * accelerator.num_processes, compiled, mask_ratio=mask_ratio)
        self.recipe, self.objective = replace(recipe, output_dir=folder), build_objective(recipe)
        self.accelerator, self.launch, self.device = accelerator, launch_of(os.environ), accelerator.device
        stages = schedule_stages(recipe.stages, recipe.data.global_batch_size, recipe.budget_minutes)
        self._schedule = Schedule(tuple(stages))
        self._now = self._schedule.first({})
        self.engine = resume(self.recipe, self._schedule, Session(accelerator, None, {}))
        watch = StepWatch(accelerator, Path(folder), hang_seconds=1e9)
        writer = CheckpointWriter(accelerator, Path(folder), SaveRecipe(), None)
        self._sync = StepSync(accelerator, writer, watch, StopRequest(watches_file=False))

    def batches(self, pairs: int) -> Iterator[list[PackedBatch]]:
        """Yield batches of random pixels, places and tokens, on the device."""
        config, stage = build_config(self.recipe), self.recipe.stages[0]
        step = micro_batch(self.recipe, self.launch, stage)
        content = example_batch(config, replace(step, batch_size=pairs), self.objective)
        if "patches" in content:
            content["patches"].random_(0, 256)
        if "input_ids" in content:
            content["input_ids"].random_(1, config.caption_config.vocab_size)
        if "patch_index" in content:
            images, kept = content["patch_index"].shape
            places = torch.rand(images, config.vision_config.patches_along(stage.image_size) ** 2).argsort(dim=1)
            content["patch_index"].copy_(places[:, :kept])
        host = PackedBatch.of({**content, "faults": []})

        def endless() -> Iterator[list[PackedBatch]]:
            while True:
                yield [host]  # the copy on the device is another object

        for batch in on_device(endless(), self.device):  # type: ignore[arg-type]
            yield [part.with_image_size(stage.image_size) for part in batch]

    def step(self, batches: Iterator[list[PackedBatch]]) -> None:
        """Collective. Take a step."""
        loss = forward_backward(self.engine, next(batches), self.objective)
        should_step = self._sync.start(self._now, loss, self.engine.gradient_norm(), [])
        self.engine.step(1e-6, should_step)
        self._now = self._schedule.after(self._now, None)
        self._sync.drain(wait=False)

    def take(self, batches: Iterator[list[PackedBatch]], count: int) -> Row:
        """Collective. Take steps, and return their times, see `timed_steps`."""
        return timed_steps(lambda: self.step(batches), count, self.device)

    def row(self, pairs: int) -> Row:
        return operations(self.recipe, pairs, self.accelerator)


def operations(recipe: Recipe, pairs: int, accelerator: Accelerator) -> Row:
    """Return what is known of a step of `pairs` before it is taken: its operations, and their seconds at the GPU's
    peak, None if unknown."""
    (flops,) = pair_flops(recipe).values()
    device = accelerator.device
    peak = peak_flops(device, accelerator.mixed_precision) if device.type == "cuda" else None
    return {"pairs": pairs, "flops": flops * pairs, "peak_s": peak and flops * pairs / peak}


def steps(recipe: str, batch_size: int, compiled: bool, folder: str, count: int) -> Iterator[Row]:
    """Collective. Yield the figures of steps with recomputed activations, then with kept ones, which take more."""
    loop = Loop(recipe, batch_size, compiled, folder)
    batches, device, row = loop.batches(batch_size), loop.device, loop.row(batch_size)
    for recomputes in (True, False):
        row |= {"compiled": compiled, "recomputes": recomputes}
        try:
            loop.engine.recompute(recomputes)
            loop.take(batches, WARM_UP)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            taken = row | loop.take(batches, count) | {"peak_bytes": peak_memory_bytes(device)}
            with torch.profiler.profile() as profile:
                loop.take(batches, _PROFILED)
            yield taken | shares(profile.events() or [])
        except torch.OutOfMemoryError:
            yield row | {"out_of_memory": True}
            end_process(0)  # the other ranks may wait for this one
    if not compiled:
        few = loop.batches(_HOST_PAIRS)
        loop.take(few, WARM_UP)
        calls = host_calls(loop.recipe, loop.launch, loop.recipe.stages[0], 1, 1)
        yield loop.row(_HOST_PAIRS) | loop.take(few, count) | {"calls": calls}


def shares(events: Iterable[Any]) -> Row:
    """Return the shares of the profiled time in which the GPU is idle and in which it only sends messages, and the
    number of the host's waits in a step."""
    kernels, waits = [], 0.0
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            kernels.append((event.time_range.start, event.time_range.end, event.name))
        waits += event.name.startswith("cuda") and event.name.endswith("Synchronize")
    waits = max(waits - 2, 0) / _PROFILED  # without those of `take`
    if not kernels:
        return {"idle": None, "messages": None, "waits": waits}
    window = max(end for _, end, _ in kernels) - min(start for start, _, _ in kernels)
    busy = _covered([(start, end) for start, end, _ in kernels])
    computing = _covered([(start, end) for start, end, name in kernels if "nccl" not in name.lower()])
    return {"idle": 1 - busy / window, "messages": (busy - computing) / window, "waits": waits}


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def visited(recipe: str, folder: str) -> Iterator[Row]:
    """Collective. Yield the GPUs on which this rank has memory after a few steps."""
    loop = Loop(recipe, _HOST_PAIRS, False, folder)
    loop.take(loop.batches(_HOST_PAIRS), 3)
    yield {"own": loop.device.index, "contexts": contexts()}


def plans(rows: Sequence[Row], figures: Row) -> Iterator[Row]:
    """Yield the plan's bytes and seconds for measured steps, on GPUs with the measured figures."""
    for row in rows:
        launch = launch_of(row["variables"])
        recipe = first_stage(row["recipe"], row["pairs"] * launch.num_processes, row["compiled"], row["recomputes"])
        speed = figures["step_flops_per_s"].get(speed_key(recipe))
        share = speed / Hardware().peak if speed else usual_share(recipe, GPUS["H100"])
        # The batches are made up, so no loader is waited for.
        hardware = replace(Hardware().measured(figures), images_per_worker_s=1e12, matmul_share=share)
        memory = recipe_memory(recipe, launch)
        planned = step_time(recipe, launch, recipe.stages[0], hardware)
        yield {"bytes": memory.total - memory.nccl, "seconds": planned.seconds}


def check_contexts(bench: Bench) -> None:
    """No rank may have memory on another's GPU."""
    ranks = bench.run(visited, bench.num_gpus, recipe=bench.recipes[0], folder=str(bench.folder))
    rows = [row for (row,) in ranks]
    others = {row["own"]: [index for index in row["contexts"] if index != row["own"]] for row in rows}
    faults = [f"the rank of GPU {own} has memory on GPU {', '.join(map(str, at))}" for own, at in others.items() if at]
    bench.add("contexts", "" if faults else "each rank has memory on its own GPU only", faults)


def check_steps(bench: Bench) -> None:
    """Measure the step of each recipe under each engine, with compiled blocks and without."""
    measured = bench.figures.setdefault("steps", [])
    for recipe, engine, compiled in itertools.product(bench.recipes, (ALONE, *ENGINES), (False, True)):
        name = f"step {Path(recipe).stem} {engine}{' compiled' * compiled}"
        if (refusal := _refusal(bench, engine, recipe, compiled)) is not None:
            bench.findings.append(Finding(name, "not run", refusal))
            continue
        world = 1 if engine == ALONE else bench.num_gpus
        variables = ALONE_VARIABLES if engine == ALONE else engine_variables(engine, world)
        given = {"recipe": recipe, "batch_size": bench.batch_size, "compiled": compiled, "count": bench.timed_steps}
        starts: list[list[list[Row]]] = []
        faults = []
        try:
            for _ in range(bench.starts):
                starts.append(bench.run(steps, world, variables, **given, folder=str(bench.folder)))
        except CheckError as error:
            starts, faults = starts or [error.rows], [str(error)]
        # The rows at the same place of all ranks, then of all starts.
        places = zip(*(zip(*filter(None, ranks), strict=False) for ranks in starts), strict=False)
        common = {"recipe": recipe, "engine": engine, "gpus": world, "variables": variables}
        rows = [common | over_starts(place) for place in places]
        measured += rows
        bench.add(name, "; ".join(map(_step_words, rows)), faults)


def steps_of(bench: Bench, recipe: str) -> list[Row]:
    """Return the rows of a recipe's steps on all GPUs."""
    rows = bench.figures.get("steps", [])
    return [row for row in rows if (row["recipe"], row["gpus"]) == (recipe, bench.num_gpus) and "peak_bytes" in row]


def _refusal(bench: Bench, engine: str, recipe: str, compiled: bool) -> str | None:
    """Return why a step cannot be measured here, or None."""
    if engine == ALONE:
        return None
    if bench.num_gpus < (needed := 4 if engine == "hsdp" else 2):
        return f"it needs {needed} GPUs"
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    launch = launch_of(engine_variables(engine, bench.num_gpus))
    return engine_class(launch).refusal(launch, parse_recipe(["--config", recipe]).optim.name, compiled)


def _step_words(row: Row) -> str:
    if "calls" in row:
        return f"host {1e3 * row['seconds']:.1f} ms"
    kind = "recomputed" if row["recomputes"] else "kept"
    if "out_of_memory" in row:
        return f"{kind} out of memory"
    words = [f"{name} {row[name]:.0%}" for name in ("mfu", "idle", "messages") if row[name] is not None]
    words += [f"waits {row['waits']:g}", f"{row['peak_bytes'] / 2**30:.1f} GiB"]
    return f"{kind} {1e3 * row['seconds']:.1f} ms, {', '.join(words)}"


def check_plan(bench: Bench) -> None:
    """Compare the measured memory and time of each step with the plan's, which knows the measured hardware."""
    rows = [row for row in bench.figures.get("steps", []) if "peak_bytes" in row]
    if not rows:
        raise CheckError("no step was measured")
    asked = ("recipe", "variables", "pairs", "compiled", "recomputes")
    small = [{name: row[name] for name in asked} for row in rows]  # an argument of a command is short
    (planned,) = bench.run(plans, rows=small, figures=planning_figures(bench))
    faults, ratios = [], []
    for row, plan in zip(rows, planned, strict=True):
        row["planned"] = plan
        ratios.append((memory := row["peak_bytes"] / plan["bytes"], seconds := row["seconds"] / plan["seconds"]))
        # Compiled blocks keep less than the plan counts.
        for kind, ratio in (("memory", max(memory, 1.0) if row["compiled"] else memory), ("time", seconds)):
            if abs(ratio - 1.0) > OFF:
                how = "compiled " * row["compiled"] + ("recomputed" if row["recomputes"] else "kept")
                faults.append(f"{kind} {ratio:.2f}x {Path(row['recipe']).stem} {row['engine']} {how}")
    ranges = [f"{min(found):.2f}x to {max(found):.2f}x" for found in zip(*ratios, strict=True)]
    bench.add("plan", f"measured over planned: memory {ranges[0]}, time {ranges[1]}", faults)


def planning_figures(bench: Bench) -> Row:
    """Return the measured figures that replace the plan's assumptions, for `--bench`."""
    alone = [row for row in bench.figures.get("steps", []) if row["engine"] == ALONE]
    kept = [row for row in alone if "peak_bytes" in row and not row["recomputes"]]
    keys = [speed_key(first_stage(row["recipe"], row["pairs"], row["compiled"])) for row in kept]
    # The largest message shows the links; smaller ones show latency too, which the plan adds itself.
    largest = max(bench.figures.get("collectives", []), key=lambda row: row["bytes"], default=None)
    return {
        "step_flops_per_s": {key: row["flops"] / row["seconds"] for key, row in zip(keys, kept, strict=True)},
        "call_s": min((row["seconds"] / row["calls"] for row in alone if "calls" in row), default=None),
        "node_gb_s": largest and largest["bus_bytes_per_s"] / 1e9,
        "images_per_worker_s": bench.figures.get("loader", {}).get("images_per_worker_s"),
    }
