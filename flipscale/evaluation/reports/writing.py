"""`results.md` and `results.png`: models side by side."""

import logging
from collections.abc import Sequence
from pathlib import Path

from flipscale.evaluation.reports.dot_plot import draw_results
from flipscale.evaluation.reports.figures import can_draw
from flipscale.evaluation.reports.table import Column, report
from flipscale.io.atomic import write_text

_log = logging.getLogger(__name__)


def write_reports(columns: Sequence[Column], suites: Sequence[str], home: Path) -> None:
    """Write the table and, where matplotlib is installed, the picture of these models into the folder `home`.

    Raises:
        OSError: the disk is full or not writable.
    """
    home.mkdir(parents=True, exist_ok=True)
    picture = home / "results.png"
    picture.unlink(missing_ok=True)  # of models or tasks that these may not be
    if not can_draw():
        _log.info("matplotlib is not installed, so there is no results.png; pip install 'flipscale[plots]'")
    is_drawn = can_draw() and draw_results(columns, suites, picture)
    write_text(home / "results.md", report(columns, suites, picture.name if is_drawn else None))
    _log.info("written: %s%s", home / "results.md", f" and {picture.name}" if is_drawn else "")
