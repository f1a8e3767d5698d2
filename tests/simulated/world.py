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
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from simulated.fake_gpu import DEVICE, fake_gpu, visible_ddp
from simulated.recorder import Collective, Recorder, resizing
from torch.nn.parallel import DistributedDataParallel

from flipscale.data.loader import PackedBatch, StepSampler
from flipscale.engines.checkpoint import CheckpointWriter
from flipscale.engines.device import best_attention
from flipscale.engines.first_weights import no_weights
from flipscale.engines.launch import Launch, read_launch_file
from flipscale.engines.optimizers import encoder_blocks
from flipscale.engines.recipe import SaveRecipe
from flipscale.engines.start import build_engine, engine_class, start_accelerator
from flipscale.io.errors import UserError
from flipscale.planning.activations import Step, example_batch
from flipscale.training.recipe import Recipe, parse_recipe
from flipscale.training.schedule import Schedule, Stage, plan_stages
from flipscale.training.step import consume_batch
from flipscale.training.sync import StepSync
from flipscale.training.watch import StepWatch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flipscale.engines.engine import Engine
    from flipscale.objectives.objective import Objective

# Steps before the counted one: they make the moments and everything else that is made once.
_WARM_UP = 3
_LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class World:
    """A recipe on a launch, seen from one process.

    Args:
        stage: stage of the step.
        rank: rank of the process, below `launch.num_processes`.
    """

    recipe: Recipe
    launch: Launch
    stage: Stage
    rank: int = 0

    def __post_init__(self) -> None:
        batch, world = self.recipe.data.global_batch_size, self.launch.num_processes
        assert 0 <= self.rank < world > 1, f"rank is {self.rank} of {world} processes"
        StepSampler(0, 1, batch, self.rank, world, self.recipe.data.micro_batch_size)  # raises as in training
        refusal = engine_class(self.launch).refusal(self.launch, self.recipe.optim.name, self.recipe.model.compile)
        if refusal is not None:
            raise UserError(refusal)
        if self.launch.engine.startswith("zero"):
            raise UserError(
                f"engine is {self.launch.engine}; use ddp, fsdp2 or hsdp, because DeepSpeed reads from the GPU"
            )

    @property
    def micro_batch(self) -> Step:
        """Shapes of a micro-batch."""
        pairs = self.recipe.data.global_batch_size // self.launch.num_processes
        return Step(
            batch_size=min(pairs, self.recipe.data.micro_batch_size or pairs),
            mask_ratio=self.stage.mask_ratio,
            views=self.recipe.mask.views_at(self.stage.mask_ratio),
            text_mask_ratio=self.stage.text_mask_ratio,
            image_size=self.stage.image_size,
        )

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches in a step."""
        return self.recipe.data.global_batch_size // self.launch.num_processes // self.micro_batch.batch_size


@dataclass(frozen=True)
class StepReport:
    """Work of one step on one process.

    Args:
        ops: number of calls of each aten operation.
        loss_ops: the same, for the coupled loss alone.
        collectives: messages in their order.
        host_syncs: places where the host waits for the device, as `file:line (why)`.
        peak_bytes: peak of each kind of memory, and of the total.
        attention: `(dtype, head_dim, has_mask)` of every call of the fused attention.
        graphs: number of graphs that torch.compile makes of the blocks, if the recipe compiles.
    """

    ops: Counter[str]
    loss_ops: Counter[str]
    collectives: list[Collective]
    host_syncs: list[str]
    peak_bytes: dict[str, int]
    attention: list[tuple[torch.dtype, int, bool]]
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
            "graphs": self.graphs,
        }


def simulate(world: World) -> StepReport:
    """Run a step of `world` and return its report."""
    recorder = Recorder()
    attention: list[tuple[torch.dtype, int, bool]] = []
    with ExitStack() as stack:
        stack.enter_context(fake_processes(world.rank, world.launch))
        fake = stack.enter_context(fake_gpu(recorder.wait, attention))
        stack.enter_context(resizing(recorder.memory))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        accelerator = start_accelerator([], folder)
        engine = build_engine(accelerator, world.launch, world.recipe.optim, world.recipe.data.global_batch_size)
        with fake, recorder:
            step = _Step(world, accelerator, engine, recorder, Path(folder))
            for _ in range(_WARM_UP):
                step.take()
            attention.clear()
            recorder.start()
            step.take()
            recorder.stop()
    memory = dict(sorted(recorder.memory.peak.items(), key=lambda item: item[0] == "total"))
    return StepReport(
        recorder.ops, recorder.loss_ops, recorder.collectives, recorder.waits, memory, attention, len(step.graphs)
    )


class _Step:
    """The engine of a world, which runs steps."""

    def __init__(self, world: World, accelerator: "Accelerator", engine: "Engine", recorder: Recorder, folder: Path):
        self._world, self._engine, self._recorder = world, engine, recorder
        self._objective = _watched(world.recipe.objective(), recorder)
        # Signatures of calls of a block: torch.compile makes a graph for each.
        self.graphs: set[tuple[Any, ...]] = set()
        recorder.memory.kind = "gradients"  # DDP makes theirs here
        self._build()
        watch = StepWatch(accelerator, folder, hang_seconds=1e9)
        writer = CheckpointWriter(accelerator, folder, SaveRecipe(), None)
        self._schedule = Schedule((world.stage,))
        self._step = self._schedule.first({})
        self._sync = StepSync(accelerator, writer, watch)

    def _build(self) -> None:
        recipe, engine = self._world.recipe, self._engine

        def configure(model: Any) -> None:
            model.set_attn_implementation(best_attention(DEVICE))
            if recipe.model.gradient_checkpointing:
                model.gradient_checkpointing_enable()
            for block in encoder_blocks(model) if recipe.model.compile else ():
                block.register_forward_pre_hook(self._note_graph, with_kwargs=True)

        with self._recorder.building_on_device():
            engine.build(recipe.model_config(), configure, no_weights, recipe.objective().model_class)
        engine.prepare()
        engine.start_averages(None)
        memory = self._recorder.memory
        memory.name([_local(tensor) for tensor in [*engine.model.parameters(), *engine.model.buffers()]], "weights")
        memory.name(list(engine.averages.values()), "weights")

    def _note_graph(self, block: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensors = [tensor for tensor in [*inputs, *named.values()] if isinstance(tensor, torch.Tensor)]
        shapes = tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors)
        self.graphs.add((type(block), shapes, torch.is_grad_enabled()))

    def take(self) -> None:
        """Take a step."""
        engine, memory = self._engine, self._recorder.memory
        memory.kind = "batch"
        batch = self._batch()
        memory.kind = "activations"
        found = consume_batch(engine, batch, self._objective)
        self._name_gradients()
        memory.kind = "buffers"
        taken = self._sync.start(self._step, found, engine.gradient_norm(), [])
        engine.step(_LEARNING_RATE, taken)
        self._step = self._schedule.after(self._step, None)
        self._sync.settle(wait=False)
        for optimizer in engine.optimizers:
            for state in optimizer.state.values():
                memory.name([_local(value) for value in state.values() if isinstance(value, torch.Tensor)], "moments")

    def _batch(self) -> list[PackedBatch]:
        step = self._world.micro_batch
        example = example_batch(self._world.recipe.model_config(), step)
        return [
            PackedBatch.of({**example, "faults": []}).pin_memory().to(DEVICE).with_image_size(step.image_size)
            for _ in range(self._world.num_micro_batches)
        ]

    def _name_gradients(self) -> None:
        gradients = [p.grad for p in self._engine.model.parameters() if p.grad is not None]
        self._recorder.memory.name([_local(gradient) for gradient in gradients], "gradients")


def _watched(objective: "Objective", recorder: Recorder) -> "Objective":
    """Return the objective, changed to mark its coupled loss in the recorder."""
    if not objective.is_coupled:
        return objective
    compute = objective.coupled_loss

    def coupled_loss(*compared: Any, **parameters: Any) -> torch.Tensor:
        recorder.in_loss = True
        try:
            return compute(*compared, **parameters)
        finally:
            recorder.in_loss = False

    object.__setattr__(objective, "coupled_loss", coupled_loss)
    return objective


def _local(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor  # a second to import

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


@contextmanager
def fake_processes(rank: int, launch: Launch) -> Iterator[None]:
    """Make this process rank `rank` of a launch without other processes; collectives return at once."""
    from accelerate.state import AcceleratorState
    from torch.testing._internal.distributed.fake_pg import FakeStore

    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(launch.num_processes),
        "LOCAL_RANK": "0",
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
    planned = plan_stages(recipe.stages, recipe.data.global_batch_size, recipe.budget_minutes)
    stage = next(stage for stage in planned if args.stage in (None, stage.name))
    figures = simulate(World(recipe, launch, stage, args.rank)).figures()
    print(json.dumps(figures, indent=None if args.json else 2))


if __name__ == "__main__":
    main()
