"""Processes for many trainings: each trains recipes one after another, with any engine, on gloo."""

import contextlib
import multiprocessing
import os
import resource
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import processes

from flipscale.engines.launch import launch_environment

LAUNCH_FILES = {file.stem: file for file in (Path(__file__).parents[2] / "ds_configs").glob("*.yaml")}


def environment_of(engine: str) -> dict[str, str]:
    """Return accelerate's variables for a launch file, without the numbers of processes and the precision."""
    environment = launch_environment(LAUNCH_FILES[engine])
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        del environment[name]
    # Our machines have two processes.
    return environment | ({"PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"} if engine == "hsdp" else {})


ENVIRONMENTS = {engine: environment_of(engine) for engine in LAUNCH_FILES}
ENVIRONMENTS["fsdp2_bf16_reduce"] = {**ENVIRONMENTS["fsdp2"], "ROLE_NAME": "fsdp2_bf16_reduce"}


def start_ranks(world: int, function: Callable[..., None], *arguments: object, **environment: str) -> list[BaseProcess]:
    """Start `world` processes that meet, each of which calls a function."""
    return [
        processes.start(function, *arguments, environment={**place, **environment})
        for place in processes.rank_environments(world)
    ]


class Crowd:
    """`world` processes that run tasks of this file."""

    def __init__(self, world: int):
        self.connections, self.processes = [], []
        for environment in processes.rank_environments(world):
            ours, theirs = multiprocessing.Pipe()
            self.processes.append(
                processes.start(serve, theirs, environment={**environment, "ACCELERATE_USE_CPU": "1"})
            )
            self.connections.append(ours)
            theirs.close()

    def run(self, task: str, engine: str, file: Path, precision: str = "no") -> list[str]:
        """Return the answer of every process to a task of this file for a recipe's file: "done", or its error."""
        for connection in self.connections:
            connection.send((task, str(file), {**ENVIRONMENTS[engine], "ACCELERATE_MIXED_PRECISION": precision}))
        return [connection.recv() for connection in self.connections]

    def end(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(60)


class Crowds(dict[int, Crowd]):
    """Crowds by their number of processes, each started at its first use."""

    def __call__(self, world: int) -> Crowd:
        if world not in self:
            self[world] = Crowd(world)
        return self[world]

    def end(self) -> None:
        for crowd in self.values():
            crowd.end()


def train(file: str) -> None:
    """Train a run to its end."""
    from flipscale.pretrain import pretrain
    from flipscale.start.complete_recipe import parse_recipe

    pretrain(parse_recipe(["--config", file]))


def train_on_a_small_disk(file: str) -> None:
    """Train where the last process cannot write its part of a checkpoint."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        train(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def train_as_on_gpu(file: str) -> None:
    """Train with blocks in the forms of GPUs."""
    from flipscale.model.modeling_flip import as_on_gpu

    with as_on_gpu():
        train(file)


def train_unscaled(file: str) -> None:
    """Train with a loss `unscaled` that leaves `logit_scale` out, and with `images_only` the text tower too."""
    from dataclasses import dataclass

    from flipscale.objectives.build_objective import loss_kinds
    from flipscale.objectives.contrastive import Contrastive

    @dataclass(frozen=True, kw_only=True)
    class Unscaled(Contrastive):
        images_only: bool = False

        def coupled_loss(self, *compared, **keywords):
            images, texts = compared
            return (images.sum(1) if self.images_only else images - texts).square().mean()

    loss_kinds()["unscaled"] = Unscaled
    try:
        train(file)
    finally:
        del loss_kinds()["unscaled"]


def train_compiled(file: str) -> None:
    """Train with blocks compiled into graphs, but not to machine code, because that takes a minute. The number of
    graphs is written next to the recipe. Blocks take the forms of GPUs."""
    import torch
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    graphs, compile_module = CompileCounterWithBackend("aot_eager"), torch.nn.Module.compile
    torch.nn.Module.compile = lambda self, **options: compile_module(self, backend=graphs, **options)
    try:
        train_as_on_gpu(file)
    finally:
        torch.nn.Module.compile = compile_module
    Path(file).with_suffix(f".graphs-{os.environ['RANK']}").write_text(str(graphs.frame_count))


def rewrite(file: str) -> None:
    """The newest checkpoint of a run, loaded and saved again in the folder `copy` of the run."""
    from flipscale.loop.between_steps import Saver
    from flipscale.process.slow_steps import StepWatch
    from flipscale.recipe.outputs import SaveRecipe
    from flipscale.records.tracking import Tracker

    with resumed(file) as (plan, start, engine):
        recipe = plan.recipe
        copy = Path(recipe.output_dir) / "copy"
        watch = StepWatch(start.accelerator, copy, 60.0, start.trained_seconds)
        plan = replace(plan, recipe=replace(recipe, output_dir=str(copy), save=SaveRecipe()))
        tracker = Tracker(plan.recipe, plan.schedule, start.accelerator, watch, {})
        saver = Saver(plan, replace(start, state={}), engine, tracker, on_checkpoint=lambda step: None)
        saver.save(plan.schedule.first(start.state))
        saver.commit()


@contextlib.contextmanager
def resumed(file: str) -> Iterator[tuple]:
    """Yield a recipe's plan, the start of its run and the engine, ready to train."""
    from flipscale.start.complete_recipe import parse_recipe
    from flipscale.start.processes import choose_checkpoint, locked, resume, start_processes
    from flipscale.start.setup import open_setup

    recipe = parse_recipe(["--config", file])
    plan = open_setup(recipe)
    accelerator = start_processes(recipe)
    with locked(accelerator, recipe) as lock:
        start = choose_checkpoint(accelerator, plan, lock)
        yield plan, start, resume(recipe, plan.schedule, start)


def leave_out(file: str) -> None:
    """Check that skipped steps change nothing, and that later steps are those of a run without them."""
    import torch

    from flipscale.loop.loop import step_batches
    from flipscale.recipe.schedule import Clock

    def holds(engine) -> dict[str, torch.Tensor]:
        found = {f"{piece.kind}.{piece.name}": piece.values.clone() for piece in engine.tensor_chunks()}
        steps = [s["step"].clone() for o in engine.optimizers for s in o.state.values() if "step" in s]
        return {**found, "steps": torch.tensor(engine.layout.optimizer_steps()), "of all": torch.stack(steps)}

    def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
        return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    ends = []
    for factors in ([1.0, 1.0], [torch.nan, 1.0, torch.nan, torch.inf, -1.0, 1.0]):
        with resumed(file) as (plan, start, engine):
            taken_so_far = 0
            for factor in factors:
                clock = Clock(plan.schedule, {"step": taken_so_far})
                (batch,) = next(step_batches(plan, clock, start.accelerator)).micro_batches
                output = engine(**batch)
                loss = (output.image_embeds * output.text_embeds).sum() * output.logit_scale.sum() * factor
                engine.backward(loss)
                norm = engine.gradient_norm()
                assert norm.isfinite() == (abs(factor) == 1.0)
                before = holds(engine) if taken_so_far else {}
                # -1 stands for a loss that is not finite although its gradients are.
                engine.step(0.01, should_step=torch.tensor(float(factor == 1.0), device=start.accelerator.device))
                taken_so_far += factor == 1.0
                assert engine.layout.optimizer_steps() == taken_so_far
                assert all(parameter.grad is None for parameter in engine.model.parameters())
                assert factor == 1.0 or not before or same(before, holds(engine)), factor
            ends.append(holds(engine))
    assert {name.partition(".")[0] for name in ends[0]} >= {"weight", "exp_avg", "exp_avg_sq", "ema", "steps"}
    assert same(*ends)


def serve(connection: Connection) -> None:
    import torch.distributed as dist
    from accelerate.state import AcceleratorState

    # torch was imported before this process had its environment.
    dist.set_debug_level_from_env()
    while True:
        try:
            task, file, changes = connection.recv()
        except EOFError:
            break
        for environment in ENVIRONMENTS.values():
            for name in environment:
                os.environ.pop(name, None)
        os.environ.update(changes)
        AcceleratorState._reset_state()
        answer = "done"
        try:
            globals()[task](file)
        except Exception as error:
            traceback.print_exc()
            answer = f"{type(error).__name__}: {error}"
        connection.send(answer)
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.barrier()
            dist.destroy_process_group()
    os._exit(0)
