"""Pushing while training: every save, by a process of its own that the loop never waits for, and the finished model."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from flipscale.hub.upload import Target, open_repo, push_folder
from flipscale.training.recipe import HubRecipe, Recipe

_NICENESS = 10  # behind the data workers, which the accelerators wait for
# A process that has nothing of the accelerators and one thread, and whose log is read by people.
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def target_of(recipe: HubRecipe) -> Target | None:
    """Where a run's model goes, None where it stays.

    Raises:
        ValueError: it is to be pushed and has no name, or one that is none.
    """
    if not recipe.push_to_hub:
        return None
    if recipe.hub_model_id is None:
        raise ValueError("hub.push_to_hub is true and hub.hub_model_id is not set; set it to ORG/NAME")
    return Target(recipe.hub_model_id, recipe.hub_private_repo, recipe.hub_revision)


def card_name(recipe: Recipe) -> str:
    """What the finished model of a run is loaded by: its name on the Hub, or its folder where it stays."""
    target = target_of(recipe.hub)
    return target.repo_id if target else str(Path(recipe.output_dir) / "model")


def open_target(recipe: HubRecipe, resumes: bool) -> None:
    """Makes the repository that a run will push to, so that a token without rights is found out before it trains.

    The first process alone asks. A Hub that is away stops no run, and nothing stops one that has begun.

    Raises:
        ValueError: no token, no right to write, an unknown organisation.
    """
    target = target_of(recipe)
    if target is None or not _is_first_process():
        return
    try:
        open_repo(target)
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) and not resumes:
            raise
        print(f"flipscale: {error}; the run goes on and pushes its next save", file=sys.stderr, flush=True)


class BackgroundPush:
    """Pushes saves one after the other, the newest of those waiting; what went on is in the run's `push.log`.

    Each push is `flipscale push RUN ORG/NAME --step N` as a process: it reads the checkpoint from disk, takes no
    accelerator, and neither its memory nor its interpreter is the loop's. One that fails is told, and the next save
    brings the repository up to date.
    """

    def __init__(self, recipe: Recipe, last_step: int, is_main_process: bool):
        self.run_dir = Path(recipe.output_dir)
        self.last_step = last_step
        self._target = target_of(recipe.hub) if is_main_process else None
        self._changed = threading.Condition()
        self._waiting: int | None = None
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    def offer(self, step: int) -> None:
        """A save to push, in place of one that still waits; not the last one, which `push_finished` pushes."""
        if self._target is None or step >= self.last_step:
            return
        with self._changed:
            self._waiting = step
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, args=(self._target,), daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Ends it here and now, a push that is under way included: a newer model follows, or a resumed run's."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            if self._process is not None:
                self._process.terminate()
        if self._thread is not None:
            self._thread.join()

    def _work(self, target: Target) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting is not None)
                if self._closed or self._waiting is None:
                    return
                step, self._waiting = self._waiting, None
                failed: str | None = None
                try:
                    self._process = self._start(step, target)
                except OSError as error:  # no memory for a process, no space for its log
                    failed = str(error)
            if failed is None and self._process is not None and self._process.wait() != 0:
                failed = _last_line(self.run_dir / "push.log")
            shutil.rmtree(export_folder(self.run_dir, step), ignore_errors=True)
            if failed is not None and not self._closed:
                told = f"step {step} was not pushed to {target} ({failed}); the run goes on and pushes its next save"
                print(f"flipscale: {told}", file=sys.stderr, flush=True)

    def _start(self, step: int, target: Target) -> subprocess.Popen[bytes]:
        command = [*push_command(self.run_dir, target), "--step", str(step)]
        with open(self.run_dir / "push.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "flipscale.cli", *command[1:]],
                env={**os.environ, **_ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
        return process


def push_finished(recipe: Recipe) -> None:
    """The model of a run that is done, on the Hub if it is to be there; the first process alone, the others gone.

    Raises:
        OSError: it is not there; the message has the command that pushes it by hand.
    """
    target, run_dir = target_of(recipe.hub), Path(recipe.output_dir)
    if target is None or not _is_first_process() or not (run_dir / "DONE").exists():
        return
    try:
        pushed = push_folder(run_dir / "model", target, f"{run_dir.name}, finished")
    except (ValueError, OSError) as error:
        raise OSError(
            f"{run_dir} is done, but its model is not on the Hub: {error}; push it by hand: "
            + " ".join(push_command(run_dir, target))
        ) from error
    print(f"{run_dir} is on the Hub: {pushed.url}")


def push_command(run_dir: Path, target: Target) -> list[str]:
    """The command that pushes a run's model."""
    private = ["--private"] if target.private else []
    return [
        *["flipscale", "push", str(run_dir), target.repo_id, *private],
        *(["--revision", target.revision] if target.revision else []),
    ]


def export_folder(run_dir: Path, step: int) -> Path:
    """Where a checkpoint's model is while it is pushed."""
    return run_dir / f".push-step-{step:08d}"


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1].removeprefix("flipscale: error: ") if lines else "no output"
