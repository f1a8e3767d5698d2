"""Cores of a job and of a container, and the workers of a process."""

import math
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from flipscale.io import cores
from flipscale.io.cores import decoding_workers, usable_cores


def test_cores_of_a_job() -> None:
    everything = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(everything)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, everything)
    assert usable_cores() == max(1, math.floor(min(len(everything), cores._quota())))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        ({"job/task/cpu.max": "max 100000\n", "job/cpu.max": "1250000 100000\n"}, 12.5),
        ({"job/task/cpu.max": "50000 100000\n", "job/cpu.max": "1250000 100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3.0),
        ({"cpu.max": "odd\n"}, math.inf),
    ],
)
def test_quotas(files: dict[str, str], expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("4:memory:/elsewhere\n0::/job/task\n")
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    monkeypatch.setattr(cores, "_CGROUPS", groups)
    monkeypatch.setattr(cores, "_OWN_CGROUPS", own)
    assert cores._quota() == expected
    assert usable_cores() == max(1, math.floor(min(len(os.sched_getaffinity(0)), expected)))


@pytest.mark.parametrize(
    ("available", "gpus", "local", "expected"),
    [(96, 8, "8", 11), (96, 8, None, 11), (96, 1, "1", 95), (2, 0, "2", 1), (1, 0, None, 1), (64, 0, "4", 15)],
)
def test_workers_of_a_process(
    available: int, gpus: int, local: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert decoding_workers.__wrapped__(None) == expected
    assert decoding_workers.__wrapped__(3) == 3
    assert decoding_workers.__wrapped__(0) == 0


def _bound(results: multiprocessing.SimpleQueue) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ |= {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "1"}
    results.put((usable_cores(), decoding_workers.__wrapped__(None)))


def test_a_process_that_its_agent_has_bound() -> None:
    """As by `torchrun --numa-binding`: the cores of the agent, here this process, count."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_bound, args=(results := context.SimpleQueue(),))
    process.start()
    assert results.get() == (1, max(1, usable_cores() - 1))
    process.join()
