"""The report of a search: the front of accuracy against time, all paths, and a figure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flipscale.evaluation.results import NOTHING, Result
from flipscale.io.atomic import write_text
from flipscale.io.text_table import markdown_table
from flipscale.training.recipe import Recipe

# Clocks that differ by more are no equal ones.
_MOST_UNEQUAL = 0.01


@dataclass(frozen=True)
class Trained:
    """What a path came to in a rung.

    Args:
        name: of the path.
        failure: how its run ended, empty if that was its end.
        result: of the evaluation that paths are chosen by; None if it failed.
        seconds: of training.
        samples: pairs that it saw.
    """

    name: str
    failure: str
    result: Result | None = None
    seconds: float = 0.0
    samples: int = 0


@dataclass(frozen=True)
class Rung:
    """The paths that were trained for one time, in minutes."""

    minutes: float
    paths: Sequence[Trained]


def best_first(paths: Sequence[Trained]) -> list[Trained]:
    """Return those of a rung that have a result, the best first; of equals, in the order of the file."""
    return sorted((path for path in paths if path.result is not None), key=_badness)


def _badness(path: Trained) -> float:
    assert path.result is not None
    value = path.result.value
    if not math.isfinite(value):
        return math.inf
    return -value if path.result.higher_is_better else value


def write_search_report(rungs: Sequence[Rung], recipes: Mapping[str, Recipe], validation: str, output_dir: Path) -> str:
    """Write `report.md` and `front.png`, print the tables, and return what the winner was chosen by, with its result.

    Args:
        rungs: as far as they are done, the last with one path or more that has a result.
        recipes: of all paths, by their names.
        validation: the name of the evaluation.
    """
    from flipscale.studies.scaling.figures import draw_rungs

    best = [best_first(rung.paths)[0] for rung in rungs]
    last = best[-1].result
    assert last is not None
    words = f"{validation} {last.shown}"
    front = [place for place, path in enumerate(best) if all(_badness(path) < _badness(b) for b in best[:place])]
    rows = [["training", "best path", "stages", "pairs seen", words]]
    for place in front:
        path = best[place]
        cells = [path.name, stages_words(recipes[path.name]), f"{path.samples:,}", _cell(path)]
        rows.append([f"{rungs[place].minutes:g} min", *cells])
    tables = [
        markdown_table(rows, 3),
        _all_paths(rungs, recipes, words),
        *_within(best_first(rungs[-1].paths)),
        *unequal_clocks(rungs),
        *_failures(rungs),
    ]
    titles = "\n\n".join(tables)
    write_text(output_dir / "report.md", f"# The search\n\n{titles}\n")
    trained = [(60 * rung.minutes, path) for rung in rungs for path in rung.paths]
    courses = {n: [(at, path.result) for at, path in trained if path.name == n and path.result] for n in recipes}
    draw_rungs(courses, f"{words}, {last.unit}".rstrip(", "), output_dir / "front.png")
    winner = output_dir / "winner.yaml"
    print(f"\n{titles}\n\n{output_dir}: report.md, front.png, {winner.name}; flipscale pretrain --config {winner}")
    return f"{words}, {last.estimate_text},"


def stages_words(recipe: Recipe) -> str:
    """Return what the stages of a path do, with their shares of the time: `32 px whole 85 %, 64 px whole 15 %`."""
    own = recipe.model_config().vision_config
    parts = []
    for stage in recipe.stages:
        masked = f"{100 * stage.mask_ratio:g} % masked ({recipe.mask.kind})" if stage.mask_ratio else "whole"
        parts.append(f"{stage.image_size or own.image_size} px {masked} {100 * (stage.share or 0.0):.3g} %")
    return ", ".join(parts)


def _all_paths(rungs: Sequence[Rung], recipes: Mapping[str, Recipe], words: str) -> str:
    """Return a row for each path with its result in each rung, those that came furthest first."""
    found = [{path.name: path for path in rung.paths} for rung in rungs]
    order: list[str] = []
    for rung in reversed(rungs):
        order += [path.name for path in best_first(rung.paths) if path.name not in order]
    order += [name for name in recipes if name not in order]
    rows = [[f"path, {words}", "stages", *(f"{rung.minutes:g} min" for rung in rungs)]]
    for name in order:
        cells = [_cell(paths[name]) if name in paths else NOTHING for paths in found]
        rows.append([name, stages_words(recipes[name]), *cells])
    return markdown_table(rows, 2)


def _cell(path: Trained) -> str:
    return "failed" if path.result is None else path.result.estimate_text


def _within(ranked: Sequence[Trained]) -> list[str]:
    """Return a line that names the paths of the last rung that the winner is not apart from."""
    result = ranked[0].result
    if result is None or result.low is None or result.high is None:
        return []
    near = [path.name for path in ranked[1:] if path.result and result.low <= path.result.value <= result.high]
    if not near:
        return [f"No other path of the last rung lies within the interval of {ranked[0].name}; each had one seed."]
    return [f"Within the interval of {ranked[0].name} lie {', '.join(near)}; each had one seed."]


def unequal_clocks(rungs: Sequence[Rung]) -> list[str]:
    """Return a line that names the runs that trained for another time than their rung's."""
    late = [
        f"{path.name} {path.seconds:.1f} s in place of {60 * rung.minutes:.1f}"
        for rung in rungs
        for path in rung.paths
        if path.result and abs(path.seconds - 60 * rung.minutes) > _MOST_UNEQUAL * 60 * rung.minutes
    ]
    return [f"Clocks that are more than 1 % off, which do not compare: {', '.join(late)}."] if late else []


def _failures(rungs: Sequence[Rung]) -> list[str]:
    lines = [
        f"- {path.name}, {rung.minutes:g} min: {path.failure}" for rung in rungs for path in rung.paths if path.failure
    ]
    return ["Failed, and out:\n\n" + "\n".join(lines)] if lines else []
