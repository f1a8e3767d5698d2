"""A run in trouble: steps with a loss that is not finite, a request to stop, a death between a step and its verdict."""

import argparse
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import pytest
import torch

from flipscale import pretrain
from flipscale.training.health import StepGuard


@contextmanager
def trouble(poisoned: Collection[int] = (), stopped: int | None = None, killed: int | None = None) -> Iterator[None]:
    """Bring trouble to the runs of a `with` block.

    Args:
        poisoned: steps, from 0, in which the last process's loss is NaN.
        stopped: the step in which the last process is asked to stop.
        killed: the step whose verdict no process lives to read.
    """
    is_last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    agree, read = StepGuard.agree, StepGuard._read

    def agree_in_trouble(guard, progress, found, *others):
        if is_last and progress.step in poisoned:
            # The gradients are finite: only the processes' agreement can leave the step out.
            found = found._replace(loss=found.loss * torch.nan)
        if is_last and progress.step == stopped:
            guard.request._received = "SIGTERM received"
        return agree(guard, progress, found, *others)

    def read_or_die(guard, unread):
        if unread.step == killed:
            os._exit(9)
        return read(guard, unread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepGuard, "agree", agree_in_trouble)
        patch.setattr(StepGuard, "_read", read_or_die)
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
