"""What the launcher asks for: how many processes, and which engine; and the processes that a run got."""

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from flipscale.engines.engine import Engine
from flipscale.engines.optimizers import OptimRecipe

NUM_PROCESSES = "FLIPSCALE_NUM_PROCESSES"
# What `accelerate launch` sets to have accelerate shard the model; flipscale does that itself, by the same settings.
_SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG")
# What the recipe or the launch file's mixed_precision decides, so that DeepSpeed's file must not.
_NOT_ZERO_S = (
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "amp",
    "gradient_clipping",
    "gradient_accumulation_steps",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
)


def build_engine(accelerator: Accelerator, recipe: OptimRecipe, global_batch_size: int) -> Engine:
    """Collective. The engine that the launch file chose: FSDP2 or HSDP, ZeRO-1, 2 or 3, or else data parallel.

    Raises:
        ValueError: a launch file that asks for what flipscale does not do, or for what the recipe decides.
    """
    shard_size = launched_shard_size(os.environ, accelerator.num_processes)
    if _is_set(os.environ, "ACCELERATE_USE_DEEPSPEED"):
        settings = deepspeed_settings(os.environ)
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from flipscale.engines.zero import ZeroEngine

        return ZeroEngine(accelerator, recipe, global_batch_size, settings=settings)
    if _is_set(os.environ, "ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise ValueError(
                f"the launch file's fsdp_version is {version}; write fsdp_version: 2 (ds_configs/fsdp2.yaml)"
            )
        from flipscale.engines.fsdp2 import Fsdp2Engine

        return Fsdp2Engine(accelerator, recipe, global_batch_size, shard_size=shard_size)
    return Engine(accelerator, recipe, global_batch_size)


def launched_shard_size(environment: Mapping[str, str], num_processes: int) -> int | None:
    """How many processes share one copy of the weights, where the launch file's parallelism_config says so; all other
    processes then have copies too.

    Raises:
        ValueError: a parallelism_config without FSDP, with other parallelism, or whose sizes do not make the processes.
    """
    if not _is_set(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        return None
    if not _is_set(environment, "ACCELERATE_USE_FSDP"):
        raise ValueError(
            "the launch file has a parallelism_config, but no distributed_type: FSDP; leave it out, or use "
            "ds_configs/hsdp.yaml"
        )
    sizes = {
        kind: int(environment.get(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", "1"))
        for kind in ("dp_replicate", "dp_shard", "tp", "cp", "sp")
    }
    for kind in ("tp", "cp", "sp"):
        if sizes[kind] != 1:
            raise ValueError(
                f"the launch file's parallelism_config_{kind}_size is {sizes[kind]}; leave it out: flipscale has only "
                "dp_replicate and dp_shard"
            )
    num_replicas, shard_size = sizes["dp_replicate"], sizes["dp_shard"]
    # accelerate sets 1 where the launch file says nothing.
    follows = num_replicas == 1 and shard_size > 1 and num_processes % shard_size == 0
    if num_replicas * shard_size != num_processes and not follows:
        raise ValueError(
            f"the launch file's parallelism_config_dp_replicate_size {num_replicas} times "
            f"parallelism_config_dp_shard_size {shard_size} is not the number of processes, {num_processes}; use a "
            "dp_shard_size above 1 that divides it, and no dp_replicate_size, which follows"
        )
    return shard_size


def deepspeed_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """DeepSpeed's settings of a launch: its JSON file, or the stage that the launch file names.

    Raises:
        ValueError: no such file, no ZeRO stage, or a setting that the recipe decides.
    """
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        return {"zero_optimization": {"stage": int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}}
    try:
        given = json.loads(Path(file).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"deepspeed_config_file {file} cannot be read ({error})") from error
    settings = {name: value for name, value in given.items() if value != "auto"}
    for name in _NOT_ZERO_S:
        if name in settings:
            raise ValueError(
                f"{file}: {name} is {settings[name]}; leave it out: the recipe and the launch file's mixed_precision "
                "decide it"
            )
    stage = settings.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise ValueError(f"{file}: zero_optimization.stage is {stage}; use 1, 2 or 3, or ds_configs/ddp.yaml")
    return settings


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("1", "true")


@contextmanager
def _unsharded() -> Iterator[None]:
    asked = {name: os.environ.pop(name) for name in _SHARDING if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(asked)


def promised_processes(environment: dict[str, str]) -> int:
    """How many processes the batch script or the launcher of `environment` meant to start, 1 where none says."""
    if NUM_PROCESSES in environment:
        return int(environment[NUM_PROCESSES])
    if "WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"])
    # `accelerate launch --cpu --num_processes 2` sets an address for the others, then starts one process.
    return 2 if "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment else 1


def start_accelerator(report_to: list[str], run_dir: str) -> Accelerator:
    """Collective. The processes of this run; gloo and CPU where there is no GPU.

    Raises:
        ValueError: fewer processes than the launcher promised, a precision other than bf16 or fp32.
    """
    if not torch.cuda.is_available():
        keep_freed_memory()
    with _unsharded():
        accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=report_to or None, project_dir=run_dir)
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed_precision is {accelerator.mixed_precision!r}; the loss is fp32 and needs 'bf16' or 'no'"
        )
    promised = promised_processes(dict(os.environ))
    if accelerator.num_processes < promised:
        raise ValueError(
            f"the launcher promised {promised} or more processes, {accelerator.num_processes} started; on CPU use "
            "`torchrun --nproc_per_node N -m flipscale.pretrain`, or accelerate with distributed_type MULTI_GPU and "
            "ACCELERATE_USE_CPU=1"
        )
    return accelerator


def part() -> None:
    """Collective. Ends what binds the processes of a finished run; each goes its own way from here."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def leave() -> None:
    """Ends a process of a finished multi-process run here and now.

    A process that unwinds the interpreter while gloo's threads still run is aborted now and then (about one launch in
    ten on a busy CPU), and its launcher then calls the whole run failed.
    """
    if promised_processes(dict(os.environ)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def bf16_is_faster() -> bool:
    """Whether this CPU multiplies matrices faster in bf16 than in fp32, by trying it."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.randn(512, 512).to(dtype)
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            matrix @ matrix
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next step: a CPU step otherwise spends a fifth of its time in page
    faults, since every large activation is mapped and unmapped anew. No effect with another allocator."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
    mallopt(top_pad, 2**28)
