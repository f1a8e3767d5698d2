"""The folder of a planned study: its file, a recipe for each run, and the run directories beside those.

study.yaml  runs/NAME.yaml  runs/NAME/  runs/NAME.log, and what the report writes
"""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.io.files import check_writable
from flipscale.io.options import changed_fields
from flipscale.studies.design import Study, plan, read_study
from flipscale.studies.runs import StudyRun
from flipscale.training.recipe import Recipe, parse_recipe, to_yaml

STUDY_FILE = "study.yaml"


def write_plan(study_file: Path, output_dir: Path) -> list[StudyRun]:
    """Write the recipe of each run of a study to `output_dir/runs`, and return the runs.

    A folder that holds the study already gets what it lacks: a study may grow.

    Raises:
        ValueError: as `read_study` and `plan`, or the folder holds something else, or a run that was planned is another
            one now or none any more.
    """
    study = read_study(study_file)
    check_writable(output_dir, "output_dir")
    folder = output_dir / "runs"
    runs = plan(study, folder)
    if output_dir.exists() and not (output_dir / STUDY_FILE).exists() and any(output_dir.iterdir()):
        there = sorted(output_dir.iterdir())[0].name
        raise UserError(f"{output_dir} holds {there}, which no study wrote; name a new or an empty folder")
    planned = {run.name: run for run in runs}
    for file in sorted(folder.glob("*.yaml")):
        if file.stem not in planned:
            raise UserError(
                f"{output_dir} was planned with a run {file.stem}, which {study_file} has not now; name another folder"
            )
        changed = sorted(changed_fields(_fields(_load(file)), _fields(planned[file.stem].recipe)))
        if changed:
            raise UserError(
                f"{file} was planned otherwise than {study_file} says now ({'; '.join(changed)}); name another folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    content = {name: value for name, value in dataclasses.asdict(study).items() if value}
    write_text(output_dir / STUDY_FILE, yaml.safe_dump(content, sort_keys=False))
    for run in runs:
        if not (folder / f"{run.name}.yaml").exists():
            write_text(folder / f"{run.name}.yaml", to_yaml(run.recipe))
    return runs


def read_plan(output_dir: Path) -> tuple[Study, list[StudyRun]]:
    """Return a planned study and its runs as their recipes' files have them.

    Raises:
        ValueError: the folder holds no planned study, or a recipe is missing.
    """
    file = output_dir / STUDY_FILE
    if not file.is_file():
        raise UserError(f"{output_dir} holds no planned study; write one there: flipscale study plan STUDY.yaml")
    study = read_study(file)
    files = [output_dir / "runs" / f"{name}.yaml" for name in study.runs()]
    for recipe in files:
        if not recipe.is_file():
            raise UserError(f"{recipe} is missing; plan the study again: flipscale study plan STUDY.yaml")
    return study, [StudyRun(recipe.stem, _load(recipe)) for recipe in files]


def _load(file: Path) -> Recipe:
    return parse_recipe(["--config", str(file.absolute())])


def _fields(recipe: Recipe) -> dict[str, Any]:
    # A folder may be named by another path the next time.
    fields: dict[str, Any] = yaml.safe_load(to_yaml(recipe))
    return {**fields, "output_dir": str(Path(recipe.output_dir).absolute())}
