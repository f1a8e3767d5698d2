"""Show how far a run is, how fast, and whether it is alive, from its run directory alone."""

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flipscale.evaluation.results import THIS_MODEL, Result, latest, read_metrics, read_results
from flipscale.io import json_lines
from flipscale.io.errors import UserError
from flipscale.io.files import read_text
from flipscale.io.lock import is_holder_alive
from flipscale.io.yaml_text import read_saved_recipe
from flipscale.training.cost import read_energy
from flipscale.training.report import duration
from flipscale.training.schedule import StageRecipe, plan_stages

# A run that is training counts as dead when its last heartbeat is older than this, and than this many usual steps.
_SILENT_SECONDS, _SILENT_STEPS = 120.0, 10.0
# The same for a run that evaluates or saves.
_SILENT_PAUSE_SECONDS = 3600.0
_START = {"step": int, "num_processes": int, "time": int | float, "set_aside": list | None}
_CHECKPOINT = re.compile("step-[0-9]{8,15}")
# Of what takes longer, no date is told.
_LONGEST_SECONDS = 1e10
_WATCH_SECONDS = 3.0
# States that the run itself does not leave.
_ENDED = ("done", "stopped", "dead")
# Moves the cursor to the upper left and clears what is below it.
_CLEAR = b"\033[H\033[J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `flipscale status`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="A run directory, such as runs/h14.")
    parser.add_argument("--json", action="store_true", help="Print a JSON line for each run instead of a table.")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="Look every few seconds until no run trains: redraw a terminal, and elsewhere print a line for each news.",
    )


def run(args: argparse.Namespace) -> None:
    """Print what is known of each run.

    Raises:
        ValueError: a folder that is not a run directory.
    """
    try:
        while args.watch and _watched(args.runs, args.json):
            time.sleep(_WATCH_SECONDS)
    except KeyboardInterrupt:  # how one stops watching
        return
    if not (args.watch and sys.stdout.isatty()):
        print(_printed(_read(args.runs), args.json))


def _read(folders: Sequence[Path]) -> list[dict[str, Any]]:
    return [read_status(folder, time.time()) for folder in folders]


def _printed(found: Sequence[dict[str, Any]], as_json: bool) -> str:
    if as_json:
        return "\n".join(json.dumps(status) for status in found)
    return "\n\n".join(as_table(status) for status in found)


def _watched(folders: Sequence[Path], as_json: bool) -> bool:
    """Show how far the runs are, and return whether one of them still trains."""
    found = _read(folders)
    still = any(status["state"] not in _ENDED for status in found)
    if sys.stdout.isatty():
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), _CLEAR)  # what is printed has such characters written out
        print(_printed(found, as_json), flush=True)
    elif still:
        print(_printed(found, True) if as_json else "\n".join(map(as_line, found)), flush=True)
    return still


def read_status(run_dir: Path, now: float) -> dict[str, Any]:
    """Return the state of a run at `now` (seconds since 1970), ready for JSON; what is not known is None.

    `state` is `done`, `running`, `stopped` (asked to, and resumable), `dead` (failed, killed, or no sign of life) or
    `starting`. `has_process` is whether one trains there; None where another machine has it, or nobody.
    `images_per_s` is of the last record, `seconds_left` what is left at that speed; `num_bad_samples`,
    `num_skipped_steps` and `num_slow_steps` are sums over the run; `num_crashes` were counted by the Slurm script.

    Raises:
        ValueError: not a run directory.
    """
    recipe_file = run_dir / "recipe.yaml"
    if not recipe_file.exists():
        raise UserError(f"{run_dir} is not a run directory: it has no recipe.yaml, which a run writes when it starts")
    records = read_metrics(run_dir)
    starts = json_lines.read(run_dir / "starts.jsonl", **_START)
    steps = [record for record in records if "images_per_s" in record]
    last: dict[str, Any] = steps[-1] if steps else {}
    heartbeat = _heartbeat(run_dir)
    batch, total, budget_minutes = _plan(recipe_file)
    done = (run_dir / "DONE").exists()
    checkpoint = _last_checkpoint(run_dir)
    saved = int(checkpoint.name[5:]) if checkpoint else 0
    known = max(saved, heartbeat.get("step", 0)) * batch  # a heartbeat is up to ten seconds old
    seen = total if done and total is not None else max(known, records[-1]["samples_seen"] if records else 0)
    trained = records[-1]["trained_seconds"] if records else 0.0
    left = _seconds_left(total and total - seen, last.get("images_per_s"), budget_minutes, trained)
    crashes = run_dir / "slurm/crashes"
    lives = _has_process(run_dir, heartbeat)
    return {
        "run": str(run_dir),
        "state": "done" if done else _state(heartbeat, starts, lives, now),
        "has_process": lives,
        "command": _command(run_dir),
        "seconds_since_last_sign": now - heartbeat["time"] if heartbeat else None,
        "samples_seen": seen,
        "total_samples": total,
        "budget_minutes": budget_minutes,
        "stage": last.get("stage"),
        "images_per_s": last.get("images_per_s"),
        "mfu": last.get("mfu"),
        "data_wait_share": last.get("data_wait_share"),
        "peak_memory_bytes": last.get("peak_memory_bytes"),
        "seconds_left": None if done else left,
        "trained_seconds": trained,
        "loss": last.get("loss"),
        "lr": last.get("lr"),
        "checkpoint_samples": saved * batch if checkpoint else None,
        "checkpoint_age_seconds": now - checkpoint.stat().st_mtime if checkpoint else None,
        **_energy(run_dir),
        "num_bad_checkpoints": sum(len(start.get("set_aside") or ()) for start in starts),
        "num_starts": len(starts),
        "num_processes": starts[-1]["num_processes"] if starts else None,
        "seconds_since_start": now - starts[-1]["time"] if starts else None,
        "num_crashes": len(crashes.read_bytes().splitlines()) if crashes.is_file() else 0,
        **_trouble(steps),
        "metrics": {name: value for record in records for name, value in record.items() if _is_result(name)},
        "results": [dataclasses.asdict(result) for result in latest(read_results(run_dir))],
    }


def _last_checkpoint(run_dir: Path) -> Path | None:
    checkpoints = [path for path in (run_dir / "checkpoints").glob("step-*") if _CHECKPOINT.fullmatch(path.name)]
    return max(checkpoints, key=lambda path: int(path.name[5:]), default=None)


def _plan(recipe_file: Path) -> tuple[int, int | None, float | None]:
    """Return the pairs of a step and of all steps, and the time budget in minutes: one of the last two is None.

    Raises:
        ValueError: the recipe is damaged.
    """
    recipe = read_saved_recipe(recipe_file)
    try:
        batch, budget = recipe["data"]["global_batch_size"], recipe.get("budget_minutes")
        stages = plan_stages([StageRecipe(**stage) for stage in recipe["stages"]], batch, budget)
        return batch, int(stages[-1].last) * batch if budget is None else None, budget
    except (KeyError, TypeError, ZeroDivisionError, AttributeError) as error:
        raise UserError(
            f"{recipe_file} is not the recipe that the run began with, it is damaged ({error!r}); copy the one of a "
            "checkpoint there"
        ) from error


def _energy(run_dir: Path) -> dict[str, Any]:
    energy = read_energy(run_dir)
    return {"energy_kwh": energy.kwh, "energy_words": energy.words}


def _trouble(steps: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return the sums over the records of intervals."""
    names = {"num_bad_samples": "num_replaced", "num_skipped_steps": "num_skipped", "num_slow_steps": "num_slow"}
    return {name: sum(record.get(of) or 0 for record in steps) for name, of in names.items()}


def _is_result(name: str) -> bool:
    return "/" in name and not name.startswith("replaced/")


def _seconds_left(
    samples: int | None, images_per_s: float | None, budget_minutes: float | None, trained_seconds: float
) -> float | None:
    if budget_minutes is not None:
        return max(60 * budget_minutes - trained_seconds, 0.0)
    if samples is None or not images_per_s or not 0 <= samples < _LONGEST_SECONDS * images_per_s:
        return None
    return samples / images_per_s


def _heartbeat(run_dir: Path) -> dict[str, Any]:
    fields = {"time": int | float, "step": int, "phase": str, "step_s": int | float | None}
    return (json_lines.read(run_dir / "heartbeat.json", **fields) or [{}])[-1]


def _has_process(run_dir: Path, heartbeat: dict[str, Any]) -> bool | None:
    """Return whether a process trains in a run directory; None where this machine cannot tell."""
    lives = is_holder_alive(run_dir / "run.lock")
    return False if lives is None and heartbeat.get("phase") == "failed" else lives


def _command(run_dir: Path) -> str | None:
    """Return the command of a run's last start."""
    try:
        command = json.loads(read_text(run_dir / "environment.json"))["command"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return command if isinstance(command, str) else None


def _state(heartbeat: dict[str, Any], starts: list[dict[str, Any]], lives: bool | None, now: float) -> str:
    if lives is False:
        return "dead"
    if not heartbeat or (starts and starts[-1]["time"] > heartbeat["time"]):
        return "starting"
    if heartbeat["phase"] == "ended":
        return "stopped"
    patience = _SILENT_PAUSE_SECONDS
    if heartbeat["phase"] == "training":
        patience = max(_SILENT_SECONDS, _SILENT_STEPS * (heartbeat.get("step_s") or 0.0))
    return "running" if now - heartbeat["time"] < patience else "dead"


def as_table(status: dict[str, Any]) -> str:
    """Return the state of a run as a table for people."""
    seen = status["samples_seen"]
    rows = [("state", _state_words(status)), ("progress", _progress_words(status))]
    if status["images_per_s"] is not None:
        speed = [f"{status['images_per_s']:,.0f} images/s in the last interval ({status['stage']})"]
        if status["mfu"] is not None:
            speed.append(f"MFU {status['mfu']:.1%}")
        if status["data_wait_share"] is not None:
            speed.append(f"{status['data_wait_share']:.1%} of the time waiting for data")
        rows.append(("speed", ", ".join(speed)))
    if status["peak_memory_bytes"] is not None:
        rows.append(("memory", f"{status['peak_memory_bytes'] / 2**30:.1f} GiB at most, of the main process"))
    if status["seconds_left"] is not None:
        end = time.strftime("%a %d %b %H:%M", time.localtime(time.time() + status["seconds_left"]))
        rows.append(("time left", f"{duration(status['seconds_left'])} at this speed: {end} if it runs on"))
    rows.append(("trained", f"{duration(status['trained_seconds'])}, evaluations and saves left out"))
    if status["energy_kwh"] is not None:
        rows.append(("energy", f"{status['energy_kwh']:,.3g} kWh, {status['energy_words']}"))
    if status["loss"] is not None and status["lr"] is not None:
        rows.append(("loss", f"{status['loss']:.4f} at learning rate {status['lr']:.3g}"))
    rows.append(("checkpoint", _checkpoint_words(status)))
    rows.append(("starts", _start_words(status)))
    share = status["num_bad_samples"] / max(seen, 1)
    rows.append(("bad samples", f"{status['num_bad_samples']:,} replaced ({share:.4%})"))
    rows.append(("bad steps", f"{status['num_skipped_steps']} not finite and skipped, {status['num_slow_steps']} slow"))
    rows += [_result_row(Result(**result)) for result in status["results"]]
    page = Path(status["run"]) / "report.html"
    if page.exists():
        rows.append(("page", f"{page}: open it in a browser"))
    width = max(len(name) for name, _ in rows)
    return "\n".join([status["run"], *(f"  {name:<{width}}  {value}" for name, value in rows)])


def _progress_words(status: dict[str, Any]) -> str:
    seen, total, minutes = status["samples_seen"], status["total_samples"], status["budget_minutes"]
    if total is not None:
        return f"{seen:,} of {total:,} pairs ({seen / total:.1%})"
    share = 1.0 if status["state"] == "done" else min(status["trained_seconds"] / (60 * minutes), 1.0)
    return f"{share:.1%} of {minutes:g} min, {seen:,} pairs"


def _result_row(result: Result) -> tuple[str, str]:
    interval = f" ({result.interval_text})" if result.interval_text else ""
    queries = f", n {result.n:,}" if result.n is not None else ""
    who = "" if result.who == THIS_MODEL else f" of {result.who}"
    return result.name, f"{result.value_text}{interval}{queries}{who}"


def _state_words(status: dict[str, Any]) -> str:
    state = status["state"]
    if state in ("done", "starting"):
        return state
    gone, silent = status["has_process"] is False, status["seconds_since_last_sign"]
    ago = "" if silent is None else f"{duration(silent)} ago"
    return {
        "running": f"running, last sign {ago}",
        "stopped": f"stopped {ago}; {_how_to_go_on(status)}",
        "dead": f"{'no process' if gone else f'no sign of life since {ago}'}; {_how_to_go_on(status)}",
    }[state]


def _how_to_go_on(status: dict[str, Any]) -> str:
    samples, command = status["checkpoint_samples"], status["command"]
    place = "from the start, as there is no checkpoint" if samples is None else f"from {samples:,} pairs"
    return f"the same command goes on {place}{f': {command}' if command else ''}"


def as_line(status: dict[str, Any]) -> str:
    """Return how far a run is as one line."""
    parts = [f"{status['run']}: {status['state']}, {_progress_words(status)}"]
    if status["loss"] is not None:
        parts.append(f"loss {status['loss']:.4f}")
    if status["images_per_s"] is not None:
        parts.append(f"{status['images_per_s']:,.0f} images/s")
    if status["seconds_left"] is not None:
        parts.append(f"{duration(status['seconds_left'])} left")
    return ", ".join(parts)


def _checkpoint_words(status: dict[str, Any]) -> str:
    samples = status["checkpoint_samples"]
    if samples is None:
        return "none yet"
    behind = status["samples_seen"] - samples
    bad = status["num_bad_checkpoints"]
    return (
        f"{duration(status['checkpoint_age_seconds'])} old, at {samples:,} pairs ({behind:,} ago)"
        f"{f'; {bad} not whole and set aside' if bad else ''}"
    )


def _start_words(status: dict[str, Any]) -> str:
    if not status["num_starts"]:
        return "none recorded"
    age, processes = duration(status["seconds_since_start"]), status["num_processes"]
    words = f"{status['num_starts']}, the last {age} ago on {processes} process{'es' * (processes != 1)}"
    crashes = status["num_crashes"]
    return words + (f"; {crashes} crash{'es' * (crashes != 1)}" if crashes else "")
