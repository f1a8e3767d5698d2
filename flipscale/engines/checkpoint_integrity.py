"""Which checkpoint a run goes on from: the newest that is whole. Newer ones are set aside, and nothing is deleted.

All processes read the checkpoint once, each a share of it, before any of them uses what it holds. What a checkpoint
says of itself (`contents`) is read and judged by the first process alone, and so is damage that another one has found:
a network file system may show a new folder to one machine later than to another.
"""

import functools
import itertools
import json
import logging
import math
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from safetensors import SafetensorError, safe_open

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
# What state.json must have: a kind of number, and its least value.
_NUMBERS: dict[str, tuple[type, float]] = {
    "step": (int, 1),
    "samples_seen": (int, 1),
    "optimizer_steps": (int, 0),
    "trained_seconds": (float, 0),
    "data_samples": (int, 1),
    "data_fingerprint": (int, -math.inf),
    "num_processes": (int, 1),
}
_MOST_THREADS = 8


class Contents(NamedTuple):
    """What a checkpoint says of itself.

    Args:
        state: as saved.
        recipe: of the run, as plain values.
        digests: of its parts; empty for one of format 1, which has none.
    """

    state: Mapping[str, Any]
    recipe: Mapping[str, Any]
    digests: Mapping[str, FileDigest]


class Chosen(NamedTuple):
    """A checkpoint to go on from.

    Args:
        checkpoint: which is whole.
        state: as saved.
        set_aside: the names of those newer ones that are not.
    """

    checkpoint: Path
    state: Mapping[str, Any]
    set_aside: Sequence[str]


def begin_reading(checkpoint: Path | None) -> Comparison | None:
    """Begin to compare this process's share of a checkpoint with its digests, while the process imports what it needs
    and meets the others. `newest_whole` waits for the end, and has the last word on what this finds."""
    if checkpoint is None:
        return None
    try:
        digests = read_digests(checkpoint / "digests.json")
    except (Damage, OSError):
        return None
    parts = {name: digests[name] for name in sorted(digests) if name not in _TEXTS}
    mine = _share(parts, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    return Comparison(checkpoint, parts, mine, _num_threads())


def newest_whole(
    accelerator: "Accelerator", run_dir: Path, check: Callable[[Contents], None], ahead: Comparison | None = None
) -> Chosen | None:
    """Collective. Return the newest whole checkpoint of a run, and set aside the newer ones; None if there are none.

    Args:
        check: raises `Damage` for contents that are not this run's.
        ahead: what `begin_reading` began for the newest one.

    Raises:
        ValueError: none of them is whole, or a newer version wrote it. They stay as they are.
        OSError: one cannot be read, so that it may be whole, or cannot be renamed. They stay as they are.
    """
    found: list[Path] = _answer_of_first(accelerator, lambda: list_checkpoints(run_dir))
    faults: dict[Path, str] = {}
    for checkpoint in reversed(found):
        state = _state_if_whole(accelerator, checkpoint, check, ahead)
        if not isinstance(state, str):
            for bad, fault in faults.items():
                name = _answer_of_first(accelerator, functools.partial(_set_aside, bad))
                if accelerator.is_main_process:
                    told = "checkpoint %s is unusable (%s); it is kept as %s, and the run goes on from %s"
                    _log.warning(told, bad, fault, name, checkpoint.name)
            return Chosen(checkpoint, state, [bad.name for bad in faults])
        faults[checkpoint] = state
    if faults:
        told = "; ".join(f"{bad.name}: {fault}" for bad, fault in faults.items())
        raise UserError(
            f"no checkpoint of {run_dir} is whole ({told}); they stay as they are: put a copy of one in its place, or "
            "use another output_dir to train anew"
        )
    return None


def require_whole(checkpoint: Path) -> None:
    """Raise unless a checkpoint is whole.

    Raises:
        OSError: it is damaged, or cannot be read.
        ValueError: a newer version wrote it.
    """
    try:
        digests = contents(checkpoint).digests
        _raise_if_any(Comparison(checkpoint, digests, chunks_of(digests), _num_threads()).damaged())
    except Damage as damage:
        raise OSError(f"checkpoint {checkpoint} is damaged ({damage}); name another one with --step") from damage


def contents(checkpoint: Path) -> Contents:
    """Return what a checkpoint says of itself, after a look at all of its files, but not at the bytes of its parts.

    Raises:
        Damage: it is not whole.
        ValueError: a newer version wrote it.
        OSError: it cannot be read, which does not say that it is damaged.
    """
    texts = {name: read_bytes(checkpoint / name) for name in _TEXTS}
    state = _parsed(texts["state.json"], "state.json")
    version = state.get("format", 1)
    digests: dict[str, FileDigest] | None = None
    if version != 1 or os.path.lexists(checkpoint / "digests.json"):
        try:
            digests = read_digests(checkpoint / "digests.json")
        except Damage:
            # A newer format may keep them in another way.
            _raise_if_newer(checkpoint, state)
            raise
        for name, text in texts.items():
            if digests.get(name) != digest_of(text):
                raise Damage(f"{name} is not as it was written")
    _raise_if_newer(checkpoint, state)
    bounds = _bounds(_parsed(texts["index.json"], "index.json"))
    try:
        recipe = yaml.safe_load(texts["recipe.yaml"])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Damage("recipe.yaml is unreadable") from error
    if not isinstance(recipe, dict):
        raise Damage("recipe.yaml is no recipe")
    num_parts = len(next(iter(bounds.values()))) - 1
    _check_state(checkpoint, state, num_parts)
    parts = [part_of(checkpoint, number) for number in range(num_parts)]
    for number, part in enumerate(parts):
        if digests is not None:
            _check_length(part, digests)
        else:
            _check_header(part, {name: ends[number + 1] - ends[number] for name, ends in bounds.items()})
    return Contents(state, recipe, {part.name: digests[part.name] for part in parts} if digests is not None else {})


def _parsed(text: bytes, name: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damage(f"{name} is unreadable") from error
    if not isinstance(content, dict):
        raise Damage(f"{name} is unreadable")
    return content


def _raise_if_newer(checkpoint: Path, state: Mapping[str, Any]) -> None:
    version = state.get("format", 1)
    if not isinstance(version, int) or version < 1:
        raise Damage(f"state.json has the format {version!r}")
    if version > FORMAT:
        raise UserError(
            f"checkpoint {checkpoint} has format {version}, of flipscale {state.get('flipscale')}, and this version "
            f"reads formats up to {FORMAT}; install the version that wrote it"
        )


def _bounds(index: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return where each part's range of each parameter begins and ends, of the content of index.json."""
    try:
        shapes, bounds = index["shapes"], index["bounds"]
        lengths = {len(ends) for ends in bounds.values()}
        is_right = shapes.keys() == bounds.keys() and len(lengths) == 1 and min(lengths) > 1
        for name, ends in bounds.items():
            is_right &= all(type(size) is int and size >= 0 for size in (*shapes[name], *ends))
            is_right &= [0, *sorted(ends), math.prod(shapes[name])] == [ends[0], *ends, ends[-1]]
    except (LookupError, TypeError, AttributeError) as error:
        raise Damage("index.json is no index of a checkpoint") from error
    if not is_right:
        raise Damage("index.json contradicts itself")
    return bounds


def _check_state(checkpoint: Path, state: Mapping[str, Any], num_parts: int) -> None:
    for name, (kind, least) in _NUMBERS.items():
        # The first versions did not write `trained_seconds`.
        value = state.get(name, 0.0 if name == "trained_seconds" else None)
        if type(value) not in (kind, int) or not least <= value < math.inf:
            raise Damage(f"state.json has {value!r} as its {name}")
    if state["step"] != step_of(checkpoint):
        raise Damage(f"state.json is of step {state['step']}")
    if state["optimizer_steps"] > state["step"]:
        raise Damage(f"state.json has {state['optimizer_steps']} optimizer_steps in {state['step']} steps")
    if state["num_processes"] != num_parts:
        raise Damage(f"it has {num_parts} parts, of {state['num_processes']} processes")


def _check_length(part: Path, digests: Mapping[str, FileDigest]) -> None:
    if part.name not in digests:
        raise Damage(f"digests.json has no {part.name}")
    size, written = file_bytes(part), digests[part.name].num_bytes
    if size != written:
        raise Damage(f"{part.name} has {size:,} bytes, and {written:,} were written")


def _check_header(part: Path, sizes: Mapping[str, int]) -> None:
    """Raise unless the header of a part, of which no digest is known, fits the part's length and the index."""
    file_bytes(part)
    try:
        with safe_open(part, "pt") as file:
            stored = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise Damage(f"{part.name} is cut short or damaged: {error}") from error
    for key, shape in stored.items():
        if shape != [sizes.get(key.partition(".")[2])]:
            raise Damage(f"{part.name} has another range of {key} than index.json says")
    lacking = [name for name, size in sizes.items() if size and f"weight.{name}" not in stored]
    if lacking:
        raise Damage(f"{part.name} lacks the weight of {lacking[0]}")


def _state_if_whole(
    accelerator: "Accelerator", checkpoint: Path, check: Callable[[Contents], None], ahead: Comparison | None
) -> Mapping[str, Any] | str:
    """Collective. Return the state of a checkpoint, or what is wrong with it."""

    def judged() -> Contents | str:
        try:
            found = contents(checkpoint)
            check(found)
            return found
        except Damage as damage:
            return str(damage)
        except OSError as error:
            raise _unreadable(checkpoint, str(error)) from error

    found = _answer_of_first(accelerator, judged)
    if isinstance(found, str):
        return found
    if not found.digests and accelerator.is_main_process:
        _log.warning("checkpoint %s has no digests, as an older flipscale wrote it; it is taken as it is", checkpoint)
    return _damage(accelerator, checkpoint, found.digests, ahead) or found.state


def _damage(
    accelerator: "Accelerator", checkpoint: Path, digests: Mapping[str, FileDigest], ahead: Comparison | None
) -> str | None:
    """Collective. Return where the parts of a checkpoint are damaged, None if they are not. Each process reads an equal
    share of them.

    Raises:
        OSError: a process cannot read its share, or reads something else than the first one does.
    """
    from accelerate.utils import gather_object

    rank, world = accelerator.process_index, accelerator.num_processes
    mine = _share(digests, rank, world)
    if ahead is None or (ahead.folder, ahead.chunks) != (checkpoint, mine):
        ahead = Comparison(checkpoint, digests, mine, _num_threads())
    failed, found = None, mine
    try:
        found = ahead.damaged()
    except Damage:
        pass  # all of it
    except OSError as error:
        failed = str(error)
    place = f"process {rank} on {socket.gethostname()}"
    everyone = gather_object([(place, failed, found)])
    for place, failed, _ in everyone:
        if failed:
            raise _unreadable(checkpoint, f"{failed}, {place}")

    def judged() -> str | None:
        for place, _, found in everyone:
            try:
                _raise_if_any(Comparison(checkpoint, digests, found).damaged())
            except Damage as damage:
                return str(damage)
            except OSError as error:
                raise _unreadable(checkpoint, str(error)) from error
            if found:
                raise _unreadable(checkpoint, f"{place} reads something else than process 0")
        return None

    return _answer_of_first(accelerator, judged)


def _share(digests: Mapping[str, FileDigest], rank: int, world: int) -> list[Chunk]:
    chunks = chunks_of(digests)
    return chunks[len(chunks) * rank // world : len(chunks) * (rank + 1) // world]


def _num_threads() -> int:
    return min(max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1), _MOST_THREADS)


def _raise_if_any(damaged: Sequence[Chunk]) -> None:
    if damaged:
        (name, number), *_ = damaged
        first = number * CHUNK_BYTES
        raise Damage(f"{name} is not as it was written, between its bytes {first:,} and {first + CHUNK_BYTES:,}")


def _unreadable(checkpoint: Path, why: str) -> OSError:
    return OSError(
        f"checkpoint {checkpoint} cannot be read ({why}); it may be whole and stays as it is: mend the disk or the "
        "rights to it, and start the run again"
    )


def _set_aside(checkpoint: Path) -> str:
    """Rename a checkpoint to what no checkpoint is called, and return that name."""
    names = (
        f"bad-{checkpoint.name}{suffix}" for suffix in itertools.chain([""], map(".{}".format, itertools.count(2)))
    )
    aside = next(path for path in map(checkpoint.with_name, names) if not os.path.lexists(path))
    try:
        checkpoint.rename(aside)
        sync(checkpoint.parent)
    except OSError as error:
        raise OSError(
            f"checkpoint {checkpoint} is unusable and cannot be renamed ({error}); rename it by hand, or mend the disk "
            "or the rights to it, and start the run again"
        ) from error
    return aside.name


def _answer_of_first(accelerator: "Accelerator", ask: Callable[[], Any]) -> Any:
    """Collective. Return on all processes what `ask` returns on the first one, or raise the same error."""
    from accelerate.utils import broadcast_object_list

    answer: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            answer = [ask()]
        except (OSError, ValueError) as error:
            answer = [error]
    (found,) = broadcast_object_list(answer)
    if isinstance(found, Exception):
        raise found
    return found
