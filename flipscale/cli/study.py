"""Studies: several runs, compared."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from flipscale.io.command_line import OutputFolder
from flipscale.io.cores import usable_cores
from flipscale.io.errors import UserError
from flipscale.io.options import Count, MinutesAboveZero
from flipscale.io.paths import quoted
from flipscale.process.console import start_logging

# The commands import torch, scipy and the hub when they run, because --help should not wait for them.


@dataclass(frozen=True)
class Race:
    """Train several recipes at once for the same time, and compare them.

    Args:
        recipes: Recipe files or names. The first recipe's model is exported. For several seeds, tables show means with
            intervals and figures show bands.
        minutes: Training time of every recipe by its own clock, without evaluations and saves. A recipe's stages get
            their shares of this time.
        output_dir: The folder for runs, table, figures and model.
        seeds: Number of seeds of every recipe, beginning with its own. The recipes of one seed train at the same time;
            the next seed follows.
        baselines: File of results without a model, such as the nearest training image's, for the table and figures. See
            examples/demo/baselines.py.
    """

    recipes: list[str]
    _: KW_ONLY
    minutes: MinutesAboveZero
    output_dir: OutputFolder
    seeds: Count = 1
    baselines: Path | None = None

    def run(self) -> None:
        from flipscale.studies.race import race

        start_logging()
        race(self.recipes, self.minutes, self.seeds, self.output_dir, self.baselines)


@dataclass(frozen=True)
class Plan:
    """Write one recipe per combination and seed of a study file.

    Args:
        study: The study's file: base, axes, design (star or grid), seeds, and minutes for runs with a time budget.
        output_dir: The folder. Default: runs/ and the file's name.
    """

    study: Path
    _: KW_ONLY
    output_dir: OutputFolder | None = None

    def run(self) -> None:
        from flipscale.studies.design import write_plan

        start_logging()
        folder = self.output_dir or Path("runs", self.study.stem)
        runs = write_plan(self.study, folder)
        print("\n".join(run.name for run in runs))
        print(f"{len(runs)} runs are planned; train them: flipscale study run {quoted(folder)}")


@dataclass(frozen=True)
class Run:
    """Train the unfinished runs of a planned study. If a run fails, the others go on.

    Args:
        folder: The study's folder.
        workers: Number of runs that train side by side.
    """

    folder: Path
    _: KW_ONLY
    workers: Count = 1

    def run(self) -> None:
        from flipscale.studies.design import read_plan
        from flipscale.studies.runs import train_missing

        start_logging()
        if self.workers > usable_cores():
            raise UserError(f"--workers is {self.workers}, and there are {usable_cores()} cores; give each run one")
        train_missing(read_plan(self.folder)[1], self.workers)


@dataclass(frozen=True)
class Report:
    """Write tables, scaling laws and figures of a study's finished runs.

    Args:
        folder: The study's folder.
        resamples: Draws of each bootstrap.
    """

    folder: Path
    _: KW_ONLY
    resamples: Count = 400

    def run(self) -> None:
        from flipscale.studies.study_results import write_results

        start_logging()
        write_results(self.folder, self.resamples)


COMMANDS = {"race": Race, "plan": Plan, "run": Run, "report": Report}
