"""What a step asks of the accelerator and of the network, seen operation by operation."""

import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from simulated.fake_gpu import DEVICE, OnDevice
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

import flipscale

_OURS = str(Path(flipscale.__file__).parent)
_aten, _c10d = torch.ops.aten, torch.ops.c10d
# Questions about a tensor, which are no work.
_QUESTIONS = ("prim::", "aten::size", "aten::stride", "aten::storage_offset", "aten::sym_", "aten::is_contiguous")

# Operations of aten that start no kernel, although torch does not call them views.
_NO_KERNELS = ("aten::_unsafe_view", "aten::empty", "aten::new_empty", "aten::lift_fresh", "aten::record_stream")


@dataclass
class Work:
    """Work on the device.

    Args:
        kernels: operations that compute or copy; views and new memory are none.
        casts: kernels that only change the type.
        bytes: what the kernels read and write, each tensor once.
    """

    kernels: int = 0
    casts: int = 0
    bytes: int = 0

    def __sub__(self, other: "Work") -> "Work":
        return Work(self.kernels - other.kernels, self.casts - other.casts, self.bytes - other.bytes)

    def add(self, func: Any, args: Any, result: Any) -> None:
        """Count an operation."""
        name = func._schema.name
        if func.is_view or name.startswith(_NO_KERNELS):
            return
        inputs, outputs = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in (args, result))
        if not any(tensor.device.type == "cuda" for tensor in outputs or inputs):
            return
        self.kernels += 1
        self.casts += name == "aten::_to_copy" and inputs[0].dtype != outputs[0].dtype
        self.casts += name == "aten::copy_" and inputs[0].dtype != inputs[1].dtype
        overwritten = name in ("aten::copy_", "aten::fill_", "aten::zero_")
        self.bytes += sum(_bytes(tensor) for tensor in [*inputs[overwritten:], *outputs])


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's different elements: an expanded one has few."""
    return math.prod(s for s, step in zip(tensor.shape, tensor.stride(), strict=True) if step) * tensor.dtype.itemsize


@dataclass(frozen=True)
class Collective:
    """One exchange between the processes of a group.

    Args:
        kind: such as `all_reduce`.
        dtype: of what is sent.
        size: elements of this process's input.
        group: ranks of the processes that take part.
        devices: of all its tensors.
        place: the line of ours that caused it.
        kernels: how many kernels of the passes went before.
    """

    kind: str
    dtype: torch.dtype
    size: int
    group: tuple[int, ...]
    devices: frozenset[str]
    place: str
    kernels: int

    @property
    def signature(self) -> tuple[str, torch.dtype, int, tuple[int, ...]]:
        """What must be equal on every process of the group, or the processes wait for each other for ever."""
        return self.kind, self.dtype, self.size, self.group

    @property
    def bytes(self) -> tuple[int, int]:
        """Bytes that this process sends and receives, by the algorithm that sends least: around a ring."""
        size, n = self.size * self.dtype.itemsize, len(self.group)
        if self.kind == "all_gather":
            each = size * (n - 1)
        elif self.kind in ("reduce_scatter", "all_to_all"):
            each = size * (n - 1) // n
        elif self.kind == "all_reduce":
            each = 2 * size * (n - 1) // n
        elif self.kind == "barrier":
            each = 0
        else:
            return (0 if self.kind == "recv" else size), (0 if self.kind == "send" else size)
        return each, each


# Kinds of operations. Those of the first table send their first argument, those of the second their second one.
_IN_PLACE: dict[Any, str] = {
    _c10d.allreduce_.default: "all_reduce",
    _c10d.allreduce_coalesced_.default: "all_reduce",
    _c10d.broadcast_.default: "broadcast",
    _c10d.reduce_.default: "reduce",
    _c10d.barrier.default: "barrier",
    _c10d.send.default: "send",
    _c10d.recv_.default: "recv",
}
_TO_ANOTHER: dict[Any, str] = {
    _c10d.allgather_.default: "all_gather",
    _c10d._allgather_base_.default: "all_gather",
    _c10d.allgather_into_tensor_coalesced_.default: "all_gather",
    _c10d.reduce_scatter_.default: "reduce_scatter",
    _c10d._reduce_scatter_base_.default: "reduce_scatter",
    _c10d.reduce_scatter_tensor_coalesced_.default: "reduce_scatter",
    _c10d.alltoall_base_.default: "all_to_all",
    _c10d.alltoall_.default: "all_to_all",
    _c10d.gather_.default: "gather",
    _c10d.scatter_.default: "scatter",
}
_functional = torch.ops._c10d_functional
_FUNCTIONAL = {
    _functional.all_reduce.default: "all_reduce",
    _functional.all_reduce_.default: "all_reduce",
    _functional.all_gather_into_tensor.default: "all_gather",
    _functional.reduce_scatter_tensor.default: "reduce_scatter",
    _functional.all_to_all_single.default: "all_to_all",
    _functional.broadcast.default: "broadcast",
}


class Recorder(OnDevice):
    """Records what is done while this mode is on and `on` is true; memory it counts all the time.

    Nothing has content on a fake GPU: what the host reads from it is 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.ops: Counter[str] = Counter()
        self.loss_ops: Counter[str] = Counter()
        self.work = Work()
        self.collectives: list[Collective] = []
        # Messages of two groups that nothing keeps one after the other.
        self.side_by_side: list[tuple[Collective, Collective]] = []
        self.waits: list[str] = []
        self.in_loss = self._in_kernels = False
        self._building = False
        self.memory = Memory()
        self._pinned: set[int] = set()
        self._sent: Any = None

    def as_kernels(self, compute: Callable[..., None]) -> Callable[..., None]:
        """Return the loss's tiles, left out of `ops`: on a real GPU they are Triton's kernels."""

        def counted(*arguments: Any, **options: Any) -> None:
            self._in_kernels = True
            try:
                compute(*arguments, **options)
            finally:
                self._in_kernels = False

        return counted

    @contextmanager
    def building_on_device(self) -> Iterator[None]:
        """Have a model's parameters made on the device at once: a fake one cannot be moved there in place."""
        self._building = True
        with patch.object(torch.nn.Module, "_apply", _move_buffers):
            yield
        self._building = False

    def wait(self, what: str) -> None:
        """Record that the host waits for the device."""
        if self.on:
            self.waits.append(f"{place()} ({what})")

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return super().__torch_dispatch__(func, types, args, kwargs)
        kwargs = kwargs or {}
        name = func._schema.name  # type: ignore[attr-defined]
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # it comes again, as what this process has of it
        if name.startswith(_QUESTIONS):
            return func(*args, **kwargs)
        if self.on:
            self._record(func, name, args, kwargs)
        if func is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            if args[0].device.type == "cuda":
                self.wait("a number is read")
            return False if args[0].dtype == torch.bool else 0.0 if args[0].is_floating_point() else 0
        if func is _aten._pin_memory.default:
            result = torch.empty_like(args[0])
            self._pinned.add(result.untyped_storage()._cdata)
        elif func is _aten.empty_like.default and self._building and kwargs.get("device") == torch.device("cpu"):
            result = super().__torch_dispatch__(func, types, args, {**kwargs, "device": DEVICE})
        else:
            pins = kwargs.pop("pin_memory", None)
            result = super().__torch_dispatch__(func, types, args, kwargs)
            if pins:
                self._pinned.add(result.untyped_storage()._cdata)
        if self.on and name.startswith("aten::"):
            self.work.add(func, (args, kwargs), result)
        if func in (_aten._to_copy.default, _aten.copy_.default):
            self._copy(func, args, kwargs, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda":
                self.memory.add(tensor.untyped_storage())
        return result

    def _record(self, func: Callable, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if func in _FUNCTIONAL:
            kind, tensors, sent = _FUNCTIONAL[func], [args[0]], [args[0]]
            group = dist.distributed_c10d._resolve_process_group(args[-1])
        elif func in _IN_PLACE or func in _TO_ANOTHER:
            kind = _IN_PLACE.get(func) or _TO_ANOTHER[func]
            sent = [t for t in tree_leaves(args[func in _TO_ANOTHER]) if isinstance(t, torch.Tensor)]
            tensors = [t for t in tree_leaves(args[:2]) if isinstance(t, torch.Tensor)]
            boxed = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
            group = dist.ProcessGroup.unbox(boxed)
        else:
            assert not name.startswith("c10d::"), f"a collective that is not known here: {name}"
            if name.startswith("aten::"):
                self.ops[name] += not self._in_kernels
                self.loss_ops[name] += self.in_loss
            return
        devices = frozenset(tensor.device.type for tensor in tensors)
        size, ranks = sum(tensor.numel() for tensor in sent), tuple(dist.get_process_group_ranks(group))
        one = Collective(kind, sent[0].dtype, size, ranks, devices, place(), self.work.kernels)
        if not torch.cuda.is_available():  # processes of CPUs have no streams
            self.collectives.append(one)
            return
        stream, number = torch.cuda.current_stream(), len(self.collectives)
        self.side_by_side += [
            (other, one)
            for before, other in enumerate(self.collectives)
            if before not in stream.seen and other.group != ranks
        ]
        self.collectives.append(one)
        # A message that nobody waits for yet runs on its own stream; others, on the current one.
        self._sent = stream.record_event()
        self._sent.seen |= {number}
        if not _is_async(func, args, kwargs):
            stream.wait_event(self._sent)

    @contextmanager
    def seeing_waits(self) -> Iterator[None]:
        """Let streams that wait for an asynchronous gather have its message before them."""
        gather = dist.all_gather_single

        def seen(*arguments: Any, async_op: bool = False, **options: Any) -> Any:
            work = gather(*arguments, async_op=async_op, **options)
            sent = self._sent
            return SimpleNamespace(wait=lambda: sent is not None and sent.wait()) if async_op else work

        with patch.object(dist, "all_gather_single", seen):
            yield

    def _copy(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> None:
        source = args[1] if func is _aten.copy_.default else args[0]
        target = args[0] if func is _aten.copy_.default else result
        ways = (source.device.type, target.device.type)
        if ways not in (("cuda", "cpu"), ("cpu", "cuda")):
            return
        blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        host = target if ways[0] == "cuda" else source
        if blocking or host.untyped_storage()._cdata not in self._pinned:
            how = "waited for" if blocking else "of memory that is not pinned"
            self.wait(f"a copy {'from' if ways[0] == 'cuda' else 'to'} the device, {how}")


def _is_async(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return the value of a collective's argument `async_op`, or its default."""
    names = [argument.name for argument in func._schema.arguments]
    if "async_op" not in names:
        return False
    place = names.index("async_op")
    given = args[place] if place < len(args) else func._schema.arguments[place].default_value
    return bool(kwargs.get("async_op", given))


def _move_buffers(module: torch.nn.Module, move: Callable, recurse: bool = True) -> torch.nn.Module:
    for buffers in (each._buffers for each in module.modules()):
        for name, buffer in buffers.items():
            buffers[name] = None if buffer is None else move(buffer)
    return module


def place() -> str:
    """Return the innermost line of ours, `folder/file.py:line`, that is being run."""
    frame: FrameType | None = sys._getframe(1)
    here = (__file__, str(Path(__file__).with_name("fake_gpu.py")))
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OURS) and file not in here:
            return f"{Path(file).relative_to(_OURS)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class Memory:
    """The bytes of live tensors on the device, now and at most."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, unless it is counted already."""
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._forget, key)
            self.resized(storage)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Count the bytes that a storage has now; one that is not known is not counted."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            self.now += size - self._sizes[key]
            self._sizes[key] = size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@contextmanager
def resizing(memory: Memory) -> Iterator[None]:
    """Let `memory` learn of storages that are emptied and filled again, as FSDP2 does with gathered weights."""
    resize = torch.UntypedStorage.resize_

    def counted(storage: torch.UntypedStorage, size: int) -> Any:
        done = resize(storage, size)
        memory.resized(storage)
        return done

    torch.UntypedStorage.resize_ = counted  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
