"""The runs of a study, and their training side by side, one process each on its share of the cores."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from flipscale.evaluation.results import read_metrics
from flipscale.io.errors import UserError
from flipscale.io.options import usable_cores
from flipscale.training.recipe import Recipe
from flipscale.training.schedule import StageRecipe, plan_stages

_POLL_SECONDS = 2.0
_LOOK_SECONDS = 0.2
_REPORT_SECONDS = 30.0


@dataclass(frozen=True)
class StudyRun:
    """One recipe of the study and its run directory."""

    name: str
    recipe: Recipe

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.output_dir)

    def beside(self, extension: str) -> Path:
        """Return the path of a file beside the run directory, with the run's name."""
        return self.run_dir.parent / f"{self.name}.{extension}"

    @property
    def is_done(self) -> bool:
        return (self.run_dir / "DONE").exists()

    def end_words(self, code: int) -> str:
        """Return how the run's process ended: that it is done, or what it said last.

        Args:
            code: the exit code, below 0 that of a signal.
        """
        if not code:
            return "done"
        last = self.beside("log").read_text(errors="replace", encoding="utf-8").strip().splitlines()[-1:]
        words = last[0].removeprefix("flipscale: error: ") if last else "no output"
        ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"ended {ended}: {words}; its output is in {self.beside('log')}"

    def share_done(self) -> float:
        """Return how far the run is, as its last record says."""
        last = (read_metrics(self.run_dir) or [{"trained_seconds": 0.0, "samples_seen": 0}])[-1]
        if self.recipe.budget_minutes is not None:
            return min(last["trained_seconds"] / (60 * self.recipe.budget_minutes), 1.0)
        return last["samples_seen"] / sum(stage.samples or 0 for stage in self.recipe.stages)


def in_time(recipe: Recipe, minutes: float) -> Recipe:
    """Return a recipe as a run that ends after `minutes` of training.

    Stages and warm-ups whose lengths are samples get their shares of the recipe's operations. Metrics are written sixty
    times, evaluations run six times and checkpoints are written ten times, unless the recipe has shares of its own.

    Raises:
        ValueError: the recipe cannot be run as it stands, or a stage is too short to have a share of the time.
    """
    log, evaluated, saved = recipe.log, recipe.eval, recipe.save
    if not log.every_share:
        log = dataclasses.replace(log, every_share=1 / 60)
    if not evaluated.every_share:
        evaluated = evaluated.every(1 / 6)
    if not saved.every_samples and not saved.every_minutes:
        saved = dataclasses.replace(saved, every_minutes=minutes / 10)
    stages = recipe.stages if recipe.budget_minutes is not None else _stages_in_shares(recipe)
    plan_stages(stages, recipe.data.global_batch_size, minutes)
    return dataclasses.replace(recipe, budget_minutes=minutes, stages=stages, log=log, eval=evaluated, save=saved)


def _stages_in_shares(recipe: Recipe) -> list[StageRecipe]:
    """Return the stages of a recipe of samples, each with its share of the operations of all.

    Raises:
        ValueError: the recipe cannot be run as it stands, or its last stage is too short to have a share.
    """
    from flipscale.planning.flops import pair_flops  # runs a model, and `--help` needs none

    plan_stages(recipe.stages, recipe.data.global_batch_size)
    flops = pair_flops(recipe)
    total = sum(flops[stage.name] * (stage.samples or 0) for stage in recipe.stages)

    def share(stage: StageRecipe, samples: int | None) -> float:
        # More digits would only hide what it is.
        return max(round(flops[stage.name] * (samples or 0) / total, 4), 0.0001 if samples else 0.0)

    shares = [share(stage, stage.samples) for stage in recipe.stages]
    shares[-1] = round(1.0 - sum(shares[:-1]), 4)
    if shares[-1] <= 0.0:
        last = recipe.stages[-1]
        raise UserError(
            f"stage {last.name!r}: {last.samples} samples have no share of the time beside the others'; give it more"
        )
    return [
        dataclasses.replace(
            stage, samples=None, warmup_samples=0, share=own, warmup_share=share(stage, stage.warmup_samples)
        )
        for stage, own in zip(recipe.stages, shares, strict=True)
    ]


def train(runs: list[StudyRun], doing: str) -> None:
    """Train those runs that are not done at the same time to their ends, with a progress bar (or a line now and then)
    for each.

    When one fails, or the study is told to end, the others save and stop.

    Raises:
        ValueError, OSError: a run failed; its own last line is in the message.
    """
    # Once, before any run keeps the cores busy: all runs must train in the same precision.
    variables = environment(len(runs))
    runs = [run for run in runs if not run.is_done]
    processes: list[subprocess.Popen] = []
    with Signals(processes) as signals:
        for run in runs:
            processes.append(start(run, variables))
        try:
            _watch(runs, processes, signals, doing)
            failed = [(run, p.returncode) for run, p in zip(runs, processes, strict=True) if p.poll()]
        finally:
            end(processes)
    signals.exit_if_received()
    for run, code in failed:
        raise (UserError if code == 2 else OSError)(f"the run of {run.name} {run.end_words(code)}")


def start(run: StudyRun, variables: dict[str, str]) -> subprocess.Popen:
    """Start a run by its recipe file; what it says goes to the log beside it."""
    command = [sys.executable, "-m", "flipscale.pretrain", "--config", str(run.beside("yaml").absolute())]
    with open(run.beside("log"), "a", encoding="utf-8") as log:
        # In a group of its own: Ctrl-C is for the study, which tells its runs.
        return subprocess.Popen(command, env=variables, stdout=log, stderr=log, process_group=0)


def end(processes: list[subprocess.Popen]) -> None:
    """Let runs save and stop, and wait for that."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


class Signals:
    """In a `with` block, what tells the study to end; a second one ends it and its runs at once.

    Args:
        processes: of the runs, those that have been started.
    """

    def __init__(self, processes: list[subprocess.Popen]):
        self.received: signal.Signals | None = None
        self._processes = processes
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(one) is not signal.SIG_IGN:
                self._before[one] = signal.signal(one, self._receive)
        return self

    def __exit__(self, *raised: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, signal.SIG_DFL if handler is None else handler)

    def exit_if_received(self) -> None:
        """End this process, whose runs have ended, as the signal asks, if one has come."""
        if self.received is not None:
            words = f"flipscale: error: {self.received.name}: the runs have saved and stopped; the same command goes on"
            print(words, file=sys.stderr)
            sys.exit(128 + self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            for process in self._processes:
                process.kill()
            os.write(2, b"flipscale: error: ended before all runs have saved; the same command goes on\n")
            os._exit(128 + number)
        self.received = signal.Signals(number)
        os.write(2, f"{self.received.name}: the runs save and stop; once more to end at once\n".encode())


def environment(num_runs: int) -> dict[str, str]:
    """Return the environment of one run: its share of the cores, and bf16 where it is faster."""
    from flipscale.engines.device import is_faster_in_bf16
    from flipscale.engines.launch import PRECISION

    threads = max(usable_cores() // num_runs, 1)
    share = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    return {PRECISION: "bf16" if is_faster_in_bf16() else "no", **share, **os.environ}


def _watch(runs: list[StudyRun], processes: list[subprocess.Popen], signals: Signals, doing: str) -> None:
    """Show how far the runs are until all have ended, one has failed, or the study is told to end."""
    bars = [
        tqdm(total=100, desc=f"{doing} {run.name}", unit="%", position=number, disable=None)
        for number, run in enumerate(runs)
    ]
    reported = time.monotonic()
    looked = 0.0
    while signals.received is None and any(process.poll() is None for process in processes):
        if any(process.poll() not in (None, 0) for process in processes):
            break
        time.sleep(_LOOK_SECONDS)
        if time.monotonic() - looked < _POLL_SECONDS:
            continue
        looked = time.monotonic()
        for run, bar in zip(runs, bars, strict=True):
            bar.n = round(100 * run.share_done())
            bar.refresh()
        if bars and bars[0].disable and time.monotonic() - reported > _REPORT_SECONDS:
            reported = time.monotonic()
            print("; ".join(_line(run, doing) for run in runs), flush=True)
    for bar in bars:
        bar.close()


def _line(run: StudyRun, doing: str) -> str:
    records = read_metrics(run.run_dir)
    losses = [record["loss"] for record in records if "loss" in record]
    return f"{doing} {run.name}: {run.share_done():.0%}" + (f", loss {losses[-1]:.2f}" if losses else "")
