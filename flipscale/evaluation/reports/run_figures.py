"""The figures of one run: its loss, its learning rate, its wait for data, and what it achieved over time."""

from pathlib import Path

from flipscale.evaluation.reports.comparison import Curve
from flipscale.evaluation.reports.figures import draw_loss, draw_metric, draw_result, result_figures

# Numbers of each interval that are drawn by themselves: the metric, the title, the unit, and the unit's factor.
_METRICS = {
    "learning_rate.png": ("lr", "Learning rate", "learning rate", 1.0),
    "data_wait.png": ("data_wait_share", "Share of the time that steps waited for data", "%", 100.0),
}


def draw_run(curve: Curve, folder: Path) -> dict[str, str]:
    """Draw a run's figures into a folder, which is made, and return what each shows, by its file's name.

    Args:
        curve: of the run. With fewer than two records there is nothing to draw.

    Raises:
        OSError: the disk is full or not writable.
    """
    if len(curve.points("loss")[0]) < 2:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    draw_loss([curve], folder / "loss.png")
    captions = {"loss.png": "The loss of the training batches against training time"}
    for name, (metric, title, unit, factor) in _METRICS.items():
        draw_metric(curve, metric, title, unit, folder / name, factor)
        captions[name] = f"{title} against training time"
    for task, result in result_figures([curve]).items():
        draw_result([curve], result, folder / f"{task}.png")
        captions[f"{task}.png"] = f"{result.shown} of {task} against training time"
    return captions
