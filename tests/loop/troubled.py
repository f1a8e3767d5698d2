"""A run in trouble: steps with a loss that is not finite, a request to stop, a death between a step and its result."""

import argparse
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import pytest
import torch

from flipscale import pretrain
from flipscale.loop.sync import StepSync


@contextmanager
def trouble(poisoned: Collection[int] = (), stopped: int | None = None, killed: int | None = None) -> Iterator[None]:
    """Bring trouble to the runs of a `with` block.

    Args:
        poisoned: steps, from 0, in which the last process's loss is NaN.
        stopped: the step in which the last process is asked to stop.
        killed: the step whose result no process lives to read.
    """
    is_last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    start, read = StepSync.start, StepSync._read

    def start_in_trouble(sync, step, loss, *others):
        if is_last and step.number in poisoned:
            # The gradients are finite, so only the agreement of the processes can leave the step out.
            loss = loss._replace(loss=loss.loss * torch.nan)
        if is_last and step.number == stopped:
            sync._request._received = "SIGTERM received"
        return start(sync, step, loss, *others)

    def read_or_die(sync, unread, outcomes):
        if unread.step.number == killed:
            os._exit(9)
        read(sync, unread, outcomes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepSync, "start", start_in_trouble)
        patch.setattr(StepSync, "_read", read_or_die)
        yield


def main(arguments: list[str]) -> None:
    """Train as `flipscale pretrain` does, in trouble."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--poisoned", type=int, nargs="*", default=[])
    parser.add_argument("--stopped", type=int)
    parser.add_argument("--killed", type=int)
    given, rest = parser.parse_known_args(arguments)
    with trouble(**vars(given)):
        pretrain.main(rest)
