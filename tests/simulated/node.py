"""A node of eight GPUs that is not there, on which `flipscale bench gpu` runs all its checks.

    PYTHONPATH=tests python -m simulated.node --config RECIPE --batch_size 8

Checks that look at devices, memory and operations run on the fake GPU, as rank 3 of 8. Checks that compare numbers run
on CPUs, as two processes of gloo on each node. The other ranks repeat the outcome of a simulated one. Messages between
several nodes have a process of gloo for each GPU. Two nodes run in one folder, as two commands, the second with
`GROUP_RANK=1`:

    GROUP_WORLD_SIZE=2 GROUP_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 PYTHONPATH=tests python -m simulated.node
"""

import importlib
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import processes
import torch
from simulated.fake_gpu import DEVICE, NUM_DEVICES, Devices, fake_gpu
from simulated.recorder import Recorder, resizing
from simulated.world import fake_processes
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.attention import SDPBackend

from flipscale import cli
from flipscale.checks import node, steps, trainings
from flipscale.checks.node import Process, Row
from flipscale.checks.nodes import Nodes
from flipscale.checks.steps import Loop
from flipscale.checks.timing import timed_steps
from flipscale.data.loader import CudaTransfer, PackedBatch
from flipscale.engines.engine import Engine
from flipscale.engines.first_weights import no_weights
from flipscale.engines.launch import launch_of
from flipscale.start import processes as stages

# Functions of checks that run on the fake GPU; the others run on CPUs.
FAKE = ("products", "attention", "visited", "steps", "beside")
# One process for this many GPUs, on CPUs.
_GPUS_OF_A_PROCESS = max(NUM_DEVICES // 2, 1)
# Nodes in threads start processes in changed environments one at a time, so that each finds the command's own again.
_ENVIRONMENT = threading.Lock()
Fault = Callable[[ExitStack], None]

_GPU = "NVIDIA H100 80GB HBM3, 570.86, 81559, 1980, 1980, 650.1, 700.00, 41, 5, 16"
_TOPOLOGY = "\n".join(
    ["\x1b[4m" + "\t".join(f"GPU{i}" for i in range(NUM_DEVICES)) + "\tCPU Affinity\x1b[0m"]
    + [
        "\t".join([f"GPU{i}", *("X" if i == j else "NV18" for j in range(NUM_DEVICES)), "0-95"])
        for i in range(NUM_DEVICES)
    ]
)


def write_nvidia_smi(folder: Path) -> None:
    """Write a program `nvidia-smi` that answers for the node."""
    file = folder / "nvidia-smi"
    gpus = "\n".join([_GPU] * NUM_DEVICES)
    cases = {"*--id=*": _GPU, "*topo*": _TOPOLOGY, "*": gpus}
    lines = "".join(f"{case}) echo '{answer}' ;;\n" for case, answer in cases.items())
    file.write_text(f'#!/bin/sh\ncase "$*" in\n{lines}esac\n')
    file.chmod(0o755)


class _Started:
    """A process of a check."""

    def __init__(self, process: BaseProcess):
        self._process, self.pid = process, process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode


class _Repeated:
    """A rank that repeats the outcome of a simulated rank."""

    pid = 2**22 + 1  # no process of the system

    def __init__(self, leader: list[Process], theirs: Path, ours: Path):
        self._leader, self._theirs, self._ours = leader, theirs, ours

    def poll(self) -> int | None:
        if not self._leader:
            return None
        if (code := self._leader[0].poll()) is not None and self._theirs.exists():
            shutil.copy(self._theirs, self._ours)
        return code


class Starter:
    """Starts the processes of checks in the simulated node.

    Args:
        fault: function that breaks something inside of the processes, until the stack is closed.
    """

    def __init__(self, fault: Fault | None = None):
        self._fault, self._leaders = fault, {}
        self._first_logs: dict[object, Path] = {}

    def __call__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
        rank, local = (int(environment.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
        world, here = (int(environment.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        function = arguments[0].partition(":")[2]
        is_fake = module == "flipscale.checks.node" and function in FAKE
        leader = self._leaders.setdefault(log.parent, [])
        # A second start of the same measurement repeats the first.
        variables = sorted((name, value) for name, value in environment.items() if name != "MASTER_PORT")
        earlier = self._first_logs.setdefault((*arguments[:2], *variables), log)
        if is_fake and earlier != log:
            log.touch()
            file = f"rank-{rank}.json"
            return _Repeated(self._leaders[earlier.parent], earlier.parent / file, log.parent / file)
        first = rank - local + DEVICE.index if is_fake and world > 1 else rank - local
        gpus = 1 if world > here and (function or here < NUM_DEVICES) else _GPUS_OF_A_PROCESS
        count = max(here // gpus, 1)
        if rank != first and (is_fake or local >= count):
            log.touch()
            names = (f"rank-{of}.json" for of in (first, rank))
            return _Repeated(leader, *(log.parent / name for name in names))
        changes = {"RANK": rank // here * count + local, "WORLD_SIZE": world // here * count, "LOCAL_WORLD_SIZE": count}
        if is_fake or world == 1 or gpus == 1:
            changes.clear()
        words = [str(NUM_DEVICES // gpus) if word == str(NUM_DEVICES) else word for word in arguments]
        serving = (module, words, str(log), is_fake, self._fault)
        # Only these: this command's own launcher may have set others.
        changed = {name: str(number) for name, number in changes.items()}
        with _ENVIRONMENT, patch.dict(os.environ, {**environment, **changed}, clear=True):
            started = _Started(processes.start(serve, *serving))
        if rank == first:
            leader.append(started)
        return started


def _interpret_triton(stack: ExitStack) -> None:
    """Let Triton interpret kernels, which it decides when it is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    for name in [*sys.modules]:
        if name.split(".")[0] == "triton" and not name.startswith("triton._C"):
            del sys.modules[name]
    from flipscale.objectives import contrastive

    stack.enter_context(patch.object(contrastive, "triton_serves", lambda rows: rows.dtype == torch.float32))
    stack.enter_context(patch.object(contrastive, "_FEW", 0))


def serve(module: str, arguments: list[str], log: str, is_fake: bool, fault: Fault | None) -> None:
    """Call `main` of a module as a process of a check, with its output in `log`."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    with ExitStack() as stack:
        if is_fake:
            on_fake_gpu(stack)
        elif arguments[0].endswith(":triton_losses"):
            _interpret_triton(stack)
        if fault is not None:
            fault(stack)
        sys.argv = [module, *arguments]
        importlib.import_module(module).main(arguments)


def _fake_time(take: Callable[..., Row]) -> Callable[..., Row]:
    """Return `Loop.take` with one step, of ten seconds if nothing is recomputed; the host needs a fifth of that. Only
    the first steps of a model warm it up."""

    def taken(loop: Loop, batches: Any, count: int) -> Row:
        row = take(loop, batches, 0 if count == steps.WARM_UP and loop._now.number else 1)
        seconds = 2.0 if batches.gi_frame.f_locals["pairs"] == 2 else 40 / 3 if loop.engine._recomputes else 10.0
        return {**row, "times": [seconds] * count, "joules": 650.0 * seconds * count}

    return taken


def _fake_turns(step: Callable[[], object], count: int, device: torch.device) -> Row:
    """Take one step of a trainer. Ours takes 40 ms and open_clip's 60, each fourth a tenth more, at 650 W."""
    row = timed_steps(step, 1, device)
    seconds = 0.04 if isinstance(step, partial) else 0.06
    times = [seconds * (1.1 if number % 4 == 3 else 1.0) for number in range(count)]
    return {**row, "times": times, "joules": 650.0 * sum(times)}


def on_fake_gpu(stack: ExitStack) -> Recorder:
    """Let this process be rank 3 of 8 on a fake GPU."""
    recorder = Recorder()
    # A single process gets a number of its GPU too, because the fake guard has no current device.
    stack.enter_context(fake_processes(int(os.environ.get("RANK", "0")), launch_of(os.environ)))
    fake = stack.enter_context(fake_gpu(recorder.wait, []))
    stack.enter_context(
        patch.object(torch._C, "_cuda_hasPrimaryContext", lambda index: index in Devices.touched, create=True)
    )
    stack.enter_context(patch.object(torch, "_fused_sdp_choice", lambda *_: SDPBackend.FLASH_ATTENTION.value))
    # The fake store keeps no message of a failure.
    stack.enter_context(patch("flipscale.process.watchdog._have_met", lambda: False))
    # The context of the fake processes destroys their group.
    stack.enter_context(patch("flipscale.process.watchdog.close_process_group", lambda: None))
    # Clocks measure nothing here: every kernel takes a tenth of a second.
    stack.enter_context(patch("flipscale.checks.kernels.seconds_of", lambda call, *_: (call(), 0.1)[1]))
    stack.enter_context(patch.object(Loop, "take", _fake_time(Loop.take)))
    stack.enter_context(patch("benchmarks.gpu_step.timed_steps", _fake_turns))
    stack.enter_context(patch("flipscale.checks.timing.open_gpu", lambda device: []))
    stack.enter_context(patch.object(torch.cuda, "clock_rate", lambda device: 1485))
    stack.enter_context(patch.object(torch.nn.Module, "compile", lambda module: None))
    stack.enter_context(patch("benchmarks.open_clip_step.torch.compile", lambda called: called))
    # Graphs are not made here: tests/objectives and tests/distributed compile.
    stack.enter_context(patch("flipscale.engines.first_weights.compile_blocks", lambda *_: None))
    # A fake tensor has no first weights, and a fake GPU no profile and no queue of frees.
    stack.enter_context(patch("flipscale.engines.first_weights.initial_weights", lambda *_: no_weights))
    stack.enter_context(patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None))
    # Two threads must not make fake tensors at once, so the feeder's batch is copied where it is received.
    copy, receive = PackedBatch.to, CudaTransfer.receive

    def received(transfer: CudaTransfer, sent: Any) -> list[PackedBatch]:
        return [copy(batch, DEVICE) for batch in receive(transfer, sent)]

    stack.enter_context(patch.object(PackedBatch, "to", lambda batch, device: batch))
    stack.enter_context(patch.object(PackedBatch, "pin_memory", lambda batch: batch))
    stack.enter_context(patch.object(CudaTransfer, "receive", received))
    stack.enter_context(patch.object(torch.cuda, "max_memory_allocated", lambda *_: recorder.memory.peak))
    stack.enter_context(resizing(recorder.memory))

    def forget_peak(device: torch.device) -> None:
        recorder.memory.peak = recorder.memory.now

    stack.enter_context(patch.object(torch.cuda, "reset_peak_memory_stats", forget_peak))
    # The mesh of FSDP2 reads its ranks' numbers.
    make = stages.build_engine

    def make_engine(*arguments: Any) -> Engine:
        with unset_fake_temporarily():
            return make(*arguments)

    stack.enter_context(patch.object(stages, "build_engine", make_engine))
    build = Engine.build

    def build_on_device(engine: Engine, *arguments: Any) -> None:
        with recorder.building_on_device():
            build(engine, *arguments)

    stack.enter_context(patch.object(Engine, "build", build_on_device))
    stack.enter_context(fake)
    stack.enter_context(recorder)
    return recorder


def patient(wait: Callable[..., None]) -> Callable[..., None]:
    """Return a function of `Group` with twenty times its time limit."""

    def waited(self: node.CheckProcesses, *given: Any) -> None:
        limits = given or (node.LIMIT_SECONDS,)
        wait(self, *(20 * one if isinstance(one, float) else one for one in limits))

    return waited


def _ranked(records: Callable[..., list[dict[str, Any]]]) -> Callable[..., list[dict[str, Any]]]:
    """Return `Training.records` with the late rank's number among all GPUs; its process is one of two on its node."""

    def read(training: trainings.Training, name: str) -> list[dict[str, Any]]:
        found = records(training, name)
        gpus, count = training.bench.local_gpus, NUM_DEVICES // _GPUS_OF_A_PROCESS
        if len(training.bench.nodes.hosts) > 1 and gpus == NUM_DEVICES and name == "slow_steps":
            for record in found:
                node, place = divmod(record["late_rank"], count)
                record["late_rank"] = node * gpus + place
        return found

    return read


def on_busy_machine(stack: ExitStack) -> None:
    """Give checks the time that they need on a busy machine without GPUs."""
    stack.enter_context(patch.object(trainings, "_LOADER_SECONDS", 2.0))
    stack.enter_context(patch.object(trainings, "_END_SECONDS", 1800.0))
    stack.enter_context(patch.object(node.CheckProcesses, "wait", patient(node.CheckProcesses.wait)))
    stack.enter_context(patch.object(node.CheckProcesses, "await_true", patient(node.CheckProcesses.await_true)))
    stack.enter_context(patch.object(trainings.Training, "records", _ranked(trainings.Training.records)))
    gather = Nodes.gather
    waited = lambda nodes, value, limit_s=6000.0: gather(nodes, value, limit_s)  # noqa: E731
    stack.enter_context(patch.object(Nodes, "gather", waited))
    # DeepSpeed reads from the GPU, so the fake world has none.
    stack.enter_context(patch.object(steps, "find_spec", lambda name: None))


def main(arguments: Sequence[str], fault: Fault | None = None) -> None:
    """Run `flipscale bench gpu` on this node, which srun or a launcher may have started with others."""
    processes.preload("simulated.node", "open_clip.model")
    with ExitStack() as stack:
        on_busy_machine(stack)
        tools = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_nvidia_smi(tools)
        stack.enter_context(patch.dict(os.environ, {"PATH": f"{tools}:{os.environ['PATH']}"}))
        stack.enter_context(patch.object(torch.cuda, "device_count", lambda: NUM_DEVICES))
        stack.enter_context(patch.object(steps, "OFF", 0.25))
        stack.enter_context(patch.object(node, "Bench", partial(node.Bench, start=Starter(fault))))
        cli.main(["bench", "gpu", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
