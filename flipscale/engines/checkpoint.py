"""Checkpoints: `checkpoints/step-00012345/`, written under a hidden name and renamed once all of it is on disk.

    part-00003.safetensors  ranges of flat fp32 weights, moments and averages that process 3 saves, as `weight.NAME`,
                            `exp_avg.NAME`, `exp_avg_sq.NAME`, `momentum_buffer.NAME`, `ema.NAME`
    index.json              shape of every parameter, and the bounds of its ranges in the parts
    state.json              step, samples seen, samples in the data set, versions of the format, flipscale and torch
    recipe.yaml             resolved recipe
    digests.json            digests of all these files, see `flipscale.io.digests`

A damaged checkpoint is kept as `bad-step-00012345` (`checkpoint_integrity`).

These files do not depend on the engine. A run can therefore resume under another engine and at another number of
processes: each process reads the ranges that it needs.
"""

import errno
import json
import logging
import os
import re
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

import flipscale
from flipscale.engines.recipe import SaveRecipe
from flipscale.io.atomic import partial_path, remove, sync
from flipscale.io.digests import FileDigest, digest_of, digests_to_json, write_tensors
from flipscale.io.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

FORMAT = 2
_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """A range of one flat tensor of the parameter `name`: `values` are its elements from `first` on.

    `kind` is `weight`, `ema`, or the name of a moment.
    """

    kind: str
    name: str
    first: int
    values: torch.Tensor


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest checkpoint of a run, whole or not, or None."""
    checkpoints = list_checkpoints(run_dir)
    return checkpoints[-1] if checkpoints else None


def checkpoint_of(run_dir: Path, step: int) -> Path:
    """Return the path of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def part_of(checkpoint: Path, process: int) -> Path:
    """Return the path of the part that a process writes."""
    return checkpoint / f"part-{process:05d}.safetensors"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    folder = run_dir / "checkpoints"
    if not os.path.lexists(folder):
        return []
    return sorted((folder / name for name in os.listdir(folder) if _NAME.fullmatch(name)), key=step_of)


class CheckpointReader:
    """A reader of any range of a checkpoint's tensors, across parts."""

    def __init__(self, checkpoint: Path):
        self.path = checkpoint
        index = json.loads((checkpoint / "index.json").read_text(encoding="utf-8"))
        self.shapes: dict[str, list[int]] = index["shapes"]
        self._bounds: dict[str, list[int]] = index["bounds"]
        self._files: dict[int, Any] = {}

    def fill(self, kind: str, name: str, values: torch.Tensor, first: int) -> None:
        """Fill the flat `values` with the elements from `first` on of a parameter's tensor.

        Raises:
            UserError: the checkpoint has no such tensor of this `Piece.kind`.
            OSError: a part differs from the index.
        """
        if name not in self._bounds:
            raise UserError(f"checkpoint {self.path} has no {kind} of {name}; resume with its model")
        last = first + values.numel()
        for part, (start, stop) in enumerate(zip(self._bounds[name], self._bounds[name][1:], strict=False)):
            begin, end = max(first, start), min(last, stop)
            if begin >= end:
                continue
            file, keys = self._file(part)
            if f"{kind}.{name}" not in keys:
                raise UserError(f"checkpoint {self.path} has no {kind} of {name}; resume with its optim.name")
            stored = file.get_slice(f"{kind}.{name}")
            if stored.get_shape() != [stop - start]:
                raise OSError(
                    f"{part_of(self.path, part)} has {kind} of {name} with shape {stored.get_shape()}; index.json has "
                    f"{[stop - start]}. The checkpoint is damaged: use another one"
                )
            values[begin - first : end - first].copy_(stored[begin - start : end - start])

    def tensor(self, kind: str, name: str) -> torch.Tensor:
        """Return a whole tensor in the shape of its parameter."""
        whole = torch.empty(torch.Size(self.shapes[name]))
        self.fill(kind, name, whole.view(-1), 0)
        return whole

    def _file(self, part: int) -> tuple[Any, set[str]]:
        if part not in self._files:
            file = safe_open(part_of(self.path, part), "pt")
            self._files[part] = (file, set(file.keys()))
        return self._files[part]


class CheckpointWriter:
    """A writer of a run's checkpoints, one at a time, in a thread of every process.

    `save` copies tensors to host memory, and training goes on. `commit` renames the checkpoint's folder after every
    process has reported that its part is on disk. Only then does the checkpoint exist.
    """

    def __init__(self, accelerator: "Accelerator", run_dir: Path, recipe: SaveRecipe, newest: int | None):
        self.accelerator = accelerator
        self.run_dir = run_dir
        self.recipe = recipe
        self.newest = newest
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None
        self._digests: dict[str, FileDigest] = {}
        self._partial = self._final = run_dir
        self._last_save = time.monotonic()

    @property
    def is_open(self) -> bool:
        """Whether a checkpoint waits for `commit`. All processes agree."""
        return self._thread is not None

    @property
    def is_writing(self) -> bool:
        """Whether this process is still writing its part."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def clock_is_due(self) -> bool:
        """Whether `every_minutes` have passed since the last save, by the clock of this process."""
        minutes = (time.monotonic() - self._last_save) / 60
        return 0 < self.recipe.every_minutes <= minutes

    def save(self, pieces: list[Piece], shapes: dict[str, torch.Size], state: dict[str, Any], recipe: str) -> None:
        """Collective. Begin the checkpoint of `state["step"]`, unless it exists. `commit` must end the previous one."""
        assert not self.is_open
        if state["step"] == self.newest:
            return
        self.newest = state["step"]
        self._last_save = time.monotonic()
        self._final = checkpoint_of(self.run_dir, self.newest)
        self._partial = partial_path(self._final)
        versions = {"format": FORMAT, "flipscale": flipscale.__version__, "torch": torch.__version__}
        texts = {"state.json": json.dumps({**versions, **state}, indent=1), "recipe.yaml": recipe}
        texts["index.json"] = json.dumps(self._index(pieces, shapes))
        self._error, self._digests = None, {}
        if self.accelerator.is_main_process:
            try:
                for stale in self._final.parent.glob(".step-*.partial"):
                    remove(stale)
                self._partial.mkdir(parents=True)
            except OSError as error:
                self._error = error
        self._agree()
        copies = {f"{p.kind}.{p.name}": p.values.detach().to("cpu", copy=True) for p in pieces if p.values.numel()}
        self._thread = threading.Thread(target=self._write, args=(copies, texts), name="checkpoint", daemon=True)
        self._thread.start()

    def commit(self) -> int | None:
        """Collective. Finish the checkpoint that `save` began, and remove checkpoints past `total_limit`.

        Return its step, or None if there was nothing to finish.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints still exist.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        digests = self._agree()
        if self.accelerator.is_main_process:
            try:
                self._write_text("digests.json", digests_to_json(digests))
                sync(self._partial)
                self._partial.rename(self._final)
                sync(self._final.parent)
            except OSError as error:
                raise self._failure(error) from error
            self._remove_old()
        return self.newest

    def _remove_old(self) -> None:
        """Remove the checkpoints past `total_limit`. A failure is only logged, because the disk may have room."""
        try:
            for old in list_checkpoints(self.run_dir)[: -max(self.recipe.total_limit, 1)]:
                # Renamed first, so that a kill during the removal leaves no half checkpoint under its name.
                remove(old.rename(partial_path(old)))
        except OSError as error:
            _log.warning("an old checkpoint of %s cannot be removed (%s); the run goes on", self.run_dir, error)

    def _index(self, pieces: list[Piece], shapes: dict[str, torch.Size]) -> dict[str, Any]:
        sizes = {piece.name: piece.values.numel() for piece in pieces if piece.kind == "weight"}
        mine = torch.tensor([[sizes[name] for name in shapes]], device=self.accelerator.device)
        ends = self.accelerator.gather(mine).cumsum(dim=0).cpu()
        assert ends[-1].tolist() == [shape.numel() for shape in shapes.values()], "the parts do not cover the tensors"
        bounds = {name: [0, *ends[:, column].tolist()] for column, name in enumerate(shapes)}
        return {"shapes": {name: list(shape) for name, shape in shapes.items()}, "bounds": bounds}

    def _write(self, tensors: dict[str, torch.Tensor], texts: dict[str, str]) -> None:
        try:
            layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
            part = part_of(self._partial, self.accelerator.process_index)
            self._digests[part.name] = write_tensors(part, layout, tensors.values())
            if self.accelerator.is_main_process:
                for name, text in texts.items():
                    self._digests[name] = self._write_text(name, text)
            sync(self._partial)
        except Exception as error:  # any error, because `commit` must not rename an unwritten checkpoint
            self._error = error if isinstance(error, OSError) else OSError(repr(error))

    def _write_text(self, name: str, text: str) -> FileDigest:
        (self._partial / name).write_text(text, encoding="utf-8")
        sync(self._partial / name)
        return digest_of(text.encode())

    def _agree(self) -> dict[str, FileDigest]:
        """Collective. Return the digests of all processes' files. Raise on all if a write failed on one."""
        from accelerate.utils import gather_object

        reports = gather_object([(self._digests, self._error)])
        for _, error in reports:
            if error is not None:
                raise self._failure(error)
        return {name: digest for digests, _ in reports for name, digest in digests.items()}

    def _failure(self, error: OSError) -> OSError:
        if self.accelerator.is_main_process:
            shutil.rmtree(self._partial, ignore_errors=True)
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return OSError(
            f"checkpoint {self._final} could not be written ({error}); earlier checkpoints are whole. Fix: "
            f"{'free some space' if is_full else 'repair the disk or the rights'}, and start the run again"
        )
