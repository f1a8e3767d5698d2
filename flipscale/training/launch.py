"""The processes a run was promised, and the ones it got."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs


def promised_processes(environment: dict[str, str]) -> int:
    """How many processes the launcher of `environment` meant to start, 1 where none says."""
    if "WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"])
    # `accelerate launch --cpu --num_processes 2` sets an address for the others, then starts one process.
    return 2 if "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment else 1


def start_accelerator(report_to: list[str], run_dir: str) -> Accelerator:
    """Collective. The processes of this run; gloo and CPU where there is no GPU.

    Raises:
        ValueError: fewer processes than the launcher promised.
    """
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        log_with=report_to or None,
        project_dir=run_dir,
        # The only buffers are fixed tables, equal everywhere.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    promised = promised_processes(dict(os.environ))
    if accelerator.num_processes < promised:
        raise ValueError(
            f"the launcher promised {promised} or more processes, {accelerator.num_processes} started; on CPU use "
            "`torchrun --nproc_per_node N -m flipscale.pretrain`, or accelerate with distributed_type MULTI_GPU and "
            "ACCELERATE_USE_CPU=1"
        )
    return accelerator
