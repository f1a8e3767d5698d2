"""Fixtures of the benchmarks' tests."""

import os
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState

from flipscale.engines.launch import PRECISION


@pytest.fixture
def process_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore what a benchmark sets for its process: the environment, the cores, the threads and the precision."""
    for name in (PRECISION, "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, "no"))
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
