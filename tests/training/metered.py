"""A run with fake energy counters: at each read, a processor has 1 Wh more, and so has the GPU of each process."""

from pathlib import Path

import pytest
from training import troubled

from flipscale.training import energy_meter


class Steady:
    """A counter that has 1 Wh more at each read."""

    def joules(self) -> float:
        return 3600.0


def main(arguments: list[str]) -> None:
    """Train as `training.troubled` does.

    Args:
        arguments: powercap folder, then the arguments of `training.troubled`.
    """
    powercap, *rest = arguments
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(energy_meter, "POWERCAP", Path(powercap))
        patch.setattr(energy_meter.Counter, "joules", Steady.joules)
        patch.setattr(energy_meter, "open_gpu", lambda device: [Steady()])
        troubled.main(rest)
