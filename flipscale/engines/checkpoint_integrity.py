"""The choice of the checkpoint that a run resumes from: the newest whole one.

Newer, damaged checkpoints are renamed, and nothing is deleted. All processes read the checkpoint once, each an equal
share, before any of them uses its content. The first process alone reads its texts (`contents`) and judges damage that
another process found: a network file system may show a new folder to one machine later than to another.
"""

import functools
import itertools
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from flipscale.engines.checkpoint import FORMAT, list_checkpoints, part_of, step_of
from flipscale.io.atomic import sync
from flipscale.io.digests import (
    CHUNK_BYTES,
    Chunk,
    Comparison,
    Damage,
    FileDigest,
    chunks_of,
    digest_of,
    file_bytes,
    read_bytes,
    read_digests,
)
from flipscale.io.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

_log = logging.getLogger(__name__)

_TEXTS = ("state.json", "index.json", "recipe.yaml")
_MAX_THREADS = 8


class Contents(NamedTuple):
    """Contents of a checkpoint's texts: state.json, the run's recipe, and the digests of the parts by file name."""

    state: Mapping[str, Any]
    recipe: Mapping[str, Any]
    digests: Mapping[str, FileDigest]


class Chosen(NamedTuple):
    """The whole checkpoint to resume from, its state.json, and the names of newer ones that were renamed."""

    checkpoint: Path
    state: Mapping[str, Any]
    set_aside: Sequence[str]


def begin_reading(checkpoint: Path | None) -> Comparison | None:
    """Start threads that compare this process's share of a checkpoint with its digests.

    They run while the process imports modules and meets the other processes. `newest_whole` waits for them and decides.
    """
    if checkpoint is None:
        return None
    try:
        digests = read_digests(checkpoint / "digests.json")
    except (Damage, OSError):  # `newest_whole` reports it
        return None
    parts = {name: digests[name] for name in sorted(digests) if name not in _TEXTS}
    mine = _share(parts, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    return Comparison(checkpoint, parts, mine, _num_threads())


def newest_whole(
    accelerator: "Accelerator", run_dir: Path, check: Callable[[Contents], None], ahead: Comparison | None = None
) -> Chosen | None:
    """Collective. Return the newest whole checkpoint of a run, or None; rename newer, damaged checkpoints.

    Args:
        check: function that raises `Damage` for contents of another run.
        ahead: result of `begin_reading` for the newest checkpoint.

    Raises:
        UserError: no checkpoint is whole, or a newer version wrote one. All stay as they are.
        OSError: a checkpoint cannot be read, so that it may be whole, or cannot be renamed. All stay as they are.
    """
    checkpoints: list[Path] = _answer_of_first(accelerator, lambda: list_checkpoints(run_dir))
    faults: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints):
        state = _state_or_fault(accelerator, checkpoint, check, ahead)
        if not isinstance(state, str):
            for bad, fault in faults.items():
                name = _answer_of_first(accelerator, functools.partial(_set_aside, bad))
                if accelerator.is_main_process:
                    words = "checkpoint %s is unusable (%s); it is kept as %s, and the run goes on from %s"
                    _log.warning(words, bad, fault, name, checkpoint.name)
            return Chosen(checkpoint, state, [bad.name for bad in faults])
        faults[checkpoint] = state
    if faults:
        reasons = "; ".join(f"{bad.name}: {fault}" for bad, fault in faults.items())
        raise UserError(
            f"no checkpoint of {run_dir} is whole ({reasons}); they stay as they are. Fix: replace one by a whole "
            "copy, or train anew in another output_dir"
        )
    return None


def require_whole(checkpoint: Path) -> None:
    """Raise an OSError if a checkpoint is damaged or unreadable, a UserError if a newer version wrote it."""
    try:
        digests = contents(checkpoint).digests
        _raise_if_any(Comparison(checkpoint, digests, chunks_of(digests), _num_threads()).damaged())
    except Damage as damage:
        raise OSError(f"checkpoint {checkpoint} is damaged ({damage}); name another one with --step") from damage


def contents(checkpoint: Path) -> Contents:
    """Return the texts of a checkpoint after checking all of its files, except for the bytes of its parts.

    Raises:
        Damage: it is not whole.
        UserError: a newer version wrote it.
        OSError: it cannot be read, though it may be whole.
    """
    texts = {name: read_bytes(checkpoint / name) for name in _TEXTS}
    try:
        state = json.loads(texts["state.json"])
    except (ValueError, RecursionError) as error:
        raise Damage("state.json is unreadable") from error
    if not isinstance(state, dict):
        raise Damage("state.json is unreadable")
    try:
        digests = read_digests(checkpoint / "digests.json")
    except Damage:
        # First, because a newer format may store digests in another way.
        _raise_if_newer(checkpoint, state)
        raise
    for name, text in texts.items():
        if digests.get(name) != digest_of(text):
            raise Damage(f"{name} is not as it was written")
    _raise_if_newer(checkpoint, state)
    if state["step"] != step_of(checkpoint):
        raise Damage(f"state.json is of step {state['step']}")
    parts = [part_of(checkpoint, process) for process in range(state["num_processes"])]
    for part in parts:
        if part.name not in digests:
            raise Damage(f"digests.json has no {part.name}")
        size, written = file_bytes(part), digests[part.name].num_bytes
        if size != written:
            raise Damage(f"{part.name} has {size:,} bytes, and {written:,} were written")
    return Contents(state, yaml.safe_load(texts["recipe.yaml"]), {part.name: digests[part.name] for part in parts})


def _raise_if_newer(checkpoint: Path, state: Mapping[str, Any]) -> None:
    version = state.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise UserError(
            f"checkpoint {checkpoint} has format {version}, of flipscale {state.get('flipscale')}; this version reads "
            f"format {FORMAT}. Fix: install the version that wrote it"
        )


def _state_or_fault(
    accelerator: "Accelerator", checkpoint: Path, check: Callable[[Contents], None], ahead: Comparison | None
) -> Mapping[str, Any] | str:
    """Collective. Return the state of a whole checkpoint, or the fault of a damaged one."""

    def contents_or_fault() -> Contents | str:
        try:
            read = contents(checkpoint)
            check(read)
            return read
        except Damage as damage:
            return str(damage)
        except OSError as error:
            raise _unreadable(checkpoint, str(error)) from error

    read = _answer_of_first(accelerator, contents_or_fault)
    if isinstance(read, str):
        return read
    return _fault_of_parts(accelerator, checkpoint, read.digests, ahead) or read.state


def _fault_of_parts(
    accelerator: "Accelerator", checkpoint: Path, digests: Mapping[str, FileDigest], ahead: Comparison | None
) -> str | None:
    """Collective. Return the place of damage in a checkpoint's parts, or None. Each process reads an equal share."""
    from accelerate.utils import gather_object

    rank, world = accelerator.process_index, accelerator.num_processes
    mine = _share(digests, rank, world)
    if ahead is None or (ahead.folder, ahead.chunks) != (checkpoint, mine):
        ahead = Comparison(checkpoint, digests, mine, _num_threads())
    failure, damaged = None, mine
    try:
        damaged = ahead.damaged()
    except Damage:
        pass  # all chunks count as damaged
    except OSError as error:
        failure = str(error)
    place = f"process {rank} on {socket.gethostname()}"
    reports = gather_object([(place, failure, damaged)])
    for place, failure, _ in reports:
        if failure:
            raise _unreadable(checkpoint, f"{failure}, {place}")

    def fault() -> str | None:
        for place, _, damaged in reports:
            try:
                _raise_if_any(Comparison(checkpoint, digests, damaged).damaged())
            except Damage as damage:
                return str(damage)
            except OSError as error:
                raise _unreadable(checkpoint, str(error)) from error
            if damaged:
                raise _unreadable(checkpoint, f"{place} reads other bytes than process 0")
        return None

    return _answer_of_first(accelerator, fault)


def _share(digests: Mapping[str, FileDigest], rank: int, world: int) -> list[Chunk]:
    chunks = chunks_of(digests)
    return chunks[len(chunks) * rank // world : len(chunks) * (rank + 1) // world]


def _num_threads() -> int:
    return min(max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1), _MAX_THREADS)


def _raise_if_any(damaged: Sequence[Chunk]) -> None:
    if damaged:
        (name, number), *_ = damaged
        first = number * CHUNK_BYTES
        raise Damage(f"{name} is not as it was written, between its bytes {first:,} and {first + CHUNK_BYTES:,}")


def _unreadable(checkpoint: Path, why: str) -> OSError:
    return OSError(
        f"checkpoint {checkpoint} cannot be read ({why}); it may be whole and stays as it is. Fix: repair the disk or "
        "the rights, and start the run again"
    )


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


def _answer_of_first(accelerator: "Accelerator", ask: Callable[[], Any]) -> Any:
    """Collective. Return on all processes the result of `ask` on the first process, or raise its error on all."""
    from accelerate.utils import broadcast_object_list

    answer: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            answer = [ask()]
        except (OSError, ValueError) as error:
            answer = [error]
    (result,) = broadcast_object_list(answer)
    if isinstance(result, Exception):
        raise result
    return result
