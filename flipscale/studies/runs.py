"""The runs of a study, and their training as processes on shares of the cores."""

import dataclasses
import heapq
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import yaml

from flipscale.io.atomic import write_text
from flipscale.io.cores import usable_cores
from flipscale.io.errors import UserError
from flipscale.io.json_lines import read_metrics
from flipscale.io.paths import last_line, read_text
from flipscale.io.progress import Progress
from flipscale.planning.budget import with_time_shares
from flipscale.process.preemption import may_be_echo
from flipscale.recipe.recipe import Recipe, differences, to_yaml
from flipscale.recipe.rules import check_rules


@dataclass(frozen=True)
class StudyRun:
    """One recipe of a study and its run directory."""

    name: str
    recipe: Recipe

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.output_dir)

    def beside(self, extension: str) -> Path:
        """Return the path of the recipe or the log next to the run directory, with the run's name."""
        return self.run_dir.parent / f"{self.name}.{extension}"

    @property
    def is_done(self) -> bool:
        return (self.run_dir / "DONE").exists()

    def percent_done(self) -> int:
        """Return the finished part of the run by its last record, in percent."""
        last = (read_metrics(self.run_dir) or [{"trained_seconds": 0.0, "samples_seen": 0}])[-1]
        if self.recipe.budget_minutes is not None:
            return min(round(100 * last["trained_seconds"] / (60 * self.recipe.budget_minutes)), 100)
        return round(100 * last["samples_seen"] / sum(stage.samples or 0 for stage in self.recipe.stages))


def in_time(recipe: Recipe, minutes: float) -> Recipe:
    """Return a recipe that ends after `minutes` of training.

    Stages and warm-ups in samples get their shares of the recipe's operations. Metrics are written sixty times,
    evaluations run six times and checkpoints are written ten times, unless the recipe has shares of its own.
    """
    log, evaluated, saved = recipe.log, recipe.eval, recipe.save
    if not log.every_share:
        log = dataclasses.replace(log, every_share=1 / 60)
    if not evaluated.every_share:
        evaluated = evaluated.every(1 / 6)
    if not saved.every_samples and not saved.every_minutes:
        saved = dataclasses.replace(saved, every_minutes=minutes / 10)
    timed = with_time_shares(dataclasses.replace(recipe, budget_minutes=minutes, log=log, eval=evaluated, save=saved))
    check_rules(timed)
    return timed


def write_recipes(runs: Sequence[StudyRun], mark: Path, content: str) -> None:
    """Write the file that marks the common folder of runs, then the recipe of each run next to its directory. Raise
    UserError if an earlier recipe of a run differs in what is learned."""
    for run in runs:
        saved = run.beside("yaml")
        if changed := differences(run.recipe, yaml.safe_load(read_text(saved))) if saved.exists() else []:
            raise UserError(f"{saved} differs from this study ({'; '.join(changed)}); name another output_dir")
    runs[0].run_dir.parent.mkdir(parents=True, exist_ok=True)
    write_text(mark, content)
    for run in runs:
        write_text(run.beside("yaml"), to_yaml(run.recipe))


def train_missing(runs: Sequence[StudyRun], workers: int) -> None:
    """Train the unfinished runs, `workers` at a time. A failed run stops no other. Raise OSError if some runs failed;
    the others are done."""
    if failed := train_runs(runs, workers):
        others = "the others are done, and " if len(failed) < len(runs) else ""
        raise OSError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; {others}this command retries")


def longest_queue(lengths: Iterable[int], workers: int) -> int:
    """Return when the last of the runs ends, if each worker that is free starts the next."""
    ends = [0] * workers
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def train_runs(
    runs: Sequence[StudyRun], workers: int, stops_at_failure: bool = False, later: Sequence[StudyRun] = ()
) -> dict[str, tuple[int, str]]:
    """Train the unfinished runs, `workers` at a time, printing each end. Return exit codes and last lines of failures.
    With `stops_at_failure`, the others save and stop. The time left counts the runs of `later` calls too. Raise
    SystemExit if the study received a signal, and OSError if a run did. The runs have saved."""
    waiting = [run for run in runs if not run.is_done]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done", flush=True)
    variables = _environment(workers) if waiting else {}
    running: dict[str, tuple[StudyRun, subprocess.Popen[bytes]]] = {}
    failed: dict[str, tuple[int, str]] = {}
    stopped: list[str] = []
    looked = time.monotonic()
    left = {run.name: 100 - run.percent_done() for run in (*waiting, *later) if not run.is_done}
    whole = max(longest_queue(left.values(), workers), 1)
    progress = Progress(100, f"training {len(left)} runs", "%", leave=False)
    with _signals(running) as received, progress:
        try:
            while not received and (waiting or running) and not (stops_at_failure and failed):
                while waiting and len(running) < workers:
                    run = waiting.pop(0)
                    running[run.name] = run, _start(run, variables)
                time.sleep(0.2)
                for name, (run, process) in list(running.items()):
                    if (code := process.poll()) is not None:
                        del running[name], left[name]
                        text = "done" if run.is_done else "stopped before its end"
                        if code:
                            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
                            log = run.beside("log")
                            failed[name] = code, f"ended {how}: {last_line(log)}; its output is in {log}"
                            text = failed[name][1]
                        elif not run.is_done:
                            stopped.append(name)
                        print(f"{name}: {text}", flush=True)
                if time.monotonic() - looked >= 2.0:
                    looked = time.monotonic()
                    left |= {name: 100 - run.percent_done() for name, (run, _) in running.items()}
                    progress.update(100 - 100 * longest_queue(left.values(), workers) // whole - progress.n)
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()
    if received:
        words = f"flipscale: error: {received[0].name}: the runs have saved and stopped; the same command resumes"
        print(words, file=sys.stderr)
        sys.exit(128 + received[0])
    if stopped:
        raise OSError(f"{', '.join(stopped)} stopped before the end, asked by a signal; start the same command again")
    return failed


def _start(run: StudyRun, variables: dict[str, str]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "flipscale.pretrain", "--config", str(run.beside("yaml").absolute())]
    with open(run.beside("log"), "a", encoding="utf-8") as log:
        # A process group of its own, because Ctrl-C is for the study. The study tells its runs.
        return subprocess.Popen(command, env=variables, stdout=log, stderr=log, process_group=0)


@contextmanager
def _signals(running: Mapping[str, tuple[StudyRun, "subprocess.Popen[bytes]"]]) -> Iterator[list[signal.Signals]]:
    """Yield a list that gets a first SIGINT, SIGTERM, SIGUSR1 or SIGHUP. A second one ends the study and its runs at
    once, as in a run: unless it is SIGUSR1, or may be an echo."""
    received: list[signal.Signals] = []
    first_at = 0.0

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal first_at
        if received:
            if may_be_echo(number, time.monotonic() - first_at, is_typed=number == signal.SIGINT):
                return
            for _, process in running.values():
                process.kill()
            os.write(2, b"flipscale: error: ended before all runs have saved; the same command resumes\n")
            os._exit(128 + number)
        received.append(signal.Signals(number))
        first_at = time.monotonic()
        os.write(2, f"{received[0].name}: the runs save and stop; once more to end at once\n".encode())

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    known = [one for one in signals if signal.getsignal(one) != signal.SIG_IGN]
    before = {one: signal.signal(one, receive) for one in known}
    try:
        yield received
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _environment(num_runs: int) -> dict[str, str]:
    """Return the environment of one run: its share of the cores, and bf16 if that is faster here."""
    from flipscale.engines.launch import faster_precision

    threads = max(usable_cores() // num_runs, 1)
    share = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    return {**faster_precision(os.environ), **share, **os.environ}
