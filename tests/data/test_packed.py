"""Batches in shared memory, and in pipes if it has no room."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flipscale.data import loader
from flipscale.data.loader import PackedBatch, check_shared_memory, shared_buffer

BATCH = {
    "pixels": torch.arange(12, dtype=torch.uint8).view(3, 4),
    "ids": torch.ones(3, dtype=torch.int64),
    "faults": [],
}


def test_shared_memory_is_taken_at_once() -> None:
    buffer = shared_buffer(1 << 16)
    assert buffer is not None
    assert buffer.is_shared()
    assert len(buffer) == 1 << 16


def test_a_batch_without_room_goes_through_a_pipe(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loader, "_pipe_warned", [])
    with monkeypatch.context() as worker:
        worker.setattr(loader.os, "posix_fallocate", full)
        worker.setattr(torch.utils.data, "get_worker_info", lambda: "a worker's")
        sent = pickle.dumps(PackedBatch.of(BATCH))
    for _ in range(2):
        received = pickle.loads(sent)
    assert all(torch.equal(received[name], BATCH[name]) for name in ("pixels", "ids"))
    (record,) = caplog.records
    assert "docker run --shm-size 8g" in record.getMessage()


def test_full_shared_memory_is_told_before_training(tmp_path: Path) -> None:
    code = f"""
import subprocess
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "{tmp_path}"], check=True)
from flipscale.data.loader import check_shared_memory
check_shared_memory(0, "{tmp_path}")
check_shared_memory(2, "{tmp_path}")
"""
    done = subprocess.run(["unshare", "-m", sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "CalledProcessError" in done.stderr or "unshare" in done.stderr:
        pytest.skip("a file system of its own needs root")
    assert "is full (65536 of 65536 bytes free), and loader workers need it; free it" in done.stderr
    check_shared_memory(2)
