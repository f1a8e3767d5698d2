"""Versions, GPUs, links, limits, and the GPUs on which a process has memory."""

import os
import re
import resource
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import partial
from importlib import metadata, util
from pathlib import Path

import torch

import flipscale
from flipscale.checks.node import Bench, NotRun, Row
from flipscale.io.cores import usable_cores
from flipscale.io.surroundings import known, own_commit

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "deepspeed")
# Fields of `nvidia-smi --query-gpu`: name, driver, MiB, MHz now and at most, watts now and at most, PCIe.
FIELDS = (
    *("name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "power.draw", "power.limit"),
    *("temperature.gpu", "pcie.link.gen.current", "pcie.link.width.current"),
)


def own_device() -> torch.device:
    """Return this rank's GPU, which becomes the current one; the CPU without GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def machine_facts(num_gpus: int) -> Iterator[Row]:
    """Yield versions, the GPUs by nvidia-smi, the kinds of links between them, and the limits of a process."""
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    # Another distribution may hold a module, as ROCm's torch has Triton from pytorch-triton-rocm.
    libraries = {name: known(partial(metadata.version, name)) for name in _PACKAGES if util.find_spec(name)}
    libraries |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "nccl": nccl}
    libraries["open_clip"] = known(partial(metadata.version, "open_clip_torch"))
    stated = {name: str(version) for name, version in libraries.items() if version}
    commit = own_commit(Path(flipscale.__file__).parent) or "unknown"
    yield {"versions": {"flipscale": flipscale.__version__, "commit": commit[:10], **stated}}
    yield {"gpus": query_gpus()[:num_gpus], "links": gpu_links(nvidia_smi("topo", "-m")), "cores": usable_cores()}
    shared, locked = os.statvfs("/dev/shm"), resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    yield {
        "shm_gb": shared.f_bavail * shared.f_frsize / 1e9,
        "locked_gb": None if locked == resource.RLIM_INFINITY else locked / 1e9,
    }


def nvidia_smi(*arguments: str) -> str:
    """Return the output of nvidia-smi; empty if it is absent or fails."""
    command = ["nvidia-smi", *arguments]
    done = known(lambda: subprocess.run(command, capture_output=True, text=True, timeout=60, check=False))
    return done.stdout if done is not None and done.returncode == 0 else ""


def query_gpus() -> list[dict[str, str]]:
    """Return the `FIELDS` of all GPUs."""
    lines = nvidia_smi(f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits").splitlines()
    return [dict(zip(FIELDS, map(str.strip, line.split(",")), strict=False)) for line in lines if line.strip()]


def gpu_links(topology: str) -> dict[str, int]:
    """Return the number of GPU pairs of each kind of link, such as NV18, from `nvidia-smi topo -m`."""
    # nvidia-smi underlines the head by escapes. A GPU's row has an X where it meets itself.
    lines = [line.split() for line in re.sub(r"\x1b\[[\d;]*m", "", topology).splitlines()]
    rows = [cells for cells in lines if cells and re.fullmatch(r"GPU\d+", cells[0]) and "X" in cells]
    kinds = (kind for number, row in enumerate(rows, 1) for kind in row[1 + number : 1 + len(rows)])
    return dict(Counter(kinds))


def contexts() -> list[int]:
    """Return the GPUs on which this process has a context, which takes half a gigabyte of each."""
    # torch asks the driver by cuDevicePrimaryCtxGetState, which makes no context.
    asked = torch._C._cuda_hasPrimaryContext  # type: ignore[attr-defined]
    return [index for index in range(torch.cuda.device_count()) if asked(index)]


def check_machine(bench: Bench) -> None:
    """Report versions, GPUs, links and limits; GPUs must be alike."""
    rows = bench.run(machine_facts, num_gpus=bench.num_gpus)[0]
    found = {name: value for row in rows for name, value in row.items()}
    bench.figures["machine"] = found
    bench.add("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    gpus, faults = found["gpus"], []
    if not gpus:
        raise NotRun("nvidia-smi is absent or fails")
    for name in ("name", "memory.total", "clocks.max.sm", "power.limit", "pcie.link.width.current"):
        if len(values := dict.fromkeys(gpu[name] for gpu in gpus)) > 1:
            faults.append(f"GPUs differ in {name}: {', '.join(values)}")
    if found["shm_gb"] < 1.0:
        faults.append(f"/dev/shm has {found['shm_gb']:.2f} GB; loader workers need more")
    kinds, one = [f"{count} x {kind}" for kind, count in found["links"].items()], gpus[0]
    bench.add(
        "machine",
        f"{len(gpus)} x {one['name']}, driver {one['driver_version']}, {one['clocks.max.sm']} MHz and "
        f"{one['power.limit']} W at most, links {', '.join(kinds) or 'unknown'}, {found['cores']} cores, shm "
        f"{found['shm_gb']:.0f} GB" + (f", locked memory {found['locked_gb']:.2g} GB" if found["locked_gb"] else ""),
        faults,
    )
