"""A run whose counters count: a processor 1 Wh between two looks at it, and what stands for a GPU on each process."""

import os
import time
from pathlib import Path

import pytest
from training import troubled

from flipscale.training.cost import counters, meter


class Steady:
    """A counter that has 1 Wh more whenever it is asked."""

    def joules(self) -> float:
        return 3600.0


def main(arguments: list[str]) -> None:
    """Train as `training.troubled` does, with the powercap files of a folder; a run that is to die does so after its
    main process has written what it has taken.

    Args:
        arguments: the folder, the run directory, and those of `training.troubled`.
    """
    powercap, run_dir, *rest = arguments
    end = os._exit

    def write_and_end(code: int) -> None:
        deadline = time.monotonic() + 60
        while os.environ.get("RANK") == "0" and not Path(run_dir, "energy.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        end(code)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "_exit", write_and_end)
        patch.setattr(counters, "POWERCAP", Path(powercap))
        patch.setattr(counters.ProcessorCounter, "joules", Steady.joules)
        patch.setattr(meter, "open_gpu", lambda device: [Steady()])
        patch.setattr(meter, "READ_SECONDS", 0.02)
        patch.setattr(meter, "WRITE_SECONDS", 0.0)
        troubled.main(rest)
