"""The names of the classes that a classifier learns: `classnames.txt` beside its training shards, then of its run."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from flipscale.data.recipe import DataRecipe
from flipscale.evaluation.test_set import CLASS_NAMES, read_class_names, read_text
from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError

_log = logging.getLogger(__name__)


def training_class_names(recipe: DataRecipe, num_classes: int) -> list[str]:
    """Return the names of the classes of a recipe's shards: the lines of `classnames.txt` in their folder, or in the
    one above it, as CLIP_benchmark lays out sets.

    Raises:
        ValueError: there is no such file, it names fewer than two classes, not as many as the model's head has, or
            another source's file has others; or a source is no shards.
        OSError: it cannot be fetched.
    """
    found: list[str] = []
    where = ""
    for place in [source.shards for source in recipe.sources] or [recipe.shards]:
        if place is None:
            raise UserError(
                "data.sources names a dataset, whose classes have no numbers here; loss.kind 'classify' takes shards, "
                "which `flipscale prepare shards --labels` makes"
            )
        folder = _folder_with_names(place)
        names = read_class_names(folder)
        if found and names != found:
            raise UserError(f"{folder}/{CLASS_NAMES} and {where} name other classes; give all sources the same file")
        found, where = names, f"{folder}/{CLASS_NAMES}"
    if len(found) < 2:
        raise UserError(f"{where} names {len(found)} class; a classifier has two or more to choose from")
    if len(found) != num_classes:
        raise UserError(
            f"{where} names {len(found)} classes, and loss.options says {num_classes}; set it to {len(found)}"
        )
    return found


def _folder_with_names(shards: str) -> str:
    """Return the folder of shards, or the one above it, whichever has `classnames.txt`."""
    folder = shards.rstrip("/")
    if re.search(r"[*?\[{]|\.tar$", folder.rpartition("/")[2]):
        folder = folder.rpartition("/")[0] or "."
    above = folder.rpartition("/")[0] or "."
    return next((place for place in (folder, above) if read_text(place, CLASS_NAMES) is not None), folder)


def keep_class_names(run_dir: Path, names: Sequence[str]) -> None:
    """Write the names of a run's classes to its directory, for its exports."""
    write_text(run_dir / CLASS_NAMES, "".join(f"{name}\n" for name in names))


def refuse_other_class_names(run_dir: Path, names: Sequence[str]) -> None:
    """Raise if a run that goes on has learned other classes.

    Raises:
        ValueError: it has.
    """
    kept = kept_class_names(run_dir, len(names)) if (run_dir / CLASS_NAMES).exists() else list(names)
    changed = [number for number, pair in enumerate(zip(kept, names, strict=True)) if pair[0] != pair[1]]
    if changed:
        raise UserError(
            f"class {changed[0]} is {names[changed[0]]!r} beside the training shards, and {kept[changed[0]]!r} in "
            f"{run_dir}/{CLASS_NAMES}, which the run has learned; use the same classes or another output_dir"
        )


def kept_class_names(run_dir: Path, num_classes: int) -> list[str]:
    """Return the names of a run's classes; LABEL_0, LABEL_1, ... and a warning where the run has none.

    Raises:
        ValueError: the run has another number of them.
    """
    if not (run_dir / CLASS_NAMES).exists():
        _log.warning("%s has no %s: the model's classes have no names", run_dir, CLASS_NAMES)
        return [f"LABEL_{number}" for number in range(num_classes)]
    names = read_class_names(run_dir)
    if len(names) != num_classes:
        raise UserError(f"{run_dir}/{CLASS_NAMES} names {len(names)} classes, and the run learned {num_classes}")
    return names
