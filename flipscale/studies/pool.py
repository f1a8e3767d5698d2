"""Trains the runs of a planned study, some at a time; one that fails stops no other."""

import subprocess
import time
from collections.abc import Sequence

from flipscale.studies.runs import Signals, StudyRun, end, environment, start

_LOOK_SECONDS = 0.2


def train_missing(runs: Sequence[StudyRun], workers: int) -> None:
    """Train the runs that are not done, `workers` at a time, and print how each ends.

    Raises:
        OSError: some have failed; the others are done.
        SystemExit: the study was told to end; the runs have saved.
    """
    failed = train_some(runs, workers)
    if failed:
        others = "the others are done, and " if len(failed) < len(runs) else ""
        raise OSError(
            f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; {others}the same command tries these again"
        )


def train_some(runs: Sequence[StudyRun], workers: int) -> dict[str, str]:
    """Train the runs that are not done, `workers` at a time, print how each ends, and return that of those that failed,
    by their names.

    Raises:
        SystemExit: the study was told to end; the runs have saved.
    """
    waiting = [run for run in runs if not run.is_done]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done", flush=True)
    variables = environment(workers) if waiting else {}
    running: dict[str, tuple[StudyRun, subprocess.Popen]] = {}
    processes: list[subprocess.Popen] = []
    failed: dict[str, str] = {}
    with Signals(processes) as signals:
        try:
            while signals.received is None and (waiting or running):
                while waiting and len(running) < workers:
                    run = waiting.pop(0)
                    running[run.name] = run, start(run, variables)
                    processes.append(running[run.name][1])
                for run, process in list(running.values()):
                    if process.poll() is not None:
                        del running[run.name]
                        processes.remove(process)
                        ended = run.end_words(process.returncode)
                        if process.returncode:
                            failed[run.name] = ended
                        print(f"{run.name}: {ended}", flush=True)
                time.sleep(_LOOK_SECONDS)
        finally:
            end(processes)
    signals.exit_if_received()
    return failed
