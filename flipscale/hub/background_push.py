"""Push every checkpoint while the run trains, in a process that training never waits for, and the finished model."""

import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from flipscale.io.errors import UserError
from flipscale.training.recipe import HubRecipe, Recipe

if TYPE_CHECKING:
    from flipscale.hub.upload import Target

_log = logging.getLogger(__name__)

_NICENESS = 10  # a lower priority than the data workers, which the accelerators wait for
# The process sees no accelerator and uses one thread. Its log is read by people.
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def target_of(recipe: HubRecipe) -> "Target | None":
    """Return where a run's model is pushed to, or None if it is not pushed.

    Raises:
        ValueError: the recipe asks for a push but has no valid name for the model.
    """
    if not recipe.push_to_hub:
        return None
    if recipe.hub_model_id is None:
        raise UserError("hub.push_to_hub is true and hub.hub_model_id is not set; set it to ORG/NAME")
    from flipscale.hub.upload import Target  # the Hub's client takes a while to import; most runs do not push

    return Target(recipe.hub_model_id, recipe.hub_private_repo, recipe.hub_revision)


def card_name(recipe: Recipe) -> str:
    """Return the name by which a run's finished model is loaded: on the Hub if it is pushed, else its folder."""
    target = target_of(recipe.hub)
    return target.repo_id if target else str(Path(recipe.output_dir) / "model")


def open_target(recipe: HubRecipe, resumes: bool) -> None:
    """Create the repository that a run will push to, so that a token without rights is found before training.

    Only the first process does so. If the Hub cannot be reached, the run goes on; a resumed run goes on in any case.

    Raises:
        ValueError: there is no token, it may not write there, or the organisation is unknown.
    """
    target = target_of(recipe)
    if target is None or not _is_first_process():
        return
    try:
        from flipscale.hub.upload import open_repo

        open_repo(target)
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) and not resumes:
            raise
        _log.warning("%s; the run goes on and will push its next checkpoint", error)


class BackgroundPush:
    """Pushes checkpoints one at a time, always the newest. The output of the pushes is in the run's `push.log`.

    Each push is a process, `flipscale push RUN ORG/NAME --step N`, which reads the checkpoint from disk and uses no
    accelerator. A push that fails is logged; the next checkpoint brings the repository up to date.
    """

    def __init__(self, recipe: Recipe, last_step: int | None, is_main_process: bool):
        """`last_step` is None where it is not known beforehand."""
        self.run_dir = Path(recipe.output_dir)
        self.last_step = last_step
        self._target = target_of(recipe.hub) if is_main_process else None
        self._changed = threading.Condition()
        self._waiting: int | None = None
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    def offer(self, step: int | None) -> None:
        """Push this checkpoint when the current push is done, instead of one that waits; not the run's last one.

        `push_finished` pushes the last one. There is nothing to push for None.
        """
        if self._target is None or step is None or (self.last_step is not None and step >= self.last_step):
            return
        with self._changed:
            self._waiting = step
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, args=(self._target,), name="push", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop at once, also a push that is running: a newer model will follow, from this run or when it resumes."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            if self._process is not None:
                self._process.terminate()
        if self._thread is not None:
            self._thread.join()

    def _work(self, target: "Target") -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting is not None)
                if self._closed or self._waiting is None:
                    return
                step, self._waiting = self._waiting, None
                failed: str | None = None
                try:
                    self._process = self._start(step, target)
                except OSError as error:  # not enough memory for a process, or no space for its log
                    failed = str(error)
            if failed is None and self._process is not None and self._process.wait() != 0:
                failed = _last_line(self.run_dir / "push.log")
            shutil.rmtree(export_folder(self.run_dir, step), ignore_errors=True)
            if failed is not None and not self._closed:
                told = "step %d was not pushed to %s (%s); the run goes on and will push its next checkpoint"
                _log.warning(told, step, target, failed)

    def _start(self, step: int, target: "Target") -> subprocess.Popen[bytes]:
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
    """Push the model of a finished run if its recipe asks for that; only the first process does so.

    Raises:
        OSError: the push failed. The message has the command that pushes it by hand.
    """
    target, run_dir = target_of(recipe.hub), Path(recipe.output_dir)
    if target is None or not _is_first_process() or not (run_dir / "DONE").exists():
        return
    try:
        from flipscale.hub.upload import push_folder

        pushed = push_folder(run_dir / "model", target, f"{run_dir.name}, finished")
    except (ValueError, OSError) as error:
        raise OSError(
            f"{run_dir} is done, but its model is not on the Hub: {error}; push it by hand: "
            + " ".join(push_command(run_dir, target))
        ) from error
    print(f"{run_dir} is on the Hub: {pushed.url}")


def push_command(run_dir: Path, target: "Target") -> list[str]:
    """Return the command that pushes a run's model."""
    private = ["--private"] if target.private else []
    return [
        *["flipscale", "push", str(run_dir), target.repo_id, *private],
        *(["--revision", target.revision] if target.revision else []),
    ]


def export_folder(run_dir: Path, step: int) -> Path:
    """Return where a checkpoint's model is exported to while it is pushed."""
    return run_dir / f".push-step-{step:08d}"


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace", encoding="utf-8").strip().splitlines() if path.exists() else []
    return lines[-1].removeprefix("flipscale: error: ") if lines else "no output"
