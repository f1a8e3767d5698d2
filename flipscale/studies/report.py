"""The report of a planned study: its table, laws of scaling, what each axis moves, and figures."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from flipscale.evaluation.reports.comparison import Curve, headlines, read_curve
from flipscale.evaluation.results import THIS_MODEL, Result
from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.io.text_table import markdown_code, markdown_table
from flipscale.studies.design import BASE, Study, base_of
from flipscale.studies.folder import read_plan
from flipscale.studies.masked import estimate, masked_words
from flipscale.studies.runs import StudyRun
from flipscale.studies.scaling.fitting import Fit, fit_law, largest_budget, predict
from flipscale.studies.scaling.laws import AdditiveLaw, Law, PowerLaw, SaturatingLaw
from flipscale.studies.scaling.points import Points
from flipscale.studies.scaling.transfer import Arm, effects, tasks_moved
from flipscale.studies.scaling.words import fit_words, prediction_words, transfer_words
from flipscale.training.recipe import Recipe

_LAWS: tuple[Callable[[Points], Law], ...] = (PowerLaw, SaturatingLaw, AdditiveLaw)


class Finished:
    """A finished run of a study: its levels, what tables call those, its curve, and what was spent on it."""

    def __init__(self, run: StudyRun, levels: dict[str, str], label: str):
        from flipscale.planning.flops import stage_flops  # runs a model, and `--help` needs none

        self.levels, self.label, self.run_dir, self.recipe = levels, label, run.run_dir, run.recipe
        self.curve = read_curve(run.run_dir)
        about = json.loads((run.run_dir / "environment.json").read_text(encoding="utf-8"))
        flops, seen = stage_flops(run.recipe), _seen_by_stage(self.curve)
        self.spent = {
            "compute": float(sum(flops[stage].training * samples for stage, samples in seen.items())),
            "parameters": float(about["num_parameters"]),
            "samples": float(sum(seen.values())),
            "pairs": float(about["data_samples"]),
        }
        self.tower_flops = float(flops[run.recipe.stages[0].name].modules["vision_model"])

    def result(self, name: str) -> Result | None:
        """Return the last result called `task/metric`, of the model at its end."""
        found = [result for result in self.curve.results if result.name == name and result.who == THIS_MODEL]
        return found[-1] if found else None


def report(output_dir: Path, resamples: int) -> None:
    """Write `report.md`, `transfer.md` and the figures of a planned study, of the runs that are finished, and print the
    table.

    Args:
        resamples: draws of each bootstrap.

    Raises:
        ValueError: the folder holds no planned study, or no run of the base is finished and evaluated.
    """
    study, runs = read_plan(output_dir)
    levels = {name: dict(own) for name, (own, _) in study.runs().items()}
    finished = [Finished(run, levels[run.name], study.label(levels[run.name])) for run in runs if run.is_done]
    if not any(not run.levels for run in finished):
        raise UserError(
            f"{output_dir} has {len(finished)} finished runs of {len(runs)}, none of the base, which the others are "
            f"compared with; train them: flipscale study run {output_dir}"
        )
    groups = {study.label(own): list[Finished]() for own in study.combinations()}
    for run in finished:
        groups[run.label].append(run)
    groups = {label: its for label, its in groups.items() if its}
    names = headlines([run.curve for its in groups.values() for run in its])
    if not names:
        raise UserError(
            f"no run of {output_dir} has a result; set eval.tasks in the base recipe, and plan another study"
        )
    table = _table(groups, names)
    missing = [run.name for run in runs if not run.is_done]
    left = f"\n\nNot finished: {', '.join(missing)}." if missing else ""
    masked = masked_words({label: [run.run_dir / "model" for run in of] for label, of in groups.items()})
    where = _where_masking_pays(study, [run.recipe for run in runs], finished, next(iter(names.items())), output_dir)
    called = f", called {markdown_code(study.label({}))} below" if study.label({}) != BASE else ""
    changed = f", of which all runs change {', '.join(map(markdown_code, study.changes))}" if study.changes else ""
    parts = [
        "# The study",
        f"The base is {markdown_code(study.base)}{called}{changed}.",
        table + left,
        *filter(None, [where, masked]),
        *_laws(groups, names, output_dir, resamples),
    ]
    write_text(output_dir / "report.md", "\n\n".join(parts) + "\n")
    arms = _arms(groups, names)
    write_text(output_dir / "transfer.md", transfer_words(arms, next(iter(names.values()))))
    _draw(study, groups, arms, names, output_dir)
    print(f"{table}{left}\n\n{output_dir}: report.md, transfer.md, *.png")


def _seen_by_stage(curve: Curve) -> dict[str, int]:
    """Return how many pairs each stage saw, as the run's records say."""
    seen: dict[str, int] = {}
    before = 0
    for record in curve.records:
        # Records of evaluations have no stage: their pairs are those of the record of steps that follows.
        if record.get("stage") is not None:
            seen[record["stage"]] = seen.get(record["stage"], 0) + record["samples_seen"] - before
            before = record["samples_seen"]
    last = list(curve.masks)[-1]
    seen[last] = seen.get(last, 0) + curve.records[-1]["samples_seen"] - before
    return seen


def _table(groups: dict[str, list[Finished]], names: dict[str, str]) -> str:
    """Return a row for each configuration: what was spent on it, and its results as means over seeds."""
    rows = [["", "seeds", "pairs seen", "operations", "parameters", "training", *names.values()]]
    for label, runs in groups.items():
        spent = {field: np.mean([run.spent[field] for run in runs]) for field in runs[0].spent}
        seconds = np.mean([run.curve.records[-1]["trained_seconds"] for run in runs])
        cells = [
            f"{spent['samples']:,.0f}",
            f"{spent['compute']:.2e}",
            f"{spent['parameters']:,.0f}",
            f"{seconds:.0f} s",
        ]
        rows.append([label, str(len(runs)), *cells, *(estimate(_results(runs, name)) for name in names)])
    return markdown_table(rows, 1)


def _results(runs: Sequence[Finished], name: str) -> list[Result]:
    return [result for run in runs if (result := run.result(name)) is not None]


def _where_masking_pays(
    study: Study, planned: Sequence[Recipe], finished: Sequence[Finished], result: tuple[str, str], output_dir: Path
) -> str:
    """Return the map of where masking pays as a section of the report, and draw it; nothing of a study that is no map.

    It is one if its axes change nothing but the part of the data, the budget and the stages, so that runs at one place
    of the map are one configuration, and the first stage has mask 0 in some of them.

    Args:
        result: the name of what is compared, `task/metric`, and what tables call it.
    """
    from flipscale.studies.scaling.masking import MapRun, Place, cells_of, draw_map, map_words

    def place(recipe: Recipe) -> Place:
        return Place(recipe.data.fraction, recipe.budget_minutes or 0.0, recipe.stages[0].mask_ratio)

    changed = {str(path) for levels in study.axes.values() for level in levels.values() for path in level}
    places = {place(recipe) for recipe in planned}
    if (
        not all(path in ("data.fraction", "budget_minutes") or path.startswith("stages") for path in changed)
        or not all(place.minutes for place in places)
        or len(places) != len(study.combinations())
        or len({place.mask > 0.0 for place in places}) < 2
    ):
        return ""
    name, words = result
    runs = [MapRun(place(run.recipe), run.spent["pairs"], run.tower_flops, run.curve) for run in finished]
    cells = cells_of(runs, name)
    draw_map(cells, places, words, output_dir / "masking_map.png")
    return map_words(cells, places, words)


def _points(groups: dict[str, list[Finished]], name: str) -> Points | None:
    """Return the configurations as points of a result, None if that is no percentage that should be high."""
    kept: dict[str, list[tuple[Finished, Result]]] = {}
    for label, runs in groups.items():
        found = [(run, result) for run in runs if (result := run.result(name)) is not None]
        if any(result.unit != "%" or not result.higher_is_better for _, result in found):
            return None
        if found:
            kept[label] = found
    fields = ("compute", "parameters", "samples", "pairs")
    spent = {field: np.array([np.mean([run.spent[field] for run, _ in f]) for f in kept.values()]) for field in fields}
    error = np.array([100 - np.mean([result.value for _, result in found]) for found in kept.values()])
    return Points(np.array(list(kept)), spent.pop("compute"), error, **spent)


def _laws(groups: dict[str, list[Finished]], names: dict[str, str], output_dir: Path, resamples: int) -> list[str]:
    """Return sections on the laws of all results, one for those of which the same refusals are all that is said."""
    said: dict[str, list[str]] = {}
    for name, words in names.items():
        said.setdefault(_law_words(groups, name, words, output_dir, resamples), []).append(words)
    return [f"## Laws of {', '.join(results)}\n\n{found}" for found, results in said.items()]


def _law_words(groups: dict[str, list[Finished]], name: str, words: str, output_dir: Path, resamples: int) -> str:
    """Return the laws of a result as Markdown, each with what it predicts of the largest budget, or why there is none;
    draw them."""
    from flipscale.studies.scaling.figures import draw_fits

    try:
        points = _points(groups, name)
    except ValueError as error:
        return f"No law is fitted: {error}."
    if points is None:
        return "It is no percentage of right answers, so no law of its error is fitted."
    parts, fits = list[str](), list[Fit]()
    for kind in _LAWS:
        try:
            law = kind(points)
            fits.append(fit_law(law, points, resamples))
            parts.append(fit_words(fits[-1]))
            for prediction in predict(law, points, largest_budget(points), resamples):
                parts.append(prediction_words(law.name, prediction))
        except ValueError as error:
            parts.append(f"No fit, or no prediction: {error}.")
    draw_fits(points, fits, words, output_dir / f"fits_{name.replace('/', '_')}.png")
    return "\n\n".join(parts)


def _arms(groups: dict[str, list[Finished]], names: dict[str, str]) -> list[Arm]:
    arms = []
    for runs in groups.values():
        results = {
            words: {run.curve.seed: found.value for run in runs if (found := run.result(name)) is not None}
            for name, words in names.items()
        }
        arms.append(Arm(runs[0].levels, {words: by_seed for words, by_seed in results.items() if by_seed}))
    return arms


def _draw(
    study: Study, groups: dict[str, list[Finished]], arms: Sequence[Arm], names: dict[str, str], output_dir: Path
) -> None:
    from flipscale.studies.scaling.figures import draw_axes, draw_times, draw_transfer

    name, words = next(iter(names.items()))
    unit = next(found.unit for runs in groups.values() for found in _results(runs, name))
    shown = ", ".join(filter(None, (words, unit)))
    curves = {label: [run.curve for run in runs] for label, runs in groups.items()}
    panels = {
        axis: {level: curves[label] for level, label in _labels_along(study, axis).items() if label in curves}
        for axis in study.axes
    }
    if panels:
        draw_axes(panels, name, shown, output_dir / "scaling.png")
    draw_times(curves, name, shown, output_dir / "accuracy.png")
    moved = effects(arms)
    if tasks := tasks_moved(moved, arms):
        draw_transfer(moved, tasks, output_dir / "transfer.png")
    _draw_outcomes(study, groups, names, output_dir / "results.png")


def _labels_along(study: Study, axis: str) -> dict[str, str]:
    """Return what the configurations along an axis, all others at their base, are called: by the level, the base
    first."""
    alone = {level: study.label({axis: level}) for level in study.levels_of(axis)}
    return {base_of(study.axes[axis]): study.label({}), **alone}


def _draw_outcomes(study: Study, groups: dict[str, list[Finished]], names: dict[str, str], path: Path) -> None:
    from flipscale.studies.scaling.outcomes import Outcome, draw_grid, draw_rows

    levels = {axis: list(_labels_along(study, axis)) for axis in study.axes}
    outcomes = [
        Outcome(
            label,
            {axis: runs[0].levels.get(axis, own[0]) for axis, own in levels.items()},
            {name: results for name in names if (results := _results(runs, name))},
        )
        for label, runs in groups.items()
    ]
    if study.design == "grid" and len(levels) == 2:
        draw_grid(outcomes, levels, path)
    else:
        draw_rows(outcomes, path)
