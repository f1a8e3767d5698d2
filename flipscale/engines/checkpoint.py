"""Checkpoints: `checkpoints/step-00012345/`, written under a hidden name and renamed once all of it is on disk.

    part-00003.safetensors  ranges of flat fp32 weights, moments and averages that process 3 saves, as `weight.NAME`,
                            `exp_avg.NAME`, `exp_avg_sq.NAME`, `momentum_buffer.NAME`, `ema.NAME`
    index.json              shape of every parameter, and the bounds of its ranges in the parts
    state.json              step, samples seen, samples in the data set, versions of the format, flipscale and torch
    recipe.yaml             resolved recipe
    digests.json            digests of all these files, see `flipscale.io.digests`

These files do not depend on the engine. A run can therefore resume under another engine and at another number of
processes: each process reads the ranges that it needs. Under ddp it reads an equal share, and gets the others' shares
from them.

A run resumes from its newest whole checkpoint. Newer, damaged ones are kept as `bad-step-00012345`. All processes read
the checkpoint once, each an equal share, before any of them uses its content. The first process alone reads its texts
and judges damage that others found: a network file system may show a new folder to one machine later than another.
"""

import errno
import functools
import itertools
import json
import logging
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import yaml
from safetensors import safe_open

import flipscale
from flipscale.io.atomic import partial_path, remove, sync
from flipscale.io.digests import (
    CHUNK_BYTES,
    Chunk,
    CorruptFile,
    FileDigest,
    chunks_of,
    damaged_chunks,
    digest_of,
    digests_to_json,
    file_bytes,
    read_bytes,
    read_digests,
    write_tensors,
)
from flipscale.io.errors import UserError
from flipscale.process.world import gather_objects
from flipscale.recipe.outputs import CHECKPOINT, SaveRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator

FORMAT = 2
_TEXTS = ("state.json", "index.json", "recipe.yaml")
_MAX_THREADS = 8

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorChunk:
    """A process's range of a flat tensor of the parameter `name`. `kind` is `weight`, `ema`, or a moment's name."""

    kind: str
    name: str
    values: torch.Tensor


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest checkpoint of a run, whole or not, or None."""
    return next(reversed(list_checkpoints(run_dir)), None)


def checkpoint_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def part_of(checkpoint: Path, process: int) -> Path:
    """Return the path of the part that a process writes."""
    return checkpoint / f"part-{process:05d}.safetensors"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    folder = run_dir / "checkpoints"
    if not os.path.lexists(folder):
        return []
    return sorted((folder / name for name in os.listdir(folder) if CHECKPOINT.fullmatch(name)), key=step_of)


class CheckpointReader:
    """A reader of any range of a checkpoint's tensors, across parts."""

    def __init__(self, checkpoint: Path):
        self.path = checkpoint
        index = json.loads((checkpoint / "index.json").read_text(encoding="utf-8"))
        self.shapes: dict[str, list[int]] = index["shapes"]
        self._bounds: dict[str, list[int]] = index["bounds"]
        self._files: dict[int, tuple[Any, set[str]]] = {}

    def fill(self, kind: str, name: str, values: torch.Tensor, first: int) -> None:
        """Fill the flat `values` with the elements from `first` on of a parameter's tensor.

        Raises:
            UserError: the checkpoint has no such tensor of this `TensorChunk.kind`.
            OSError: a part differs from the index.
        """
        if name not in self._bounds:
            raise UserError(f"checkpoint {self.path} has no {kind} of {name}; resume with its model")
        last = first + values.numel()
        for part, (start, stop) in enumerate(zip(self._bounds[name], self._bounds[name][1:], strict=False)):
            begin, end = max(first, start), min(last, stop)
            if begin >= end:
                continue
            if part not in self._files:
                file = safe_open(part_of(self.path, part), "pt")
                self._files[part] = (file, set(file.keys()))
            file, keys = self._files[part]
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


class CheckpointWriter:
    """A writer of a run's checkpoints, one at a time, in a thread of every process.

    `save` copies tensors to host memory, and training continues. `commit` renames the checkpoint's folder after every
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
        return self._thread is not None and self._thread.is_alive()

    @property
    def clock_is_due(self) -> bool:
        """Whether the recipe's minutes have passed since the last save, by the clock of this process."""
        minutes = (time.monotonic() - self._last_save) / 60
        return 0 < self.recipe.clock_minutes <= minutes

    def save(
        self, tensor_chunks: list[TensorChunk], shapes: dict[str, torch.Size], state: dict[str, Any], recipe: str
    ) -> None:
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
        texts["index.json"] = json.dumps(self._index(tensor_chunks, shapes))
        self._error, self._digests = None, {}
        if self.accelerator.is_main_process:
            try:
                for stale in self._final.parent.glob(".step-*.partial"):
                    remove(stale)
                self._partial.mkdir(parents=True)
            except OSError as error:
                self._error = error
        self._agree()
        copies = {
            f"{p.kind}.{p.name}": p.values.detach().to("cpu", copy=True) for p in tensor_chunks if p.values.numel()
        }
        self._thread = threading.Thread(target=self._write, args=(copies, texts), name="checkpoint", daemon=True)
        self._thread.start()

    def commit(self) -> int | None:
        """Collective. Finish the checkpoint that `save` began, and remove checkpoints past `total_limit`.

        Return its step, or None if there was nothing to finish. Raise OSError on all processes if the disk is full or
        not writable; earlier checkpoints still exist.
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
                self._error = error
        # All processes wait for the new name: one that went on and failed would end the first process too.
        self._agree()
        if self.accelerator.is_main_process:
            try:
                for old in list_checkpoints(self.run_dir)[: -max(self.recipe.total_limit, 1)]:
                    # Renamed first, so that a kill during the removal leaves no half checkpoint under its name.
                    remove(old.rename(partial_path(old)))
            except OSError as error:
                # Only logged, because the disk may have room.
                _log.warning("an old checkpoint of %s cannot be removed (%s); the run continues", self.run_dir, error)
        return self.newest

    def _index(self, tensor_chunks: list[TensorChunk], shapes: dict[str, torch.Size]) -> dict[str, Any]:
        sizes = {piece.name: piece.values.numel() for piece in tensor_chunks if piece.kind == "weight"}
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
        reports = gather_objects([(self._digests, self._error)])
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


class Contents(NamedTuple):
    """Contents of a checkpoint's texts: state.json, the run's recipe, and the digests of the parts by file name."""

    state: Mapping[str, Any]
    recipe: Mapping[str, Any]
    digests: Mapping[str, FileDigest]


def latest_valid(
    accelerator: "Accelerator", run_dir: Path, check: Callable[[Contents], None]
) -> tuple[Path, Mapping[str, Any], list[str]] | None:
    """Collective. Find the newest whole checkpoint of a run; rename newer, damaged checkpoints, and delete none.

    Args:
        check: function that raises `CorruptFile` for contents of another run.

    Returns:
        The checkpoint, its state.json, and the old names of the renamed ones. None for a run without checkpoints.

    Raises:
        UserError: no checkpoint is whole, or a newer version wrote one. All stay as they are.
        OSError: a checkpoint cannot be read, so that it may be whole, or cannot be renamed. All stay as they are.
    """
    faults: dict[Path, CorruptFile] = {}
    for checkpoint in reversed(from_main_process(accelerator, lambda: list_checkpoints(run_dir))):
        try:
            state = _checked_state(accelerator, checkpoint, check)
        except CorruptFile as damage:
            faults[checkpoint] = damage
            continue
        except OSError as error:
            raise OSError(
                f"checkpoint {checkpoint} cannot be read ({error}); it may be whole and stays as it is. Fix: repair "
                "the disk or the rights, and start the run again"
            ) from error
        for bad, fault in faults.items():
            name = from_main_process(accelerator, functools.partial(_set_aside, bad))
            if accelerator.is_main_process:
                words = "checkpoint %s is unusable (%s); it is kept as %s, and the run continues from %s"
                _log.warning(words, bad, fault, name, checkpoint.name)
        return checkpoint, state, [bad.name for bad in faults]
    if faults:
        reasons = "; ".join(f"{bad.name}: {fault}" for bad, fault in faults.items())
        raise UserError(
            f"no checkpoint of {run_dir} is whole ({reasons}); they stay as they are. Fix: replace one by a whole "
            "copy, or train anew in another output_dir"
        )
    return None


def require_valid(checkpoint: Path) -> None:
    """Raise an OSError if a checkpoint is damaged or unreadable, a UserError if a newer version wrote it."""
    try:
        digests = contents(checkpoint).digests
        _require_chunks(checkpoint, digests, chunks_of(digests))
    except CorruptFile as damage:
        raise OSError(f"checkpoint {checkpoint} is damaged ({damage}); name another one with --step") from damage


def contents(checkpoint: Path) -> Contents:
    """Return the texts of a checkpoint after checking all of its files, except for the bytes of its parts.

    Raises:
        CorruptFile: it is not whole.
        UserError: a newer version wrote it.
        OSError: it cannot be read, though it may be whole.
    """
    texts = {name: read_bytes(checkpoint / name) for name in _TEXTS}
    try:
        state = dict(json.loads(texts["state.json"]))
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptFile("state.json is unreadable") from error
    try:
        digests = read_digests(checkpoint / "digests.json")
    except CorruptFile:
        # First, because a newer format may store digests in another way.
        _raise_if_newer(checkpoint, state)
        raise
    for name, text in texts.items():
        if digests.get(name) != digest_of(text):
            raise CorruptFile(f"{name} is not as it was written")
    _raise_if_newer(checkpoint, state)
    if state["step"] != step_of(checkpoint):
        raise CorruptFile(f"state.json is of step {state['step']}")
    parts = [part_of(checkpoint, process) for process in range(state["num_processes"])]
    for part in parts:
        if part.name not in digests:
            raise CorruptFile(f"digests.json has no {part.name}")
        size, written = file_bytes(part), digests[part.name].num_bytes
        if size != written:
            raise CorruptFile(f"{part.name} has {size:,} bytes, and {written:,} were written")
    return Contents(state, yaml.safe_load(texts["recipe.yaml"]), {part.name: digests[part.name] for part in parts})


def _raise_if_newer(checkpoint: Path, state: Mapping[str, Any]) -> None:
    version = state.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise UserError(
            f"checkpoint {checkpoint} has format {version}, of flipscale {state.get('flipscale')}; this version reads "
            f"format {FORMAT}. Fix: install the version that wrote it"
        )


def _checked_state(
    accelerator: "Accelerator", checkpoint: Path, check: Callable[[Contents], None]
) -> Mapping[str, Any]:
    """Collective. Return the state of a whole checkpoint. Raise CorruptFile on all processes if it is damaged."""

    def read() -> Contents:
        found = contents(checkpoint)
        check(found)
        return found

    state, _, digests = from_main_process(accelerator, read)
    rank, world, chunks = accelerator.process_index, accelerator.num_processes, chunks_of(digests)
    damaged, failure = chunks[len(chunks) * rank // world : len(chunks) * (rank + 1) // world], None
    try:
        damaged = _damaged(checkpoint, digests, damaged)
    except CorruptFile:
        pass  # a part is missing here, so the whole share counts as damaged
    except OSError as error:
        failure = str(error)
    reports = gather_objects([(f"process {rank} on {platform.node()}", failure, damaged)])
    for place, failure, _ in reports:
        if failure:
            raise OSError(f"{failure}, {place}")

    def look_again() -> None:
        for place, _, damaged in reports:
            _require_chunks(checkpoint, digests, damaged)
            if damaged:
                raise OSError(f"{place} reads other bytes than process 0")

    from_main_process(accelerator, look_again)
    return state


def _damaged(checkpoint: Path, digests: Mapping[str, FileDigest], chunks: Sequence[Chunk]) -> list[Chunk]:
    """Return the chunks that differ from their digests. Raises as `damaged_chunks` does."""
    num_threads = max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    return damaged_chunks(checkpoint, digests, chunks, min(num_threads, _MAX_THREADS))


def _require_chunks(checkpoint: Path, digests: Mapping[str, FileDigest], chunks: Sequence[Chunk]) -> None:
    for name, number in _damaged(checkpoint, digests, chunks):
        first = number * CHUNK_BYTES
        raise CorruptFile(f"{name} is not as it was written, between its bytes {first:,} and {first + CHUNK_BYTES:,}")


def _set_aside(checkpoint: Path) -> str:
    """Rename a damaged checkpoint to a free name that starts with `bad-`, and return the name."""
    suffixes = itertools.chain([""], map(".{}".format, itertools.count(2)))
    paths = (checkpoint.with_name(f"bad-{checkpoint.name}{suffix}") for suffix in suffixes)
    aside = next(path for path in paths if not os.path.lexists(path))
    try:
        checkpoint.rename(aside)
        sync(checkpoint.parent)
    except OSError as error:
        raise OSError(
            f"checkpoint {checkpoint} is unusable and cannot be renamed ({error}). Fix: rename it by hand, or repair "
            "the disk or the rights, and start the run again"
        ) from error
    return aside.name


def from_main_process(accelerator: "Accelerator", ask: Callable[[], Any]) -> Any:
    """Collective. Return on all processes the result of `ask` on the first process, or raise its error on all."""
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            answer = [ask()]
        except (OSError, ValueError, CorruptFile) as error:
            answer = [error]
    if accelerator.num_processes > 1:
        dist.broadcast_object_list(answer)
    (result,) = answer
    if isinstance(result, Exception):
        raise result
    return result
