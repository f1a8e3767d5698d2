"""A GPU that is not there: tensors with a device and shapes, but no content, on which the code of GPUs runs anywhere.

torch's fake tensors say that they are on `cuda`, and every kernel that picks itself by the device, autocast's rules
among them, does as it would there. What torch asks a driver for is answered here.
"""

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType, SimpleNamespace
from typing import Any, ClassVar, cast
from unittest.mock import MagicMock, patch

import numpy as np
import torch
import torch.distributed as dist
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import _engine_run_backward  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel, distributed
from torch.utils._python_dispatch import TorchDispatchMode

# The fourth of the machine's: what names no device lands on the first, and is seen.
DEVICE = torch.device("cuda", 3)
NUM_DEVICES = int(os.environ.get("SIMULATED_GPUS", "8"))
_META = torch.device("meta")
_CPU, _CUDA = 0, 1  # of c10::DeviceType
_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry

# At an address that no bus has.
_PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    total_memory=80 * 2**30,
    major=9,
    minor=0,
    multi_processor_count=132,
    uuid="3",
    pci_domain_id=0xFFFF,
    pci_bus_id=0,
    pci_device_id=0,
)

# What the mode is told of a host that waits for the device: what the host asks for.
Waits = Callable[[str], None]


class Devices(threading.local):
    """The current device and stream of each thread, which begins on the first device, and the devices ever touched."""

    touched: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        self.current = 0
        self.streams: dict[int, _Done] = {}

    def choose(self, device: Any) -> None:
        """Do as `torch.cuda.set_device`, which makes a context on the device, and refuses one without a number."""
        if not isinstance(device, int) and device.index is None:
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
        self.current = self.touch(device)

    def touch(self, device: Any = None) -> int:
        """Return the index of a device, by default the thread's, and remember that it was touched."""
        index = device if isinstance(device, int) else getattr(device, "index", None)
        index = self.current if index is None else index
        self.touched.add(index)
        return index

    def stream(self, waits: Waits, device: Any = None) -> "_Done":
        """Return the thread's current stream on a device."""
        index = self.touch(device)
        return self.streams.setdefault(index, _Done("Stream", waits, index))

    @contextmanager
    def on_stream(self, waits: Waits, stream: "_Done | None") -> Iterator[None]:
        """Do as `torch.cuda.stream`: on exit, the thread's own device and its stream are set again."""
        if stream is None:
            yield
            return
        before = (self.current, self.stream(waits), self.stream(waits, stream.device))
        self.current = self.touch(stream.device)
        self.streams[self.current] = stream
        try:
            yield
        finally:
            index, outer, inner = before
            self.streams[self.current] = inner
            self.choose(index)
            self.streams[index] = outer


class _Done:
    """A stream or an event whose work is done as soon as it is queued.

    `seen` are the numbers of the messages before it, on a real GPU too: those of its stream, and of all that it waited
    for.
    """

    def __init__(self, kind: str, waits: Waits, index: int = DEVICE.index):
        self._kind, self._waits = kind, waits
        self.device = torch.device("cuda", index)
        self.seen: frozenset[int] = frozenset()

    def wait_stream(self, stream: "_Done") -> None:
        self.seen |= stream.seen

    def wait_event(self, event: "_Done") -> None:
        self.seen |= event.seen

    def wait(self, stream: Any = None) -> None:
        (stream or torch.cuda.current_stream()).wait_event(self)

    def record_event(self, event: "_Done | None" = None) -> "_Done":
        return (event or _Done("Event", self._waits)).record(self)

    def record(self, stream: Any = None) -> "_Done":
        self.seen = (stream or torch.cuda.current_stream()).seen
        return self

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Done") -> float:
        return 1e4  # milliseconds of every step

    def synchronize(self) -> None:
        self._waits(f"{self._kind}.synchronize")


def _fused_attention(calls: list[tuple[torch.dtype, int, bool]] | None) -> Callable[..., torch.Tensor]:
    """Return a `scaled_dot_product_attention` that takes the kernel that a GPU would take: torch, without one, takes
    the kernel's parts. Each call appends `(dtype, head_dim, has_mask)` to `calls`."""
    aten = torch.ops.aten

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **options: Any,
    ) -> torch.Tensor:
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        if calls is not None:
            calls.append((query.dtype, query.shape[-1], attn_mask is not None))
        if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0:
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        mask = None if attn_mask is None else attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, query.requires_grad, dropout_p, is_causal, scale=scale
        )[0]

    return attend


class OnDevice(TorchDispatchMode):
    """Lets autograd's engine, which is C++ and asks for the GPU's streams, take the tensors for ones without any."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch.compile trace without this mode; it sees what the graph then does."""
        return True

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return _META if _asked_by_engine(sys._getframe(1)) else func(*args, **kwargs)
        if kwargs.get("device") == _META and _asked_by_engine(sys._getframe(1)):
            kwargs["device"] = DEVICE  # what a derivative makes like a tensor that it took for one of `meta`
        return func(*args, **kwargs)


_WRAPPERS = ("__torch_dispatch__", "_fn", "inner", "dispatch", "wrapper", "device_of")


def _asked_by_engine(frame: FrameType | None) -> bool:
    """Return whether C++ called the mode from inside the engine; between them are only torch's wrappers."""
    while frame is not None and frame.f_code.co_name in _WRAPPERS:
        frame = frame.f_back
    return frame is not None and frame.f_code is _engine_run_backward.__code__


@contextmanager
def fake_gpu(waits: Waits, attention: list[tuple[torch.dtype, int, bool]]) -> Iterator[FakeTensorMode]:
    """Let torch think that this process has a GPU, and yield the mode in which tensors are made on it.

    Args:
        waits: called where the host waits for a stream, an event or the device.
        attention: gets `(dtype, head_dim, has_mask)` of every call of the fused attention.
    """
    devices = Devices()
    devices.touched.clear()
    cuda: dict[str, Any] = {
        # Asked by accelerate, by FSDP2, and by autocast, which is off where there is no GPU.
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: NUM_DEVICES,
        "current_device": lambda: devices.current,
        "set_device": devices.choose,
        "get_device_name": lambda *_: _PROPERTIES.name,
        "get_device_properties": lambda *_: _PROPERTIES,
        "_lazy_init": lambda: None,
        # FSDP2 copies and exchanges on streams of its own; the feeder does, too.
        "Stream": lambda device=None, **_: _Done("Stream", waits, devices.touch(device)),
        "Event": lambda *_, **__: _Done("Event", waits),
        "current_stream": functools.partial(devices.stream, waits),
        "default_stream": lambda device=None: _Done("Stream", waits, devices.touch(device)),
        "stream": functools.partial(devices.on_stream, waits),
        "synchronize": lambda *_: waits("torch.cuda.synchronize"),
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
    }
    with ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        # Nothing of the driver is asked, although a GPU seems to be there.
        stack.enter_context(patch.object(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(patch.object(torch.accelerator, "current_stream", cuda["current_stream"]))
        # accelerate asks torch.cuda, and from 1.16 on this function of its own.
        found = lambda *_, **__: ("cuda", torch.cuda)  # noqa: E731
        stack.enter_context(patch("accelerate.state.get_torch_accelerator_backend", found, create=True))
        attend = torch.compiler.allow_in_graph(_fused_attention(attention))
        stack.enter_context(patch.object(torch.nn.functional, "scaled_dot_product_attention", attend))
        stack.enter_context(patch.object(FakeTensor, "tolist", _tolist(waits)))
        # DDP compares the parameters' shapes with those of process 0, by their values.
        stack.enter_context(patch.object(distributed, "_verify_param_shape_across_processes", lambda *_, **__: None))
        stack.enter_context(_device_guard())
        # One thread: the engine has none for a GPU that is not there.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def traced_by_dynamo() -> Iterator[list[torch.fx.GraphModule]]:
    """Let `Module.compile` trace inside `fake_gpu`, run its graphs uncompiled, and append them to the yielded list."""
    graphs: list[torch.fx.GraphModule] = []
    compile_module = torch.nn.Module.compile

    def run_uncompiled(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    def traced(module: torch.nn.Module, **options: Any) -> None:
        compile_module(module, backend=run_uncompiled, **options)

    # Made once, of functions that must not yet be replaced by those of a fake GPU.
    TorchInGraphFunctionVariable._get_handlers()
    with (
        patch.object(torch.nn.Module, "compile", traced),
        patch.object(torch.cuda, "get_rng_state", torch.get_rng_state),
        patch.object(torch.cuda, "set_rng_state", torch.set_rng_state),
    ):
        yield graphs
    torch._dynamo.reset()


def _tolist(waits: Waits) -> Callable[[FakeTensor], Any]:
    """Return a `tolist` that waits once for all of a tensor's numbers, which are 0."""
    tolist = FakeTensor.tolist

    def read(tensor: FakeTensor) -> Any:
        if tensor.device.type != "cuda":
            return tolist(tensor)
        waits("tolist")
        return np.zeros(tuple(tensor.shape), float if tensor.is_floating_point() else int).tolist()

    return read


_make_ddp = DistributedDataParallel.__init__


def visible_ddp(ddp: DistributedDataParallel, *arguments: Any, **options: Any) -> None:
    """Make DDP exchange gradients by a call that is seen; its own wants a result that the fake group does not have."""
    _make_ddp(ddp, *arguments, **options)

    def exchange(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer().div_(group.size())
        dist.all_reduce(buffer, group=group)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(buffer)
        return done

    ddp.register_comm_hook(ddp.process_group, exchange)
    # The logger wants a GPU's timers.
    ddp.reducer, ddp.logger = cast(Any, _Reducer(ddp.reducer)), MagicMock()


class _Reducer:
    """DDP's reducer with the one bucket that it begins with. After a step it would read from process 0 in which order
    the gradients came, and make buckets of 1 and 25 MiB in that order: more messages, of as many bytes."""

    def __init__(self, reducer: Any):
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


@contextmanager
def _device_guard() -> Iterator[None]:
    """Give torch a guard that does nothing where it has none for CUDA; in a build with CUDA, FakeTensorMode does."""
    library = next(
        path
        for name in ("libc10.so", "libc10.dylib")
        if os.path.exists(path := os.path.join(os.path.dirname(torch.__file__), "lib", name))
    )
    guards = (ctypes.c_void_p * (_CUDA + 1)).in_dll(ctypes.CDLL(library), _GUARDS)
    missing = guards[_CUDA] is None
    if missing:
        guards[_CUDA] = guards[_CPU]
    try:
        yield
    finally:
        if missing:
            guards[_CUDA] = cast(Any, None)
