"""Fits and effects as Markdown."""

from collections.abc import Sequence

from flipscale.evaluation.results import NOTHING
from flipscale.io.text_table import escape_markdown, markdown_table
from flipscale.studies.scaling.fitting import Fit, Prediction
from flipscale.studies.scaling.transfer import (
    Arm,
    Effect,
    Table,
    beyond,
    effects,
    interactions,
    tasks_moved,
    tasks_of,
)


def fit_words(fit: Fit) -> str:
    """Return a fit as a table of its parameters, and what it was fitted to."""
    rows = [[fit.law.name, "value", "95 % interval"]]
    for name, *numbers in zip(fit.law.parameters, fit.found, fit.low, fit.high, strict=True):
        value, low, high = (f"{number:.3g}" for number in numbers)
        rows.append([name, value, f"{low} to {high}"])
    units = ", ".join(f"{value:.3g} of {name}" for name, value in fit.law.units.items())
    said = f"error in % = {fit.law.formula}, fitted to {fit.num_points} points, in units of {units}."
    return f"{said}\n\n{markdown_table(rows, 1)}"


def prediction_words(law: str, prediction: Prediction) -> str:
    """Return what a law said of a point that it had not seen, as a line."""
    off = prediction.predicted - prediction.found
    return (
        f"{law}: without {escape_markdown(prediction.name)} it predicts {prediction.predicted:.1f} % error "
        f"({prediction.low:.1f} to {prediction.high:.1f}); found: {prediction.found:.1f} % (off by {off:+.1f})"
    )


def transfer_words(arms: Sequence[Arm], reference: str) -> str:
    """Return what each axis moves, as Markdown.

    Args:
        reference: the task from which the others are predicted.
    """
    alone, together, more = effects(arms), interactions(arms), beyond(arms, reference)
    shown = [effect for row in alone.values() for effect in row.values()]
    seeds = (
        "Intervals are of 95 %, over seeds."
        if any(effect.low is not None for effect in shown)
        else "One seed a run, so there are no intervals: what is small may be the seed."
    )
    parts = [f"# What each axis moves\n\nPoints against the base, one axis changed. {seeds}"]
    tasks = tasks_moved(alone, arms)
    if not tasks:
        return f"{parts[0]}\n\nNo level alone has a result that the base has too, so there is nothing to tell.\n"
    parts += [_table(alone, tasks), *_conclusions(alone, tasks)]
    if left_out := [task for task in tasks_of(arms) if task not in tasks]:
        parts.append(f"No result of the base to compare with: {', '.join(map(escape_markdown, left_out))}.")
    if together:
        parts += [
            "## Together beyond the sum\n\nWhat axes add together, less what they add alone.",
            _table(together, tasks),
        ]
    if more:
        parts += [
            f"## Beyond what {escape_markdown(reference)} predicts\n\nPoints against the base, less those that the "
            "change of that task gives by a line between the logits of the two, fitted to all runs.",
            _table(more, tasks_moved(more, arms)),
        ]
    return "\n\n".join(parts) + "\n"


def _table(rows: Table, tasks: Sequence[str]) -> str:
    def cell(effect: Effect | None) -> str:
        return NOTHING if effect is None else effect.text

    lines = [[escape_markdown(label), *(cell(row.get(task)) for task in tasks)] for label, row in rows.items()]
    return markdown_table([["", *map(escape_markdown, tasks)], *lines], 1)


def _conclusions(alone: Table, tasks: Sequence[str]) -> list[str]:
    """Return a line for each task: which axis moves it most, and how far the others do."""
    lines = []
    for task in tasks:
        found = [(row[task].mean, label) for label, row in alone.items() if task in row]
        order = sorted(found, key=lambda effect: -abs(effect[0]))
        if len(order) > 1:
            best = f"{escape_markdown(order[0][1])} {order[0][0]:+.1f}"
            others = ", ".join(f"{escape_markdown(label)} {mean:+.1f}" for mean, label in order[1:])
            lines.append(f"- {escape_markdown(task)}: {best} against {others}")
    return ["What moves each task most:\n\n" + "\n".join(lines)] if lines else []
