"""A profile of some steps, and garbage collected between steps only."""

import gc
import gzip
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import metrics, trained

from flipscale.loop.between_steps import BetweenSteps
from flipscale.process.slow_steps import StepWatch
from flipscale.process.state import collect_frozen_garbage
from flipscale.recipe.outputs import LogRecipe


def test_each_rank_writes_a_profile(write_recipe, tmp_path: Path) -> None:
    log = {"every_samples": 16, "report_to": ["tensorboard"], "profile_steps": 2}
    stages = [{"name": "short", "samples": 128, "base_lr": 0.001, "mask_ratio": 0.5}]
    trained(write_recipe(tmp_path / "run", log=log, stages=stages), 2)
    for rank in (0, 1):
        with gzip.open(tmp_path / f"run/profile/rank-{rank:05d}.trace.json.gz", "rt") as file:
            names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
        backward = [name for name in names if name.startswith("autograd::engine::evaluate_function: AddmmBackward")]
        assert backward, "the backward pass is in the trace"
    assert len([record for record in metrics(tmp_path / "run") if "loss" in record]) == 8
    assert list((tmp_path / "run/tensorboard").glob("events*"))


def test_garbage_is_collected_between_steps_only(tmp_path: Path) -> None:
    class Node:
        def __init__(self) -> None:
            self.me = self

    def alive() -> int:
        return sum(isinstance(found, Node) for found in gc.get_objects())

    accelerator = Accelerator(cpu=True)
    with BetweenSteps(accelerator, tmp_path, LogRecipe(), StepWatch(accelerator, tmp_path, 60.0)) as between:
        assert not gc.isenabled()
        Node()
        between.after_step(999)
        assert alive() == 1
        between.after_step(1000)
        assert alive() == 0
        collect_frozen_garbage()
        assert gc.get_freeze_count()
    assert gc.isenabled()
    collect_frozen_garbage()
    assert gc.get_freeze_count() == 0


def test_writing_a_profile_is_no_part_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where a snapshot of many allocations takes longer than a step may."""
    accelerator, recorded, clocks = Accelerator(cpu=True), [], []
    watch = StepWatch(accelerator, tmp_path, hang_seconds=60.0)
    batches = (SimpleNamespace(step=SimpleNamespace(stage="masked")) for _ in range(9))
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: recorded.append(options))

    def dump(file: str) -> None:  # in a pause, the clock of training stands still
        clocks.append(watch.trained_seconds)
        time.sleep(0.01)
        clocks.append(watch.trained_seconds)

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    log = LogRecipe(profile_steps=2, memory_steps=3)
    with BetweenSteps(gpu(0, 1), tmp_path, log, watch) as between:
        for number, _ in enumerate(watch.timed(batches, 0)):
            between.after_step(number)
    assert recorded == [{"stacks": "python", "max_entries": 1_000_000}, {"enabled": None}]
    assert clocks[0] == clocks[1] < watch.trained_seconds


def gpu(rank: int, world: int) -> Any:
    return SimpleNamespace(device=torch.device("cuda"), process_index=rank, num_processes=world)


def test_a_few_ranks_write_a_trace_and_a_memory_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: None)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda file: written.append(Path(file).name))
    profile = SimpleNamespace(start=lambda: None, stop=lambda: None)
    profile.export_chrome_trace = lambda file: written.append(Path(file).name)
    monkeypatch.setattr(torch.profiler, "profile", lambda **options: profile)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # seconds in a process with many modules
    watch = StepWatch(Accelerator(cpu=True), tmp_path, hang_seconds=60.0)
    for rank in (0, 1, 2, 254, 255):
        with BetweenSteps(gpu(rank, 256), tmp_path, LogRecipe(profile_steps=2, memory_steps=2), watch) as between:
            for number in range(9):
                between.after_step(number)
    expected = [f"rank-{rank:05d}.{end}" for rank in (0, 1, 255) for end in ("trace.json.gz", "memory.pickle")]
    assert written == expected


def test_nsys_records_the_steps_in_place_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    watch = StepWatch(Accelerator(cpu=True), tmp_path, hang_seconds=60.0)
    with BetweenSteps(gpu(0, 8), tmp_path, LogRecipe(profile_steps=2), watch) as between:
        for number in range(10):
            between.after_step(number)
            calls.append(f"{number}")
    assert calls[calls.index("start") + 1 : calls.index("stop")] == ["2", "3"]
    assert not (tmp_path / "profile").exists()
