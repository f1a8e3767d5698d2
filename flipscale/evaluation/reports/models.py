"""The models that a command names: their names in tables, and the folders of their results."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flipscale.evaluation.results import RESULTS_FILE
from flipscale.io.errors import UserError
from flipscale.io.model_folder import local_folder

EVALUATIONS = Path("evaluations")
_PREFIX = re.compile(r"^(?:open_clip|hf|untrained):")
_REPORTS = ("results.md", "results.png")


@dataclass(frozen=True)
class NamedModel:
    """A model to evaluate.

    Args:
        name: name in tables and lines, without the path of a folder.
        folder: local flipscale model folder; None for other models.
        home: folder of its `results.jsonl`.
    """

    given: str
    name: str
    folder: Path | None
    home: Path

    @property
    def lines(self) -> Path:
        return self.home / RESULTS_FILE


def name_models(given: Sequence[str], output_dir: Path | None) -> list[NamedModel]:
    """Return the models of a command.

    Results of a local model folder go into the folder itself, results of other models into `evaluations/NAME/`. With
    `output_dir`, all go into `OUTPUT_DIR/NAME/`."""
    names = [_short_name(text) for text in given]
    # Runs in different folders may have one name. Then the whole path is the name.
    names = [text if names.count(name) > 1 else name for text, name in zip(given, names, strict=True)]
    slugs = [re.sub(r"[^\w.,-]+", "-", os.path.normpath(name)).strip("-") for name in names]
    models = []
    for text, name, slug in zip(given, names, slugs, strict=True):
        if slugs.count(slug) > 1:
            raise UserError(f"{slugs.count(slug)} models are called {name!r}; name each model once ({text})")
        folder = None if _PREFIX.match(text) else local_folder(text)
        home = (output_dir or EVALUATIONS) / slug if output_dir or folder is None else folder
        models.append(NamedModel(text, name, folder, home))
    return models


def tables_home(models: Sequence[NamedModel], output_dir: Path | None) -> Path:
    """Return the folder of `results.md` and `results.png`: `output_dir`, else a single model's home, else
    `evaluations`."""
    return output_dir or (models[0].home if len(models) == 1 else EVALUATIONS)


def check_writable(folder: Path) -> None:
    """Raise if results cannot be written to a folder. The folder need not exist yet."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if there.is_dir() and os.access(there, os.W_OK):
        if taken := next((folder / name for name in _REPORTS if (folder / name).is_dir()), None):
            raise UserError(f"{taken} is a folder, where results are to be written; move it away")
        return
    reason = "is not writable" if there.is_dir() else "is a file"
    raise UserError(f"results cannot be written to {folder} ({there} {reason}); name another folder with --output_dir")


def _short_name(text: str) -> str:
    """Return a run's name for `RUN/model`, the last part of a path, and any other text unchanged."""
    prefix, names = (_PREFIX.match(text) or [""])[0], []
    for name in text.removeprefix(prefix).split(","):
        parts = Path(name).absolute().parts if Path(name).exists() else (name,)
        names.append(parts[-2] if parts[-1] == "model" and len(parts) > 2 else parts[-1])
    return prefix + ",".join(names)
