"""The processes of a run: how many there are, which of them this one is, and what the others have."""

import os
from collections.abc import Mapping
from typing import TypeVar

import torch.distributed as dist

from flipscale.io.errors import UserError

T = TypeVar("T")

# The batch scripts set this to the number of processes of the run.
NUM_PROCESSES = "FLIPSCALE_NUM_PROCESSES"
MAX_DIGITS = 9


def place_in_world(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return the rank of this process and the number of processes, from a launcher's variables."""
    rank, world = whole_number(environment, "RANK", 0), whole_number(environment, "WORLD_SIZE", 1)
    if not 0 <= rank < world:
        raise UserError(f"the environment has RANK={rank} and WORLD_SIZE={world}; a launcher sets 0 to {world - 1}")
    return rank, world


def gather_objects(mine: list[T]) -> list[T]:
    """Collective. Return the objects of all processes, by rank."""
    parts = [mine] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(parts) > 1:
        dist.all_gather_object(parts, mine)
    return [one for part in parts for one in part]


def whole_number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal() or len(text) > MAX_DIGITS:
        raise UserError(f"the environment has {name}={text[:60]!r}; it must be a whole number; unset it")
    return int(text)


def promised_processes(environment: Mapping[str, str]) -> int:
    """Return the number of processes that the batch script or the launcher means to start, by default 1."""
    for name in (NUM_PROCESSES, "WORLD_SIZE"):
        if name in environment:
            return whole_number(environment, name, 1)
    # `accelerate launch --cpu --num_processes 2` sets an address for the others, then starts one process.
    return 2 if "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment else 1
