"""The figures of a run, in its folder."""

import logging
from pathlib import Path

from flipscale.evaluation.reports.comparison import read_curve
from flipscale.evaluation.reports.figures import can_draw
from flipscale.evaluation.reports.run_figures import draw_run

_log = logging.getLogger(__name__)

FOLDER = "figures"
# They take a second or two; an evaluation draws them again when they are older than this.
FRESH_SECONDS = 300.0


def draw_figures(run_dir: Path) -> dict[str, str]:
    """Draw what a run's files have so far into `figures/` of its folder, and return what each shows, by its name.

    There are none without matplotlib. A run does not end for its figures: where they cannot be drawn, a line says why.
    """
    if not can_draw():
        return {}
    try:
        return draw_run(read_curve(run_dir), run_dir / FOLDER)
    except Exception as error:
        _log.warning("the figures could not be drawn (%s: %s); the run goes on", type(error).__name__, error)
        return {}
