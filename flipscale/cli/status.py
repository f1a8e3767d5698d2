"""Show the progress and speed of runs, and whether they are alive, from their run directories alone."""

import dataclasses
import json
import os
import sys
import time
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from flipscale.data.sampling_weights import Composition
from flipscale.evaluation.results import THIS_MODEL, Result, latest, read_results
from flipscale.io.text_table import duration
from flipscale.process.lock import is_holder_alive
from flipscale.records.run_summary import RunSummary

# A training run counts as dead if its last heartbeat is older than this and than this many usual steps.
_SILENT_SECONDS, _SILENT_STEPS = 120.0, 10.0
# The same for a run that evaluates or saves.
_SILENT_PAUSE_SECONDS = 3600.0
_LONGEST_SECONDS = 1e10  # no date is computed for longer times
_WATCH_SECONDS = 3.0
_ENDED = ("done", "stopped", "dead")  # states that a run does not leave by itself
# Values of the last interval that a status has under the names of `metrics.jsonl`.
_LATEST = ("stage", "images_per_s", "mfu", "data_wait_share", "peak_memory_bytes", "loss", "lr")
_CLEAR = b"\033[H\033[J"  # moves the cursor to the upper left and clears the screen below


@dataclass(frozen=True)
class Status:
    """Print the progress and speed of runs, and whether they are alive.

    Args:
        runs: A run directory, such as runs/h14.
        json: Print a JSON line for each run instead of a table.
        watch: Repeat every few seconds until all runs end. A terminal is redrawn; a file or pipe gets lines.
    """

    runs: list[Path]
    _: KW_ONLY
    json: bool = False
    watch: bool = False

    def run(self) -> None:
        """Print the state of each run, and repeat it while a run trains if asked to."""
        try:
            while _show(self) and self.watch:
                time.sleep(_WATCH_SECONDS)
        except KeyboardInterrupt:
            if not self.watch:
                raise


def _show(args: Status) -> bool:
    statuses = [read_status(folder, time.time()) for folder in args.runs]
    trains = any(status["state"] not in _ENDED for status in statuses)
    if args.watch and sys.stdout.isatty():
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), _CLEAR)  # because print escapes control characters
    if args.json:
        text = "\n".join(map(json.dumps, statuses))
    elif args.watch and trains and not sys.stdout.isatty():
        text = "\n".join(map(as_line, statuses))
    else:
        text = "\n\n".join(map(as_table, statuses))
    print(text, flush=True)
    return trains


def read_status(run_dir: Path, now: float) -> dict[str, Any]:
    """Return the state of a run at `now` (seconds since 1970), ready for JSON; unknown values are None.

    `state` is `done`, `running`, `stopped` (by request), `dead` (failed, killed or silent) or `starting`. `has_process`
    is whether a process trains there; None if this machine cannot tell. Speed, loss and the like belong to the last
    interval; counts of bad samples and steps are sums over the run. The Slurm script counts `num_crashes`. Raise
    UserError if the folder is not a run directory, or its recipe is damaged.
    """
    run, crashes = RunSummary(run_dir), run_dir / "slurm/crashes"
    starts, is_alive = run.starts, is_holder_alive(run_dir / "run.lock")
    if is_alive is None and run.heartbeat.get("phase") == "failed":
        is_alive = False
    return {
        "run": str(run_dir),
        "state": _state(run, is_alive, now),
        "has_process": is_alive,
        "command": run.command,
        "slurm_job": starts[-1].get("slurm_job") if starts else None,
        "seconds_since_last_sign": _age(run.heartbeat["time"], now) if run.heartbeat else None,
        "samples_seen": run.samples_seen,
        "total_samples": run.total_samples,
        "budget_minutes": run.budget_minutes,
        **{name: run.latest(name) for name in _LATEST},
        "seconds_left": None if run.is_done else _seconds_left(run),
        "trained_seconds": run.trained_seconds,
        "checkpoint_samples": run.checkpoint_samples,
        "checkpoint_age_seconds": _age(run.checkpoint.stat().st_mtime, now) if run.checkpoint else None,
        "energy_kwh": run.energy.kwh,
        "energy_words": run.energy.words,
        "num_bad_checkpoints": sum(len(start.get("set_aside") or ()) for start in starts),
        "num_starts": len(starts),
        "num_processes": starts[-1]["num_processes"] if starts else None,
        "composition": starts[-1].get("composition") if starts else None,
        "seconds_since_start": _age(starts[-1]["time"], now) if starts else None,
        "num_crashes": len(crashes.read_bytes().splitlines()) if crashes.is_file() else 0,
        "num_bad_samples": run.total("num_replaced"),
        "num_skipped_steps": run.total("num_skipped"),
        "num_slow_steps": run.total("num_slow"),
        "metrics": {
            name: value
            for record in run.records
            for name, value in record.items()
            if "/" in name and not name.startswith("replaced/")
        },
        "results": [dataclasses.asdict(result) for result in latest(read_results(run_dir))],
    }


def _age(moment: float, now: float) -> float:
    """Return the seconds since a moment; 0 if the clock was set back since."""
    return max(now - moment, 0.0)


def _seconds_left(run: RunSummary) -> float | None:
    if run.budget_minutes is not None:
        return max(60 * run.budget_minutes - run.trained_seconds, 0.0)
    speed = run.latest("images_per_s")
    if run.total_samples is None or not speed:
        return None
    samples = run.total_samples - run.samples_seen
    return samples / speed if 0 <= samples < _LONGEST_SECONDS * speed else None


def _state(run: RunSummary, is_alive: bool | None, now: float) -> str:
    heartbeat = run.heartbeat
    if run.is_done or is_alive is False:
        return "done" if run.is_done else "dead"
    if not heartbeat or (run.starts and run.starts[-1]["time"] > heartbeat["time"]):
        return "starting"
    if heartbeat["phase"] == "ended":
        return "stopped"
    patience = _SILENT_PAUSE_SECONDS
    if heartbeat["phase"] == "training":
        patience = max(_SILENT_SECONDS, _SILENT_STEPS * (heartbeat.get("step_s") or 0.0))
    return "running" if now - heartbeat["time"] < patience else "dead"


def as_table(status: dict[str, Any]) -> str:
    """Return the state of a run as a table."""
    rows = [("state", _state_words(status)), ("progress", _progress_words(status))]
    if status["images_per_s"] is not None:
        speed = [f"{status['images_per_s']:,.0f} images/s in the last interval ({status['stage']})"]
        if status["mfu"] is not None:
            speed.append(f"MFU {status['mfu']:.1%}")
        if status["data_wait_share"] is not None:
            speed.append(f"{status['data_wait_share']:.1%} of the time waiting for data")
        rows.append(("speed", ", ".join(speed)))
    for name, composition in (status["composition"] or {}).items():
        rows.append((name.removeprefix("data."), str(Composition(**composition))))
    if status["peak_memory_bytes"] is not None:
        rows.append(("memory", f"{status['peak_memory_bytes'] / 2**30:.1f} GiB at most, of the main process"))
    if status["seconds_left"] is not None:
        end = time.strftime("%a %d %b %H:%M", time.localtime(time.time() + status["seconds_left"]))
        rows.append(("time left", f"{duration(status['seconds_left'])} at this speed: {end} if it runs on"))
    rows.append(("trained", f"{duration(status['trained_seconds'])}, without evaluations and saves"))
    if status["energy_kwh"] is not None:
        rows.append(("energy", f"{status['energy_kwh']:,.3g} kWh, {status['energy_words']}"))
    if status["loss"] is not None and status["lr"] is not None:
        rows.append(("loss", f"{status['loss']:.4f} at learning rate {status['lr']:.3g}"))
    samples, bad, crashes = status["checkpoint_samples"], status["num_bad_checkpoints"], status["num_crashes"]
    checkpoint = starts = "none yet"
    if samples is not None:
        behind = status["samples_seen"] - samples
        checkpoint = f"{duration(status['checkpoint_age_seconds'])} old, at {samples:,} pairs"
        checkpoint += f", {behind:,} behind the run" if behind > 0 else ""
        checkpoint += f"; {bad} damaged and set aside" if bad else ""
    if status["num_starts"]:
        age, processes = duration(status["seconds_since_start"]), status["num_processes"]
        starts = f"{status['num_starts']}, the last {age} ago on {processes} process{'es' * (processes != 1)}"
        starts += f"; {crashes} crash{'es' * (crashes != 1)}" if crashes else ""
    share = status["num_bad_samples"] / max(status["samples_seen"], 1)
    rows += [
        ("checkpoint", checkpoint),
        ("starts", starts),
        ("bad samples", f"{status['num_bad_samples']:,} replaced ({share:.4%})"),
        ("bad steps", f"{status['num_skipped_steps']} not finite and skipped, {status['num_slow_steps']} slow"),
    ]
    for result in (Result(**fields) for fields in status["results"]):
        interval = f" ({result.interval_text})" if result.interval_text else ""
        queries = f", n {result.n:,}" if result.n is not None else ""
        who = "" if result.who == THIS_MODEL else f" of {result.who}"
        rows.append((result.name, f"{result.value_text}{interval}{queries}{who}"))
    page = Path(status["run"]) / "report.html"
    if page.exists():
        rows.append(("page", f"{page}: open it in a browser"))
    width = max(len(name) for name, _ in rows)
    return "\n".join([status["run"], *(f"  {name:<{width}}  {value}" for name, value in rows)])


def as_line(status: dict[str, Any]) -> str:
    """Return the progress of a run as one line."""
    parts = [f"{status['run']}: {status['state']}, {_progress_words(status)}"]
    if status["loss"] is not None:
        parts.append(f"loss {status['loss']:.4f}")
    if status["images_per_s"] is not None:
        parts.append(f"{status['images_per_s']:,.0f} images/s")
    if status["seconds_left"] is not None:
        parts.append(f"{duration(status['seconds_left'])} left")
    return ", ".join(parts)


def _progress_words(status: dict[str, Any]) -> str:
    seen, total, minutes = status["samples_seen"], status["total_samples"], status["budget_minutes"]
    if total is not None:
        return f"{seen:,} of {total:,} pairs ({seen / total:.1%})"
    share = 1.0 if status["state"] == "done" else min(status["trained_seconds"] / (60 * minutes), 1.0)
    return f"{share:.1%} of {minutes:g} min, {seen:,} pairs"


def _state_words(status: dict[str, Any]) -> str:
    state, silent = status["state"], status["seconds_since_last_sign"]
    ago = "" if silent is None else f"{duration(silent)} ago"
    if state == "running":
        return f"running, last sign {ago}"
    if state not in ("stopped", "dead"):
        return str(state)
    samples, command = status["checkpoint_samples"], status["command"]
    place = "from the start, because there is no checkpoint" if samples is None else f"from {samples:,} pairs"
    resume = f"the same command resumes {place}{f': {command}' if command else ''}"
    if status["slurm_job"] and not command:
        resume = (
            f"Slurm job {status['slurm_job']} resumes by itself, {place}, if `squeue --me` lists it; if not, submit "
        )
        resume += "its script again"
    if state == "stopped":
        return f"stopped {ago}; {resume}"
    return f"{'no process' if status['has_process'] is False else f'no sign of life since {ago}'}; {resume}"
