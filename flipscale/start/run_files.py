"""The run directory of a start: its checkpoint, and whether it holds this recipe's run."""

import logging
import os
import re
import shlex
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from flipscale.engines.checkpoint import latest_checkpoint, step_of
from flipscale.io.errors import UserError
from flipscale.io.paths import check_writable, quoted
from flipscale.io.yaml_text import read_saved_recipe
from flipscale.recipe.recipe import Recipe, conflicts, is_longer

_log = logging.getLogger(__name__)


def open_run_directory(recipe: Recipe) -> Path | None:
    """Return the newest checkpoint, None for a fresh start. Every process calls this before any of them writes.
    Raise UserError if the directory holds a run of another recipe, or a checkpoint against `resume_from_checkpoint`."""
    run_dir = Path(recipe.output_dir)
    if recipe.resume_from_checkpoint not in ("auto", "never"):
        raise UserError(f"resume_from_checkpoint is {recipe.resume_from_checkpoint!r}; use 'auto' or 'never'")
    check_writable(recipe.output_dir, "output_dir")
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None and (run_dir / "model").exists() and not (run_dir / "DONE").exists():
        raise UserError(
            f"{run_dir} has a model and no checkpoint, and training would replace the model; move it, or use another "
            "output_dir"
        )
    # Without this file, the checkpoints' own copies are compared later.
    if (saved := run_dir / "recipe.yaml").exists():
        step = 0 if checkpoint is None else step_of(checkpoint)
        _refuse_another(run_dir, conflicts(recipe, read_saved_recipe(saved), step))
    if checkpoint is not None and recipe.resume_from_checkpoint == "never":
        raise UserError(f"{run_dir} holds {checkpoint.name} and resume_from_checkpoint is 'never'; change output_dir")
    return checkpoint


def is_done(recipe: Recipe, checkpoint: Path | None) -> bool:
    """Return whether the recipe's run is done, even if its checkpoints and its model are gone. A recipe with added
    stages is not done, and needs the run's checkpoint."""
    run_dir = Path(recipe.output_dir)
    if not (run_dir / "recipe.yaml").exists() or not (run_dir / "DONE").exists():
        return False
    # The checkpoint's copy, because the stages may have been added to the run's own file.
    saved = read_saved_recipe((checkpoint or run_dir) / "recipe.yaml")
    if not is_longer(recipe, saved):
        missing = "" if (run_dir / "model").exists() else ", but its model is gone"
        if missing and checkpoint is not None:
            missing += f": `flipscale export {quoted(run_dir)}` writes it again"
        longer = "add a stage to train further"
        if recipe.budget_minutes is not None:
            longer = f"train further in a new run, with model.init_from {run_dir}/model and another output_dir"
        fix = f"remove it, or choose another output_dir, to train again, or {longer}"
        _log.info("%s is done%s; %s", run_dir, missing, fix)
        return True
    if checkpoint is None:
        raise UserError(
            f"{run_dir} is done and keeps no checkpoint for another stage; train the stage in a new run, with "
            f"model.init_from {run_dir}/model and another output_dir"
        )
    _refuse_another(run_dir, conflicts(recipe, saved, step_of(checkpoint)))
    return False


def _refuse_another(run_dir: Path, changed: Sequence[str]) -> None:
    if not changed:
        return
    fix = "use that recipe or another output_dir"
    if re.match(r"stages\[\d+\]: None", changed[0]):
        fix += "; a stage that is added needs a base_lr, or is the cooldown of a constant rate"
    # The weights fit the recipe's model.
    if not any(re.match(r"model\.(?!init_from)", change) for change in changed) and (run_dir / "model").exists():
        new = next(name for number in count(2) if not os.path.exists(name := f"{run_dir}_{number}"))
        flags = shlex.join(["--model.init_from", str(run_dir), "--output_dir", new])
        fix += f"; to train its model further with this recipe, add {flags}"
    raise UserError(f"{run_dir} holds a run of another recipe ({'; '.join(changed)}); {fix}")
