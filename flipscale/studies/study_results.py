"""`flipscale study report`: tables, laws of scaling, effects of the axes and figures of a study's finished runs."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flipscale.evaluation.masked_images import ImageMask
from flipscale.evaluation.model_results import read_result_lines
from flipscale.evaluation.presentation.curves import Curve, estimate, headlines, read_curve
from flipscale.evaluation.results import RESULTS_FILE, THIS_MODEL, Result
from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.io.paths import quoted
from flipscale.io.text_table import escape_markdown, markdown_code, markdown_table
from flipscale.planning.flops import stage_flops
from flipscale.studies.design import BASE, Study, read_plan
from flipscale.studies.laws import AdditiveLaw, Law, LawFit, Points, PowerLaw, SaturatingLaw, fit_law, predict
from flipscale.studies.runs import StudyRun
from flipscale.studies.study_figures import draw_fits, draw_grid, draw_rows, draw_study_curves, draw_transfer
from flipscale.studies.transfer import Arm, effects, tasks_moved, transfer_report

_LAWS: tuple[Callable[[Points], Law], ...] = (PowerLaw, SaturatingLaw, AdditiveLaw)


class StudyResult:
    """A finished run of a study: its levels and their label, its curve, and what was spent on it."""

    def __init__(self, run: StudyRun, levels: dict[str, str], label: str):
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


class Configuration:
    """The finished runs of a combination of levels, which differ in their seeds."""

    def __init__(self, runs: list[StudyResult]):
        self.runs, self.levels = runs, runs[0].levels
        self.curves = [run.curve for run in runs]

    def results(self, name: str) -> dict[int, Result]:
        """Return the final models' results named `task/metric`, by seed; seeds without this result are left out."""
        return {c.seed: r for c in self.curves for r in c.results if r.name == name and r.who == THIS_MODEL}

    def spent(self, field: str, name: str | None = None) -> float:
        """Return the mean spending over all seeds, or over those with the result `name`."""
        return float(
            np.mean([run.spent[field] for run in self.runs if not name or run.curve.seed in self.results(name)])
        )


Configurations = dict[str, Configuration]  # by label


def read_study_results(output_dir: Path) -> tuple[Study, list[StudyRun], list[StudyResult]]:
    """Return a planned study, its runs, and the results of its finished runs. Raise UserError if the folder holds no
    planned study, or no run of the base is finished."""
    study, runs = read_plan(output_dir)
    levels = {name: dict(own) for name, (own, _) in study.runs().items()}
    results = [StudyResult(run, levels[run.name], study.label(levels[run.name])) for run in runs if run.is_done]
    if all(run.levels for run in results):
        raise UserError(
            f"{output_dir} has {len(results)} finished runs of {len(runs)}, none of the base, which the others are "
            f"compared with; train them: flipscale study run {quoted(output_dir)}"
        )
    return study, runs, results


def write_results(output_dir: Path, resamples: int) -> None:
    """Write `report.md`, `transfer.md` and the figures of a study's finished runs, and print the table. Raise UserError
    if the folder holds no planned study, or no run of the base is finished and evaluated."""
    study, runs, results = read_study_results(output_dir)
    labels = [study.label(levels) for levels in study.combinations()]
    by_label = {label: [run for run in results if run.label == label] for label in labels}
    configurations = {label: Configuration(own) for label, own in by_label.items() if own}
    names = headlines([curve for one in configurations.values() for curve in one.curves])
    if not names:
        raise UserError(f"no run of {output_dir} has a result; set eval.tasks in the base recipe, and plan it anew")
    table = _table(configurations, names)
    if missing := [run.name for run in runs if not run.is_done]:
        table += f"\n\nNot finished: {', '.join(missing)}."
    called = f", called {markdown_code(study.label({}))} below" if study.label({}) != BASE else ""
    changed = f", of which all runs change {', '.join(map(markdown_code, study.changes))}" if study.changes else ""
    parts = [f"# The study\n\nThe base is {markdown_code(study.base)}{called}{changed}.", table]
    parts += filter(None, [_masked_table(configurations)])
    # Results refused for the same reason share a section.
    laws: dict[str, list[str]] = {}
    for name, words in names.items():
        laws.setdefault(_laws_of(configurations, name, words, output_dir, resamples), []).append(words)
    parts += [f"## Laws of {', '.join(shown)}\n\n{text}" for text, shown in laws.items()]
    write_text(output_dir / "report.md", "\n\n".join(parts) + "\n")
    arms = []
    for one in configurations.values():
        values = {w: {seed: r.value for seed, r in one.results(name).items()} for name, w in names.items()}
        arms.append(Arm(one.levels, {words: own for words, own in values.items() if own}))
    write_text(output_dir / "transfer.md", transfer_report(arms, next(iter(names.values()))))
    _draw(study, configurations, arms, names, output_dir)
    print(f"{table}\n\n{output_dir}: report.md, transfer.md, *.png")


def _seen_by_stage(curve: Curve) -> Counter[str]:
    """Return the number of pairs seen in each stage, from the run's records."""
    seen: Counter[str] = Counter()
    before = 0
    for record in curve.records:
        # Records of evaluations have no stage; the next record of steps includes their pairs.
        if record.get("stage") is not None:
            seen[record["stage"]] += record["samples_seen"] - before
            before = record["samples_seen"]
    seen[list(curve.masks)[-1]] += curve.records[-1]["samples_seen"] - before
    return seen


def _table(configurations: Configurations, names: dict[str, str]) -> str:
    """Return a row for each configuration: its spending, and its results as means over seeds."""
    rows = [["", "seeds", "pairs seen", "operations", "parameters", "training", *names.values()]]
    for label, one in configurations.items():
        seconds = np.mean([curve.records[-1]["trained_seconds"] for curve in one.curves])
        pairs, flops, parameters = map(one.spent, ("samples", "compute", "parameters"))
        cells = [str(len(one.runs)), f"{pairs:,.0f}", f"{flops:.2e}", f"{parameters:,.0f}", f"{seconds:.0f} s"]
        rows.append([label, *cells, *(estimate([*one.results(name).values()]) for name in names)])
    return markdown_table(rows, 1)


def _masked_table(configurations: Configurations) -> str:
    """Return a section with a row for each configuration and mask; empty if no model was evaluated on masked images.

    These are the results of `flipscale evaluate --mask_ratio`: the paper's Table 1d, over seeds.
    """
    # Results of all seeds by configuration, mask, and name in tables.
    by_mask: dict[str, dict[str, dict[str, list[Result]]]] = {label: {} for label in configurations}
    for label, one in configurations.items():
        for run in one.runs:
            # A task that was evaluated twice, with other data, counts by its last line.
            lines = {
                (ImageMask(**(line.about.get("mask") or {})).label, f"{line.result.task} {line.result.shown}"): line
                for line in read_result_lines(run.run_dir / "model" / RESULTS_FILE)
                if line.result.headline
            }
            for (mask, name), line in lines.items():
                by_mask[label].setdefault(mask, {}).setdefault(name, []).append(line.result)
    if not any(len(own) > 1 for own in by_mask.values()):
        return ""
    names = list(dict.fromkeys(name for own in by_mask.values() for by_name in own.values() for name in by_name))
    rows = [["", "image", "seeds", *names]]
    for label, own in by_mask.items():
        for mask, by_name in own.items():
            seeds = str(max(map(len, by_name.values())))
            rows.append([escape_markdown(label), mask, seeds, *(estimate(by_name.get(name, [])) for name in names)])
    return f"## On masked images\n\n{markdown_table(rows, 2)}"


def _laws_of(configurations: Configurations, name: str, words: str, output_dir: Path, resamples: int) -> str:
    """Draw the laws of a result; return them as Markdown, with their predictions of the largest budget or refusals."""
    kept = {label: one for label, one in configurations.items() if one.results(name)}
    results = [[*one.results(name).values()] for one in kept.values()]
    if any(result.unit != "%" or not result.higher_is_better for own in results for result in own):
        return "It is not a percentage of right answers, so no law of its error is fitted."
    error = np.array([100 - np.mean([result.value for result in own]) for own in results])
    fields = ("compute", "parameters", "samples", "pairs")
    spent = {field: np.array([one.spent(field, name) for one in kept.values()]) for field in fields}
    try:
        points = Points(np.array(list(kept)), error=error, **spent)
    except UserError as refusal:
        return f"No law is fitted: {refusal}."
    parts, fits = list[str](), list[LawFit]()
    for kind in _LAWS:
        try:
            law = kind(points)
            fits.append(fit_law(law, points, resamples))
            parts.append(str(fits[-1]))
            parts += map(str, predict(law, points, points.largest_budget(), resamples))
        except UserError as refusal:
            parts.append(f"No fit, or no prediction: {refusal}.")
    draw_fits(points, fits, words, output_dir / f"fits_{name.replace('/', '_')}.png")
    return "\n\n".join(parts)


def _draw(
    study: Study, configurations: Configurations, arms: list[Arm], names: dict[str, str], output_dir: Path
) -> None:
    name, words = next(iter(names.items()))
    unit = next(result.unit for one in configurations.values() for result in one.results(name).values())
    shown = ", ".join(filter(None, (words, unit)))
    curves = {label: one.curves for label, one in configurations.items()}
    levels = {axis: study.levels_of(axis) for axis in study.axes}
    panels: dict[str, dict[str, list[Curve]]] = {axis: {} for axis in levels}
    for axis, (base, *others) in levels.items():
        labels = {base: study.label({}), **{level: study.label({axis: level}) for level in others}}
        panels[axis] = {level: curves[label] for level, label in labels.items() if label in curves}
    if panels:
        draw_study_curves(panels, "samples_seen", name, shown, output_dir / "scaling.png")
    draw_study_curves({"": curves}, "trained_seconds", name, shown, output_dir / "accuracy.png")
    moved = effects(arms)
    if tasks := tasks_moved(moved, arms):
        draw_transfer(moved, tasks, output_dir / "transfer.png")
    ends = {
        label: {name: results for name in names if (results := [*one.results(name).values()])}
        for label, one in configurations.items()
    }
    if study.design == "grid" and len(levels) == 2:
        (axis, (base, *_)), (along, (start, *_)) = levels.items()
        places = {label: (c.levels.get(axis, base), c.levels.get(along, start)) for label, c in configurations.items()}
        draw_grid({places[label]: own for label, own in ends.items()}, levels, output_dir / "results.png")
    else:
        draw_rows(ends, output_dir / "results.png")
