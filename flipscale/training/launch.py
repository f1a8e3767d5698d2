"""The processes a run was promised, and the ones it got."""

import ctypes
import os
import sys
import time

import torch
import torch.distributed as dist
from accelerate import Accelerator

NUM_PROCESSES = "FLIPSCALE_NUM_PROCESSES"


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
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        log_with=report_to or None,
        project_dir=run_dir,
    )
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
