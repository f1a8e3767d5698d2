"""Compile a model's blocks for a GPU that is not there, as `model.compile` does, and print what was made as JSON.

    PYTHONPATH=.:tests python -m simulated.inductor l16 0.75 90

The arguments are a size, a mask ratio, a compute capability, and perhaps `recompute`. torch.compile traces the blocks
on fake tensors of `cuda` under autocast, forward and backward. Inductor writes the kernels, Triton compiles all their
candidates, and ptxas assembles them. Questions to a GPU's driver are answered here. Run it in its own process, because
nothing is put back.

A build of torch with CUDA asks the driver from C++ too. It needs the library of `without_accelerator` before it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from simulated import fake_gpu
from simulated.fake_gpu import DEVICE, NUM_DEVICES
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor

from benchmarks.step_times import StepSetting, flip_batch
from flipscale.engines.first_weights import compile_blocks
from flipscale.model import FlipConfig, FlipModel

_PAIRS = 256
_SHARED_MEMORY = 227 * 1024  # bytes that one program may have on an H100, by NVIDIA's tuning guide


@dataclass(frozen=True)
class Program:
    """A candidate of a kernel, assembled.

    Args:
        size: bytes of the cubin.
        stack: bytes of each thread's stack, where spilled registers are.
    """

    name: str
    size: int
    registers: int
    stack: int


@dataclass
class Graph:
    """A block's forward or backward pass.

    Args:
        tokens: shape of the block's input in the forward pass.
        launches: calls of Triton kernels.
        products: matrix products, which cuBLAS computes.
        others: other operations that torch computes itself.
    """

    backward: bool
    tokens: list[int]
    launches: int
    products: int
    others: list[str]
    programs: list[Program] = field(default_factory=list)


class Seeds(torch.Generator):
    """A generator of random numbers on a GPU."""

    device = DEVICE

    def clone_state(self) -> "Seeds":
        return self


def without_accelerator(folder: Path) -> dict[str, str]:
    """Return the environment in which the autograd engine of a torch with CUDA asks no driver for streams.

    The engine is C++ and asks torch for the accelerator. The library answers that there is no accelerator.
    """
    if torch.version.cuda is None:
        return {}
    source, library = folder / "without_accelerator.c", folder / "without_accelerator.so"
    # at::accelerator::getAccelerator(bool), which returns an empty std::optional of one byte.
    source.write_text("short _ZN2at11accelerator14getAcceleratorEb(_Bool checked) { return 0; }\n")
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-o", library, source], check=True)
    return {"LD_PRELOAD": str(library)}


def pretend(capability: int, assembled: list[Program]) -> None:
    """Let torch and Triton think that there is a GPU; `assembled` gets each program that would be loaded on it."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from triton import runtime
    from triton.backends.compiler import GPUTarget

    # Of an H100.
    properties = SimpleNamespace(**vars(fake_gpu._PROPERTIES))
    vars(properties).update(
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=132,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block_optin=_SHARED_MEMORY,
        L2_cache_size=50 * 2**20,
        gcnArchName="",  # of AMD's GPUs, asked of all
    )
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: NUM_DEVICES,
        "current_device": lambda: DEVICE.index,
        "set_device": lambda device: None,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: divmod(capability, 10),
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda *_: None,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "_exchange_device": lambda device: device,
        "_maybe_exchange_device": lambda device: device,
    }
    compiler_only = {
        "get_compute_capability": lambda *_: capability,
        "get_raw_stream": lambda device: 0,
        "exchange_device": answers["_exchange_device"],
        "maybe_exchange_device": answers["_maybe_exchange_device"],
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    for name, answer in (answers | compiler_only).items():
        if hasattr(CudaInterface, name):
            setattr(CudaInterface, name, staticmethod(answer))
    for name in ("get_device_properties", "current_device", "set_device"):
        setattr(CudaInterface.Worker, name, staticmethod(answers[name]))
    # Recomputation keeps the state of each device's generator.
    torch.cuda.default_generators = tuple(Seeds() for _ in range(NUM_DEVICES))
    torch.accelerator.is_available = lambda: False  # type: ignore[assignment]  # its streams are not traced
    if torch.version.cuda is None:
        torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]  # imported by the code

    def load_binary(name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, ...]:
        registers, stack = resources(cubin)
        assembled.append(Program(name, len(cubin), registers, stack))
        return object(), object(), registers, stack, properties.max_threads_per_block

    triton_helpers.set_driver_to_gpu = lambda: None  # type: ignore[assignment]
    runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: DEVICE.index,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            launcher_cls=lambda source, metadata: lambda *arguments: None,
            get_device_capability=answers["get_device_capability"],
            get_device_interface=lambda: torch.cuda,
            get_benchmarker=lambda: None,
            utils=SimpleNamespace(
                load_binary=load_binary,
                unload_module=lambda module: None,
                get_device_properties=lambda device: {"max_shared_mem": _SHARED_MEMORY, "warpSize": 32},
            ),
        )
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers and the bytes of stack of each thread of a program."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return int(registers), int(stack)


def record(graphs: list[Graph], assembled: list[Program]) -> None:
    """Let torch.compile append each graph to `graphs`, and compute with the traced operations, on fake tensors."""
    from torch._inductor import compile_fx, config

    config.compile_threads = 1
    config.force_disable_caches = True
    # It would load programs by CUDA's driver.
    config.use_static_triton_launcher = False
    torch._functorch.config.force_non_lazy_backward_lowering = True
    compile_graph, compile_all = compile_fx.compile_fx_inner, compile_fx.compile_fx

    def lower(module: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        begin = len(assembled)
        source = compile_graph(module, inputs, **options).source_code
        calls = source[source.index("def call(") :]
        operations = re.findall(r"(?:extern_kernels|torch\.ops\.\w+)\.(\w+)(?:\.\w+)?\(", calls)
        products = [name for name in operations if name in ("mm", "addmm", "bmm", "baddbmm")]
        values = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
        shapes = [list(value.shape) for value in values if isinstance(value, torch.Tensor)]
        graphs.append(
            Graph(
                backward=bool(options.get("is_backward")),
                tokens=next(shape for shape in shapes if len(shape) == 3),
                launches=calls.count(".run("),
                products=len(products),
                others=sorted(set(operations) - set(products)),
                programs=assembled[begin:],
            )
        )
        run = lambda arguments: module(*arguments)  # noqa: E731
        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def compile_for_gpu(module: Any, inputs: Any, **options: Any) -> Any:
        with OnDevice():
            return compile_all(module, inputs, inner_compile=lower, **options)

    compile_fx.compile_fx = compile_for_gpu


class OnDevice(fake_gpu.OnDevice):
    """Does the same for tensors that are traced: they tell the engine their device without asking anybody."""

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return device_of(*args)
        return super().__torch_dispatch__(func, types, args, kwargs)


def device_of(tensor: torch.Tensor) -> torch.device:
    """Return the device of a fake tensor that is being traced; for the engine, `meta`."""
    if fake_gpu._asked_by_engine(sys._getframe(1)):
        return fake_gpu._META
    while isinstance(tensor, FunctionalTensor):
        tensor = torch._from_functional_tensor(tensor.elem)
    return tensor.fake_device if isinstance(tensor, fake_tensor.FakeTensor) else tensor.device


def ask_for_devices() -> None:
    """Let traced tensors ask Python for their device."""
    make_wrapper = torch.Tensor._make_wrapper_subclass

    def make(cls: type, *arguments: Any, **options: Any) -> Any:
        if cls is FunctionalTensor:
            arguments = (*arguments[:10], True, *arguments[11:])  # dispatch_device
        return make_wrapper(cls, *arguments, **options)

    torch.Tensor._make_wrapper_subclass = make  # type: ignore[method-assign,assignment]
    fake_tensor._DISPATCH_META_HANDLERS[torch.ops.prim.device.default] = lambda args: device_of(*args)


def lower_blocks(size: str, mask_ratio: float, capability: int, recomputes: bool) -> list[Graph]:
    """Return the graphs of a block of each tower at 256 pairs, all of whose programs were assembled."""
    graphs: list[Graph] = []
    assembled: list[Program] = []
    pretend(capability, assembled)
    record(graphs, assembled)
    ask_for_devices()
    FakeTensorMode.avoid_device_init = True
    torch.nn.functional.scaled_dot_product_attention = fake_gpu._fused_attention(
        None
    )  # dynamo refuses a list in recomputed code
    one_block = {"num_hidden_layers": 1}
    config = FlipConfig.from_size(size, one_block, one_block)
    one_thread = torch.autograd.set_multithreading_enabled(False)
    with fake_gpu._device_guard(), one_thread, FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(DEVICE):
            model = FlipModel(config).train()
            model.set_attn_implementation("sdpa")
            if recomputes:
                model.activation_checkpointing_enable()
            setting = StepSetting(config, size, mask_ratio, _PAIRS, device=DEVICE)
            batch = flip_batch(setting)
        compile_blocks(model)
        with setting.autocast():
            model(**batch, return_logits=False)
    return graphs


if __name__ == "__main__":
    made = lower_blocks(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), "recompute" in sys.argv[4:])
    print(json.dumps([asdict(graph) for graph in made]))
