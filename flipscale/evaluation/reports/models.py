"""The models that a command names: what tables call them, and where their results are kept."""

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


@dataclass(frozen=True)
class NamedModel:
    """A model to evaluate.

    Args:
        given: as the command line has it: a folder of a model or of a run, a Hub name, `open_clip:NAME,PRETRAINED`,
            `hf:NAME` or `untrained:FOLDER`.
        name: what tables and lines call it, without the way to a folder.
        folder: its model folder; None where it is none on this machine, or not flipscale's.
        home: the folder of its `results.jsonl`.
    """

    given: str
    name: str
    folder: Path | None
    home: Path

    @property
    def lines(self) -> Path:
        """Its `results.jsonl`."""
        return self.home / RESULTS_FILE


def name_models(given: Sequence[str], output_dir: Path | None) -> list[NamedModel]:
    """Return the models of a command.

    Results are kept in a local model folder itself, and those of other models in `evaluations/NAME/`; with
    `output_dir`, those of all models in `OUTPUT_DIR/NAME/`.

    Raises:
        ValueError: a model is named twice, or by a path that leads to none.
    """
    names = [_short_name(text) for text in given]
    # Two runs' folders may end alike: then the whole path tells them apart.
    names = [text if names.count(name) > 1 else name for text, name in zip(given, names, strict=True)]
    slugs = [_slug(name) for name in names]
    for text, name, slug in zip(given, names, slugs, strict=True):
        if slugs.count(slug) > 1:
            raise UserError(f"{slugs.count(slug)} models are called {name!r}; name each model once ({text})")
    found = []
    for text, name, slug in zip(given, names, slugs, strict=True):
        folder = None if _PREFIX.match(text) else local_folder(text)
        home = (output_dir or EVALUATIONS) / slug if output_dir or folder is None else folder
        found.append(NamedModel(text, name, folder, home))
    return found


def tables_home(models: Sequence[NamedModel], output_dir: Path | None) -> Path:
    """Return the folder of `results.md` and `results.png`: `output_dir`, else a single model's own, else
    `evaluations`."""
    return output_dir or (models[0].home if len(models) == 1 else EVALUATIONS)


_REPORTS = ("results.md", "results.png")


def check_writable(folder: Path) -> None:
    """Raise if results cannot be written to a folder, which need not exist yet.

    Raises:
        ValueError: it cannot be made or written to, or folders are where its files will be.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if there.is_dir() and os.access(there, os.W_OK):
        if taken := next((folder / name for name in _REPORTS if (folder / name).is_dir()), None):
            raise UserError(f"{taken} is a folder, where results are to be written; move it away")
        return
    reason = "is not writable" if there.is_dir() else "is a file"
    raise UserError(f"results cannot be written to {folder} ({there} {reason}); name another folder with --output_dir")


def _short_name(text: str) -> str:
    """What tables call a model: a run's name for `RUN/model`, a path's last part, any other as it is given."""
    prefix = (_PREFIX.match(text) or [""])[0]
    return prefix + ",".join(_last_part(name) for name in text.removeprefix(prefix).split(","))


def _last_part(name: str) -> str:
    if not Path(name).exists():
        return name
    parts = Path(name).absolute().parts
    return parts[-2] if parts[-1] == "model" and len(parts) > 2 else parts[-1]


def _slug(name: str) -> str:
    return re.sub(r"[^\w.,-]+", "-", os.path.normpath(name)).strip("-")
