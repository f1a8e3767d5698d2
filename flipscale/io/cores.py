"""The cores of this process, the workers that they feed, and the end of workers with their parent."""

import ctypes
import math
import multiprocessing
import os
import signal
from contextlib import suppress
from functools import cache
from pathlib import Path

_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_VERSION_1 = ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")


def usable_cores() -> int:
    """Return the number of cores that this process may use: on a shared node those of its job, in a container at most
    its quota."""
    return _cores_of(0)


@cache
def decoding_workers(stated: int | None) -> int:
    """Return the number of a process's workers: as stated, else its part of the node's cores, except one, at least 1.

    The parts are as many as the node's GPUs, or its processes if there are more. The first call decides, because
    accelerate may later bind the process to some of the cores that it counts here.
    """
    if stated is not None:
        return stated
    import torch  # here, because `--help` must not import it

    cores = usable_cores()
    # `torchrun --numa-binding` has bound this process already, but not its agent.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with suppress(OSError):
            cores = max(cores, _cores_of(os.getppid()))
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return workers_of(cores, max(1, torch.cuda.device_count(), int(local) if local.isdecimal() else 0))


def workers_of(cores: int, processes: int) -> int:
    """Return the workers of each of a node's processes: its part of the cores, except one, at least 1."""
    return max(1, cores // processes - 1)


def _cores_of(process: int) -> int:
    return max(1, math.floor(min(len(os.sched_getaffinity(process)), _quota())))


def _quota() -> float:
    """Return the number of cores that the control groups of this process may use at once, version 2 or 1."""
    group = _CGROUPS
    with suppress(OSError):
        lines = _OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
        group = next((_CGROUPS / line[3:].lstrip("/") for line in lines if line.startswith("0::")), group)
    folders = [folder for folder in (group, *group.parents) if folder.is_relative_to(_CGROUPS)]
    quotas = [math.inf]
    for files in (*([folder / "cpu.max"] for folder in folders), [_CGROUPS / name for name in _VERSION_1]):
        with suppress(OSError, ValueError):  # a file is missing, or its limit is "max"
            allowed, period = map(int, " ".join(file.read_text(encoding="ascii") for file in files).split())
            quotas += [allowed / period] if allowed > 0 else []
    return min(quotas)


def end_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends, even if this process is suspended."""
    with suppress(OSError, AttributeError):  # a system without prctl
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it ended before the call
        os._exit(1)
