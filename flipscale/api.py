"""Training and evaluation from a script or a notebook: `from flipscale.api import read_recipe, train, evaluate`.

On one process by default; a script with these calls runs on several under `accelerate launch`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flipscale.evaluation.results import RESULTS_FILE, Result
from flipscale.evaluation.suite import build_tasks
from flipscale.io.errors import UserError
from flipscale.process.console import start_logging
from flipscale.process.preemption import Stopped
from flipscale.process.state import kept_state
from flipscale.recipe.recipe import Recipe
from flipscale.start.complete_recipe import parse_recipe

if TYPE_CHECKING:
    import numpy as np

    from flipscale.evaluation.embedding import Embedder

__all__ = ["Recipe", "Result", "evaluate", "explain", "read_recipe", "train"]

# Run directory in training by process, because a process that is forked meanwhile inherits this without the training.
_training: dict[int, Path] = {}


def read_recipe(name: str | Path, **fields: Any) -> Recipe:
    """Return a recipe, with fields replaced: `read_recipe("small_cpu", **{"data.shards": "data/mine"})`. Raise
    UserError if the recipe or a field is wrong.

    Args:
        name: recipe file, or the name of a recipe of the package.
        fields: values by the names of their flags, without dashes.
    """
    words = [word for field, value in fields.items() for word in (f"--{field}", _written(value))]
    return parse_recipe(["--config", str(name), *words])


def _written(value: Any) -> str:
    """Return a value as it is typed after a flag."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 20).removesuffix("...\n").strip()
    return str(value) if isinstance(value, str | Path) else text


def train(recipe: Recipe) -> Path:
    """Collective. Train a recipe to its end, or on from its newest checkpoint, and return the run directory.

    In another thread than the main one, signals do not reach the run. A process trains one recipe at a time, because
    all its threads draw from one generator.

    Raises:
        KeyboardInterrupt: a signal such as Ctrl-C asked for an end. The run has saved; the same call continues it.
        UserError: the recipe cannot be run as it stands, or another thread of this process trains.
        FloatingPointError: the loss stayed non-finite.
        OSError: a checkpoint could not be written.
    """
    from flipscale.pretrain import pretrain, write_page

    process, run_dir = os.getpid(), Path(recipe.output_dir)
    if (other := _training.setdefault(process, run_dir)) is not run_dir:
        raise UserError(
            f"output_dir is {run_dir}, and another thread of this process trains {other}; expected one training of a "
            "process at a time. Fix: start each in its own process"
        )
    try:
        with kept_state():
            start_logging()
            pretrain(recipe)
            write_page(recipe)
    except Stopped:
        raise KeyboardInterrupt(f"{run_dir} has saved and stopped") from None
    finally:
        del _training[process]
    return run_dir


def evaluate(model: str | Path, tasks: Sequence[str | dict[str, Any]]) -> list[Result]:
    """Collective. Return the results of a model, one for each number; other processes than the main one return none.

    `pandas.DataFrame(results)` is a table of them. Results of a model folder are kept in it and not computed again.
    Raise UserError if the model or the data of a task cannot be used.

    Args:
        model: run, model folder, Hub name, `open_clip:NAME,PRETRAINED` or `hf:NAME`.
        tasks: names of tasks' pages or their fields, as `eval.tasks` of a recipe.
    """
    from flipscale.cli.evaluate import name_models
    from flipscale.engines.build_engine import start_accelerator
    from flipscale.evaluation.model_results import evaluate_model
    from flipscale.hub.loading import open_embedder

    built = build_tasks(tasks)
    for task in built:
        task.check()
    (named,) = name_models([str(model)], None)
    named.home.mkdir(parents=True, exist_ok=True)
    embedder = open_embedder(str(model), start_accelerator([], "."))
    lines = evaluate_model(embedder, named.name, named.home / RESULTS_FILE, built, named.folder)
    return [line.result for line in lines]


def explain(model: "str | Path | Embedder", image: str | Path, text: str) -> "np.ndarray":
    """Return where in an image a text is: the similarity of each patch with the text, fp32 `(rows, columns)`.

    The patches are those of the image as the model sees it: of its centred square, or for SigLIP of the whole image.
    `flipscale.evaluation.explain.patch_embeds` says how it is computed for each kind of model.

    Args:
        model: run, model folder, Hub name or `hf:NAME`; for many calls, the result of
            `flipscale.hub.loading.open_embedder`.
        image: picture file.

    Raises:
        UserError: the model has no texts or no embeddings of patches, or the file is not a picture.
    """
    from flipscale.engines.build_engine import start_accelerator
    from flipscale.evaluation.explain import heat_map
    from flipscale.hub.loading import open_embedder

    embedder = open_embedder(str(model), start_accelerator([], ".")) if isinstance(model, str | Path) else model
    return heat_map(embedder, Path(image), text)
