"""One process's step in a large world, without the other processes and without a GPU: operations, messages, memory.

    PYTHONPATH=tests python -m simulated.world --recipe h14_laion2b --launch_file ds_configs/fsdp2.yaml

The engine, the objective and the agreement of the processes are the trainer's own. The process group is torch's fake
one and the GPU is fake. The counted step follows three others.
"""

import argparse
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from simulated.fake_gpu import DEVICE, Devices, fake_gpu, traced_by_dynamo, visible_ddp
from simulated.recorder import Collective, Recorder, Work, resizing
from torch.nn.parallel import DistributedDataParallel

from flipscale.data.loader import PackedBatch
from flipscale.engines.build_engine import build_engine, start_accelerator
from flipscale.engines.checkpoint import CheckpointWriter
from flipscale.engines.device import best_attention
from flipscale.engines.first_weights import compile_blocks, no_weights
from flipscale.engines.launch import Launch, read_launch_file
from flipscale.loop.step import forward_backward
from flipscale.loop.sync import StepSync
from flipscale.objectives import contrastive
from flipscale.objectives.build_objective import build_config, build_objective
from flipscale.objectives.objective import Objective
from flipscale.planning.flops import example_batch
from flipscale.planning.memory import micro_batch
from flipscale.process.preemption import StopRequest
from flipscale.process.slow_steps import StepWatch
from flipscale.recipe.outputs import SaveRecipe
from flipscale.recipe.recipe import Recipe
from flipscale.recipe.schedule import Schedule, Stage, schedule_stages
from flipscale.start.complete_recipe import parse_recipe

# Steps before the counted one: they make the moments and everything else that is made once.
_WARM_UP = 3
_LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class World:
    """A recipe on a launch, seen from one process.

    Args:
        stage: stage of the step.
        rank: rank of the process, below `launch.num_processes`.
        compiles: whether blocks are compiled as on a GPU. Dynamo traces them; its graphs run uncompiled, because the
            compilers of backward passes ask torch's C++ for a GPU.
    """

    recipe: Recipe
    launch: Launch
    stage: Stage
    rank: int = 0
    compiles: bool = False

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.launch.num_processes > 1, "a rank of several processes"
        assert not self.launch.engine.startswith("zero"), "DeepSpeed reads from the GPU; use ddp, fsdp2 or hsdp"


@dataclass(frozen=True)
class StepReport:
    """Work of one step on one process.

    Args:
        ops: number of calls of each aten operation.
        loss_ops: the same, for the coupled loss alone.
        work: kernels, casts and bytes of the passes, without the optimiser.
        collectives: messages in their order.
        side_by_side: messages of two groups that may run at the same time.
        host_syncs: places where the host waits for the device, as `file:line (why)`.
        peak_bytes: most bytes of live tensors on the device.
        attention: `(dtype, head_dim, has_mask)` of every call of the fused attention.
        devices: indices of the GPUs on which anything was made or chosen, from the start on.
        uses_cudnn: whether torch may take cuDNN's attention, which it prefers on Hopper.
        graphs: graphs of compiled blocks.
    """

    ops: Counter[str]
    loss_ops: Counter[str]
    work: Work
    collectives: list[Collective]
    side_by_side: list[tuple[Collective, Collective]]
    host_syncs: list[str]
    peak_bytes: int
    attention: list[tuple[torch.dtype, int, bool]]
    devices: set[int]
    uses_cudnn: bool
    graphs: int

    def figures(self) -> dict[str, Any]:
        """Return the report ready for JSON."""
        sent, received = (sum(one.bytes[way] for one in self.collectives) for way in (0, 1))
        return {
            "aten_ops": self.ops.total(),
            "loss_aten_ops": self.loss_ops.total(),
            "collectives": dict(Counter(one.kind for one in self.collectives)),
            "bytes_sent": sent,
            "bytes_received": received,
            "host_syncs": self.host_syncs,
            "peak_memory_bytes": self.peak_bytes,
        }


def simulate(world: World) -> StepReport:
    """Run a step of `world` and return its report."""
    recorder, recipe = Recorder(), world.recipe
    attention: list[tuple[torch.dtype, int, bool]] = []

    def configure(model: Any) -> None:
        model.set_attn_implementation(best_attention(DEVICE))
        if recipe.recomputes(world.stage):
            model.activation_checkpointing_enable()
        if world.compiles:
            compile_blocks(model, recipe.data.pack_captions)

    with ExitStack() as stack:
        graphs = stack.enter_context(traced_by_dynamo())
        stack.enter_context(fake_processes(world.rank, world.launch))
        fake = stack.enter_context(fake_gpu(recorder.wait, attention))
        stack.enter_context(resizing(recorder.memory))
        stack.enter_context(recorder.seeing_waits())
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        accelerator = start_accelerator([], folder)
        engine = build_engine(accelerator, world.launch, recipe.optim, recipe.data.global_batch_size)
        stack.enter_context(fake)
        stack.enter_context(recorder)
        objective = _watched(build_objective(recipe), recorder)
        with recorder.building_on_device():
            config = build_config(recipe)
            engine.build(config, configure, no_weights, build_objective(recipe).trained_class(config))
        watch = StepWatch(accelerator, Path(folder), hang_seconds=1e9)
        writer = CheckpointWriter(accelerator, Path(folder), SaveRecipe(), None)
        sync = StepSync(accelerator, writer, watch, StopRequest(watches_file=False))
        schedule = Schedule((world.stage,))
        step = schedule.first({})
        for number in range(_WARM_UP + 1):
            if number == _WARM_UP:
                attention.clear()
                recorder.memory.peak, recorder.on = recorder.memory.now, True
            batch = _batch(world)
            recorder.work = Work()
            found = forward_backward(engine, batch, objective)
            work = recorder.work
            taken = sync.start(step, found, engine.gradient_norm(), [])
            engine.step(_LEARNING_RATE, taken)
            step = schedule.after(step, None)
            sync.drain(wait=False)
        recorder.on = False
    peak = recorder.memory.peak
    seen = (
        recorder.collectives,
        recorder.side_by_side,
        recorder.waits,
        peak,
        attention,
        set(Devices.touched),
        torch.backends.cuda.cudnn_sdp_enabled(),
        len(graphs),
    )
    return StepReport(recorder.ops, recorder.loss_ops, work, *seen)


def _batch(world: World) -> list[PackedBatch]:
    recipe, processes = world.recipe, world.launch.num_processes
    step, objective = micro_batch(recipe, world.launch, world.stage), build_objective(recipe)
    ids = {name: torch.zeros(step.batch_size, dtype=torch.int64) for name in objective.global_columns}
    batch = {**example_batch(build_config(recipe), step, objective), **ids, "faults": []}
    if recipe.data.pack_captions:  # two in a row
        rows, ends = batch["input_ids"][::2], torch.zeros(len(batch.pop("attention_mask")), dtype=torch.int64)
        batch |= {"input_ids": rows, "position_ids": torch.zeros_like(rows), "caption_ends": ends}
    return [
        PackedBatch.of(batch).pin_memory().to(DEVICE).with_image_size(step.image_size)
        for _ in range(recipe.data.global_batch_size // processes // step.batch_size)
    ]


def _watched(objective: Objective, recorder: Recorder) -> Objective:
    """Return the objective, changed to mark its coupled loss in the recorder."""
    if not objective.needs_global_batch:
        return objective
    compute = objective.coupled_loss

    def coupled_loss(*loss_inputs: Any, **parameters: Any) -> torch.Tensor:
        recorder.in_loss = True
        try:
            with patch.object(contrastive, "for_each_tile", recorder.as_kernels(contrastive.for_each_tile)):
                return compute(*loss_inputs, **parameters)
        finally:
            recorder.in_loss = False

    object.__setattr__(objective, "coupled_loss", coupled_loss)
    return objective


@contextmanager
def fake_processes(rank: int, launch: Launch) -> Iterator[None]:
    """Make this process rank `rank` of a launch without other processes; collectives return at once."""
    from accelerate.state import AcceleratorState
    from torch.testing._internal.distributed.fake_pg import FakeStore

    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(launch.num_processes),
        "LOCAL_RANK": str(DEVICE.index),
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "ACCELERATE_MIXED_PRECISION": launch.precision,
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=launch.num_processes)
    try:
        with patch.dict(os.environ, environment), patch.object(DistributedDataParallel, "__init__", visible_ddp):
            yield
    finally:
        dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report of a step as a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="A recipe's file or name.")
    parser.add_argument("--launch_file", type=Path, required=True, help="An accelerate launch file.")
    parser.add_argument("--num_processes", type=int, help="Processes. Default: from the launch file.")
    parser.add_argument("--rank", type=int, default=0, help="Rank of the process. Default: 0.")
    parser.add_argument("--stage", help="Name of the stage. Default: the first.")
    parser.add_argument("--json", action="store_true", help="Print one line instead of an indented object.")
    args = parser.parse_args(arguments)
    recipe = parse_recipe(["--config", args.recipe])
    launch = read_launch_file(args.launch_file, args.num_processes)
    planned = schedule_stages(recipe.stages, recipe.data.global_batch_size, recipe.budget_minutes)
    stage = next(stage for stage in planned if args.stage in (None, stage.name))
    figures = simulate(World(recipe, launch, stage, args.rank)).figures()
    print(json.dumps(figures, indent=None if args.json else 2))


if __name__ == "__main__":
    main()
