"""From a launch to its processes and their engine, and the end of those processes."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from flipscale.engines.device import keep_freed_memory
from flipscale.engines.launch import Launch, launched_precision
from flipscale.engines.optimizers import OptimRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flipscale.engines.engine import Engine

# Set by the batch scripts: how many processes a run must have.
NUM_PROCESSES = "FLIPSCALE_NUM_PROCESSES"
# What `accelerate launch` sets to have accelerate shard the model; flipscale does that itself, by the same settings.
_SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG")


def engine_classes() -> dict[str, type["Engine"]]:
    """Return the engines, by the names that a `Launch` has for them."""
    # They import torch's sharding and the models, which takes seconds: nobody waits for it who only starts processes.
    from flipscale.engines.ddp import DdpEngine
    from flipscale.engines.fsdp2 import Fsdp2Engine
    from flipscale.engines.zero import ZeroEngine

    return {
        "ddp": DdpEngine,
        "fsdp2": Fsdp2Engine,
        "zero1": ZeroEngine,
        "zero2": ZeroEngine,
        "zero3": ZeroEngine,
    }


def engine_class(launch: Launch) -> type["Engine"]:
    """Return the class of the engine that a launch names.

    Raises:
        ValueError: there is no such engine.
    """
    engines = engine_classes()
    if launch.engine not in engines:
        raise ValueError(f"the launch's role {launch.engine!r} is no engine; leave it out, or use {', '.join(engines)}")
    return engines[launch.engine]


def build_engine(accelerator: "Accelerator", launch: Launch, recipe: OptimRecipe, global_batch_size: int) -> "Engine":
    """Collective. Return the engine that the launch names, its model yet to be built.

    Raises:
        ValueError: there is no such engine, or it cannot carry the recipe's optimiser.
    """
    assert launch.num_processes == accelerator.num_processes
    engine = engine_class(launch)
    refusal = engine.refusal(launch, recipe.name)
    if refusal is not None:
        raise ValueError(refusal)
    return engine(accelerator, launch, recipe, global_batch_size)


def start_accelerator(report_to: list[str], run_dir: str) -> "Accelerator":
    """Collective. Return accelerate's view of this run's processes; gloo and CPU where there is no GPU.

    Raises:
        ValueError: there are fewer processes than the launcher promised, or the precision is neither bf16 nor fp32.
    """
    if not torch.cuda.is_available():
        keep_freed_memory()
    from accelerate import Accelerator

    launched_precision(os.environ)
    with _unsharded():
        accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=report_to or None, project_dir=run_dir)
    promised = promised_processes(os.environ)
    if accelerator.num_processes < promised:
        raise ValueError(
            f"the launcher promised {promised} or more processes, {accelerator.num_processes} started; on CPU use "
            "`torchrun --nproc_per_node N -m flipscale.pretrain`, or accelerate with distributed_type MULTI_GPU and "
            "ACCELERATE_USE_CPU=1"
        )
    return accelerator


def promised_processes(environment: Mapping[str, str]) -> int:
    """Return how many processes the batch script or the launcher of `environment` meant to start; 1 where none says."""
    if NUM_PROCESSES in environment:
        return int(environment[NUM_PROCESSES])
    if "WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"])
    # `accelerate launch --cpu --num_processes 2` sets an address for the others, then starts one process.
    return 2 if "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment else 1


def close_process_group() -> None:
    """Collective. Wait at a barrier for all processes of a finished run, then destroy their process group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def exit_now() -> None:
    """Exit at once with status 0 if this process is one of several of a finished run.

    A process that unwinds the interpreter while gloo's threads still run is aborted now and then (about one launch in
    ten on a busy CPU), and its launcher then reports that the whole run failed.
    """
    if promised_processes(os.environ) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@contextmanager
def _unsharded() -> Iterator[None]:
    """Hide from accelerate, for a while, that the launch asks for sharding."""
    asked = {name: os.environ.pop(name) for name in _SHARDING if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(asked)
