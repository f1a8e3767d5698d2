"""The memory that torch's own trackers find in a step of the real engine, as rank 0 of a fake world.

The planner's figures are checked against it. `PYTHONPATH=tests python tests/planning/tracked.py` prints the table of
docs/planning.md.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from simulated.world import fake_processes
from torch import nn
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker

from flipscale.data.loader import BATCHES_ON_DEVICE
from flipscale.engines import first_weights
from flipscale.engines.build_engine import build_engine
from flipscale.engines.ddp import DdpEngine
from flipscale.engines.engine import Engine
from flipscale.engines.launch import Launch
from flipscale.loop.step import forward_backward
from flipscale.model.modeling_flip import as_on_gpu
from flipscale.objectives import contrastive
from flipscale.objectives.build_objective import build_config, build_objective
from flipscale.planning.flops import example_batch
from flipscale.planning.memory import MemoryPlan, cast_norms_as_cuda_does, heaviest_step, recipe_memory
from flipscale.recipe.recipe import Recipe
from flipscale.start.complete_recipe import parse_recipe

CPU = torch.device("cpu")
LAUNCHES = {
    "ddp": Launch("ddp", 256, "bf16"),
    "fsdp2": Launch("fsdp2", 256, "bf16"),
    "hsdp": Launch("fsdp2", 256, "bf16", shard_size=8),
}


def tracked_bytes(recipe: Recipe, launch: Launch) -> dict[str, int]:
    """Return the most bytes that a step holds by torch's tracker, by its kinds and in total.

    The second step is tracked, when there are moments. All tensors are fake ones on the CPU, but attention and the
    precision of norms are CUDA's.
    """
    with fake_processes(0, launch), as_on_gpu():
        accelerator: Any = SimpleNamespace(
            device=CPU,
            num_processes=launch.num_processes,
            process_index=0,
            is_main_process=True,
            autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=launch.bf16),
        )
        engine = build_engine(accelerator, launch, recipe.optim, recipe.data.global_batch_size)
        with _fake_tensors():
            objective = build_objective(recipe)
            with mock.patch.object(DdpEngine, "_wrap", lambda self: self.model):
                engine.build(
                    build_config(recipe), _as_cuda(recipe, engine), first_weights.no_weights, objective.model_class
                )
            engine.model.train()
            _take_step(engine, recipe, launch, None)
            tracker = _tracker(engine)
            with tracker:
                _take_step(engine, recipe, launch, tracker)
            found = tracker.get_tracker_snapshot("peak")[CPU]
    return {getattr(kind, "value", kind): size for kind, size in found.items()}


def _take_step(engine: Engine, recipe: Recipe, launch: Launch, tracker: MemTracker | None) -> None:
    step, objective = heaviest_step(recipe, launch), build_objective(recipe)
    parts = recipe.data.global_batch_size // launch.num_processes // step.batch_size
    # Those that the feeder holds for later steps, and the one of the step before.
    waiting = [example_batch(build_config(recipe), step, objective) for _ in range((BATCHES_ON_DEVICE - 1) * parts)]
    batch = [example_batch(build_config(recipe), step, objective) for _ in range(parts)]

    call = type(engine).__call__

    def forward(engine: Engine, **batch: torch.Tensor) -> Any:
        # It refuses to see a module's forward pass twice, but the sum does not need its records of modules.
        if tracker is not None:
            tracker.reset_mod_stats()
        return call(engine, **batch)

    with mock.patch.object(type(engine), "__call__", forward):
        forward_backward(engine, batch, objective)
    engine.gradient_norm()
    engine.step(1e-4, torch.ones(()))
    del waiting


def _tracker(engine: Engine) -> MemTracker:
    if not isinstance(engine, DdpEngine):
        return FSDPMemTracker(engine.model, engine.optimizers[-1])
    tracker = MemTracker()
    tracker.track_external(engine.model, *engine.optimizers, *(p.grad for p in engine.model.parameters()))
    return tracker


def _as_cuda(recipe: Recipe, engine: Engine) -> Callable[[nn.Module], None]:
    def configure(model: Any) -> None:
        model.set_attn_implementation("sdpa")
        if engine.autocasts:
            cast_norms_as_cuda_does(model)
        if recipe.model.gradient_checkpointing:
            model.activation_checkpointing_enable()

    return configure


def _sum_to_owner(parts: torch.Tensor) -> torch.Tensor:
    """What GPUs do, where CPUs send more."""
    mine = torch.empty_like(parts[0])
    dist.reduce_scatter_single(mine, parts.flatten(0, 1).contiguous())
    return mine


@contextmanager
def _fake_tensors() -> Iterator[None]:
    def some_number(mode: Any, func: Any, tensor: torch.Tensor) -> Any:
        return 1.0 if tensor.dtype.is_floating_point else 1

    # DDP's reducer is C++ that wants real memory. Instead of its buckets, the gradients themselves are kept.
    def keep(self: torch.optim.Optimizer, set_to_none: bool = True) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if hasattr(parameter, "device_mesh"):
                parameter.grad = None

    tiling = contrastive._tiling
    numbers = {torch.ops.aten._local_scalar_dense.default: some_number}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(fake_impls.op_implementations_dict, numbers))
        stack.enter_context(mock.patch.object(torch.optim.Optimizer, "zero_grad", keep))
        stack.enter_context(mock.patch.object(contrastive, "_tiling", lambda *sizes: tiling(*sizes[:2], "cuda")))
        stack.enter_context(mock.patch.object(contrastive, "_sum_to_owner", _sum_to_owner))
        # Fake parameters are made where they belong, and cannot be swapped.
        stack.enter_context(mock.patch.object(nn.Module, "_apply", lambda self, fn, recurse=True: self))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def cell(size: str, launch: str, micro_batches: int, recompute: bool, *flags: str) -> tuple[dict[str, int], MemoryPlan]:
    """Return what the tracker and the planner say of H/14's recipe with another model."""
    pairs = 256 // micro_batches
    recipe = parse_recipe(
        ["--config", "h14_laion2b", "--stages.masked.gradient_checkpointing", "null", "--model.size", size]
        + ["--model.gradient_checkpointing", str(recompute).lower()]
        + (["--data.micro_batch_size", str(pairs)] if micro_batches > 1 else [])
        + list(flags)
    )
    return tracked_bytes(recipe, LAUNCHES[launch]), recipe_memory(recipe, LAUNCHES[launch])


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("| model | launch | micro-batches | recomputed | tracker, GiB | planner, GiB | planner / tracker |")
    print("|---|---|---:|---|---:|---:|---:|")
    for size, launch, parts, recompute in product(("b16", "l16", "h14", "g14"), LAUNCHES, (1, 2), (False, True)):
        tracked, planned = cell(size, launch, parts, recompute)
        ours, theirs = (planned.total - planned.nccl) / 2**30, tracked["Total"] / 2**30
        figures = (f"{theirs:.2f}", f"{ours:.2f}", f"{ours / theirs:.3f}")
        print("|", " | ".join([size, launch, str(parts), "yes" if recompute else "no", *figures]), "|", flush=True)


if __name__ == "__main__":
    main()
