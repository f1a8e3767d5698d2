"""The processes and the engine of a launch."""

import os
from typing import TYPE_CHECKING

import torch

from flipscale.engines.device import choose_kernels, keep_freed_memory, set_up_gpu
from flipscale.engines.launch import BF16_REDUCE, PATIENCE, Launch, launched_precision
from flipscale.io.errors import UserError
from flipscale.process.state import changed_environment
from flipscale.process.world import promised_processes
from flipscale.recipe.optim import OptimRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flipscale.engines.engine import Engine

# `accelerate launch` sets these to let accelerate shard the model; flipscale shards it by the same settings.
_SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG")


def engine_classes() -> dict[str, type["Engine"]]:
    # Imported here, because torch's sharding and the models take seconds.
    from flipscale.engines.ddp import DdpEngine
    from flipscale.engines.fsdp2 import Fsdp2Engine
    from flipscale.engines.zero import ZeroEngine

    return {
        "ddp": DdpEngine,
        "fsdp2": Fsdp2Engine,
        **dict.fromkeys(("zero1", "zero2", "zero3"), ZeroEngine),
    }


def engine_class(launch: Launch) -> type["Engine"]:
    engines = engine_classes()
    if launch.engine not in engines:
        names = ", ".join([*engines, BF16_REDUCE])
        raise UserError(f"the launch's role {launch.engine!r} is not an engine; leave it out, or use {names}")
    return engines[launch.engine]


def build_engine(accelerator: "Accelerator", launch: Launch, recipe: OptimRecipe, global_batch_size: int) -> "Engine":
    """Collective. Return the launch's engine, before its model is built."""
    engine = engine_class(launch)
    if (refusal := engine.refusal(launch, recipe.name)) is not None:
        raise UserError(refusal)
    return engine(accelerator, launch, recipe, global_batch_size)


def start_accelerator(report_to: list[str], run_dir: str, is_watched: bool = False) -> "Accelerator":
    """Collective. Return accelerate's view of this run's processes; gloo and CPU without a GPU.

    With `is_watched`, a watchdog ends what hangs. It lets processes wait for one that is at work, such as the main
    process while it writes a large model, for which NCCL's limit of ten minutes would end them.
    """
    if torch.cuda.is_available():
        choose_kernels()
        set_up_gpu()
    else:
        keep_freed_memory()
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    patience = [InitProcessGroupKwargs(timeout=PATIENCE)] if is_watched else None
    precision = launched_precision(os.environ)
    # A script's run before this one may have had another precision, which accelerate keeps for the process.
    if AcceleratorState._shared_state.get("_mixed_precision", precision) != precision:
        AcceleratorState._reset_state()
    try:
        with changed_environment(**dict.fromkeys(_SHARDING)):
            accelerator = Accelerator(
                mixed_precision=precision,
                cpu=not torch.cuda.is_available(),
                log_with=report_to or None,
                project_dir=run_dir,
                kwargs_handlers=patience,
            )
    except ValueError as error:  # a malformed address, port or switch
        raise UserError(
            f"the environment is not one that a launcher sets ({error}); unset its ACCELERATE_ and MASTER_ "
            "variables, or use a launcher"
        ) from error
    promised = promised_processes(os.environ)
    if accelerator.num_processes < promised:
        raise UserError(
            f"the launcher promised {promised} or more processes, {accelerator.num_processes} started; on CPU use "
            "`torchrun --nproc_per_node N -m flipscale.pretrain`, or accelerate with distributed_type MULTI_GPU and "
            "ACCELERATE_USE_CPU=1"
        )
    return accelerator
