"""The runs of a study, and their training side by side, one process each on its share of the cores."""

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
from flipscale.files.aside import write_text
from flipscale.training.recipe import Recipe, to_yaml

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
    def samples(self) -> int:
        return sum(stage.samples for stage in self.recipe.stages)


def train(runs: list[StudyRun], doing: str) -> None:
    """Train all runs at the same time to their ends, with a progress bar (or a line now and then) for each.

    When one fails, or the study is told to end, the others save and stop.

    Raises:
        ValueError, OSError: a run failed; its own last line is in the message.
    """
    # Once, before any run keeps the cores busy: all runs must train in the same precision.
    environment = _environment(len(runs))
    processes: list[subprocess.Popen] = []
    with _Signals(processes) as signals:
        for run in runs:
            run.run_dir.parent.mkdir(parents=True, exist_ok=True)
            recipe_file = run.beside("yaml").absolute()
            write_text(recipe_file, to_yaml(run.recipe))
            command = [sys.executable, "-m", "flipscale.pretrain", "--config", str(recipe_file)]
            with open(run.beside("log"), "a", encoding="utf-8") as log:
                # In a group of its own: Ctrl-C is for the study, which tells its runs.
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, process_group=0))
        try:
            _watch(runs, processes, signals, doing)
            failed = [(run, p.returncode) for run, p in zip(runs, processes, strict=True) if p.poll()]
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
    if signals.received is not None:
        name = signals.received.name
        words = f"flipscale: error: {name}: the runs have saved and stopped; the same command goes on"
        print(words, file=sys.stderr)
        sys.exit(128 + signals.received)
    for run, code in failed:
        last = run.beside("log").read_text(errors="replace", encoding="utf-8").strip().splitlines()[-1:]
        words = last[0].removeprefix("flipscale: error: ") if last else "no output"
        kind = ValueError if code == 2 else OSError
        ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        raise kind(f"the run of {run.name} ended {ended}: {words}; its output is in {run.beside('log')}")


class _Signals:
    """In a `with` block, what tells the study to end; a second one ends it and its runs at once.

    Args:
        processes: of the runs, those that have been started.
    """

    def __init__(self, processes: list[subprocess.Popen]):
        self.received: signal.Signals | None = None
        self._processes = processes
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(one) is not signal.SIG_IGN:
                self._before[one] = signal.signal(one, self._receive)
        return self

    def __exit__(self, *raised: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            for process in self._processes:
                process.kill()
            os.write(2, b"flipscale: error: ended before all runs have saved; the same command goes on\n")
            os._exit(128 + number)
        self.received = signal.Signals(number)
        os.write(2, f"{self.received.name}: the runs save and stop; once more to end at once\n".encode())


def _environment(num_runs: int) -> dict[str, str]:
    """Return the environment of one run: its share of the cores, and bf16 where it is faster."""
    from flipscale.engines.device import is_faster_in_bf16
    from flipscale.engines.launch import PRECISION

    threads = max((os.cpu_count() or 1) // num_runs, 1)
    share = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    return {PRECISION: "bf16" if is_faster_in_bf16() else "no", **share, **os.environ}


def _watch(runs: list[StudyRun], processes: list[subprocess.Popen], signals: _Signals, doing: str) -> None:
    """Show how far the runs are until all have ended, one has failed, or the study is told to end."""
    bars = [
        tqdm(total=run.samples, desc=f"{doing} {run.name}", unit="pair", unit_scale=True, position=number, disable=None)
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
            records = read_metrics(run.run_dir)
            if records:
                bar.n = min(records[-1]["samples_seen"], run.samples)
                bar.refresh()
        if bars[0].disable and time.monotonic() - reported > _REPORT_SECONDS:
            reported = time.monotonic()
            print("; ".join(_line(run, doing) for run in runs), flush=True)
    for bar in bars:
        bar.close()


def _line(run: StudyRun, doing: str) -> str:
    records = read_metrics(run.run_dir)
    losses = [record["loss"] for record in records if "loss" in record]
    seen = records[-1]["samples_seen"] if records else 0
    return f"{doing} {run.name}: {seen / run.samples:.0%}" + (f", loss {losses[-1]:.2f}" if losses else "")
