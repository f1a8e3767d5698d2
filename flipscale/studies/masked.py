"""What `flipscale evaluate --mask_ratio` found of a study's models: the paper's Table 1d, over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from flipscale.evaluation.intervals import mean_of
from flipscale.evaluation.results import NOTHING, RESULTS_FILE, Result
from flipscale.io.text_table import escape_markdown, markdown_table

# By what the images were seen through, then by what tables call a result: those of all seeds.
_Found = dict[str, dict[str, list[Result]]]


def masked_words(models: Mapping[str, Sequence[Path]]) -> str:
    """Return a section of the report with a row for each configuration and mask; nothing where no model was evaluated
    on masked images.

    Args:
        models: the model folders of each configuration, one for each seed.

    Raises:
        ValueError: as `read_lines`.
    """
    found = {label: _found(folders) for label, folders in models.items()}
    if not any(len(by_mask) > 1 for by_mask in found.values()):
        return ""
    names = list(dict.fromkeys(name for by_mask in found.values() for its in by_mask.values() for name in its))
    rows = [["", "image", "seeds", *names]]
    for label, by_mask in found.items():
        for mask, its in by_mask.items():
            seeds = max(len(results) for results in its.values())
            rows.append([escape_markdown(label), mask, str(seeds), *(estimate(its.get(name, [])) for name in names)])
    return f"## On masked images\n\n{markdown_table(rows, 2)}"


def estimate(results: Sequence[Result]) -> str:
    """Return the mean of a result over seeds with its interval, the value of one seed, or a dash."""
    if not results:
        return NOTHING
    if len(results) == 1:
        return results[0].value_text
    mean, low, high = mean_of([result.value for result in results], results[0].unit)
    return replace(results[0], value=mean, low=low, high=high).estimate_text


def _found(folders: Sequence[Path]) -> _Found:
    from flipscale.evaluation.embedders.masked import ImageMask  # with torch, and --help needs none
    from flipscale.evaluation.reports.record import read_lines

    found: _Found = {}
    for folder in folders:
        # A task that was done twice, with other data, counts by its last line.
        own = {
            (ImageMask(**(line.about.get("mask") or {})).label, f"{line.result.task} {line.result.shown}"): line.result
            for line in read_lines(folder / RESULTS_FILE)
            if line.result.headline
        }
        for (mask, name), result in own.items():
            found.setdefault(mask, {}).setdefault(name, []).append(result)
    return found
