"""Properties of the device: the peak of each GPU by its data sheet, attention kernel, precision, and memory use."""

import ctypes
import functools
import logging
import os
import re
import resource
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch.nn.attention import SDPBackend

from flipscale.io.cores import decoding_workers
from flipscale.io.errors import UserError
from flipscale.process.state import set_defaults

_log = logging.getLogger(__name__)


class Gpu(NamedTuple):
    """A GPU by its maker's data sheet. The smallest and slowest card of a name counts.

    Args:
        teraflops: dense bf16 peak, in Tflop/s. TF32 has half of it.
        fp32_teraflops: fp32 peak outside of tensor cores, in Tflop/s.
        gib: memory in GiB.
        memory_gb_s: bandwidth of the memory in GB/s.
        processors: number of multiprocessors.
        node_gb_s, network_gb_s: `planning.time.Links` of nodes that are sold with these GPUs; 0 if they differ.
    """

    teraflops: float
    fp32_teraflops: float
    gib: int
    memory_gb_s: float
    processors: int
    node_gb_s: float = 0.0
    network_gb_s: float = 0.0


# By words of the device's name. The longest entry whose words all match counts. From the makers' data sheets and papers
# on GeForce, without sparsity. docs/planning.md has the sources of the links.
GPUS: dict[str, Gpu] = {
    "H100": Gpu(989, 67, 80, 3350, 132, 350, 46),
    "H100 PCIe": Gpu(756, 51, 80, 2000, 114),
    "H100 NVL": Gpu(835, 60, 94, 3900, 132),
    "H200": Gpu(989, 67, 141, 4800, 132, 350, 46),
    "H200 NVL": Gpu(835, 60, 141, 4800, 132),
    "GH200": Gpu(989, 67, 96, 4000, 132),
    "B200": Gpu(2250, 75, 180, 7700, 148),
    "MI300X": Gpu(1307, 163.4, 192, 5300, 304),
    "A100": Gpu(312, 19.5, 40, 1555, 108, 220),
    "A100 80GB": Gpu(312, 19.5, 80, 2039, 108, 220),
    "A100 PCIE": Gpu(312, 19.5, 40, 1555, 108),
    "A100 80GB PCIe": Gpu(312, 19.5, 80, 1935, 108),
    "A40": Gpu(149.7, 37.4, 48, 696, 84),
    "A10": Gpu(125, 31.2, 24, 600, 72),
    "A10G": Gpu(70, 31.2, 24, 600, 80),
    "L40S": Gpu(362, 91.6, 48, 864, 142),
    "L40": Gpu(181, 90.5, 48, 864, 142),
    "L4": Gpu(121, 30.3, 24, 300, 58),
    "RTX 6000 Ada": Gpu(364.2, 91.1, 48, 960, 142),
    "RTX A6000": Gpu(154.8, 38.7, 48, 768, 84),
    "RTX 5090": Gpu(209.5, 104.8, 32, 1792, 170),
    "RTX 5080": Gpu(112.6, 56.3, 16, 960, 84),
    "RTX 5070 Ti": Gpu(87.9, 44, 16, 896, 70),
    "RTX 5070": Gpu(61.7, 30.9, 12, 672, 48),
    "RTX 4090": Gpu(165.2, 82.6, 24, 1008, 128),
    "RTX 4080 SUPER": Gpu(104.4, 52.2, 16, 736, 80),
    "RTX 4080": Gpu(97.5, 48.8, 16, 717, 76),
    "RTX 4070 Ti SUPER": Gpu(88.2, 44.1, 16, 672, 66),
    "RTX 4070 Ti": Gpu(80.2, 40.1, 12, 504, 60),
    "RTX 4070 SUPER": Gpu(71, 35.5, 12, 504, 56),
    "RTX 4070": Gpu(58.3, 29.1, 12, 504, 46),
    "RTX 4060 Ti": Gpu(44.1, 22.1, 8, 288, 34),
    "RTX 4060": Gpu(30.2, 15.1, 8, 272, 24),
    "RTX 3090 Ti": Gpu(80, 40, 24, 1008, 84),
    "RTX 3090": Gpu(71, 35.5, 24, 936, 82),
    "RTX 3080 Ti": Gpu(68.2, 34.1, 12, 912, 80),
    "RTX 3080": Gpu(59.5, 29.8, 10, 760, 68),
    "RTX 3070": Gpu(40.6, 20.3, 8, 448, 46),
    "RTX 3060 Ti": Gpu(32.4, 16.2, 8, 448, 38),
    "RTX 3060": Gpu(25.5, 12.8, 12, 360, 28),
}


def gpu_named(name: str) -> str:
    """Return the maker's name of a GPU, such as `h100_pcie` or `4090`. Raise UserError if it is unknown."""
    known = {_short(one): one for one in GPUS}
    if _short(name) not in known:
        raise UserError(f"gpu is {name[:40]!r}; use one of {', '.join(one.lower().replace(' ', '_') for one in GPUS)}")
    return known[_short(name)]


def _short(name: str) -> str:
    return re.sub("nvidia|geforce|rtx|[^a-z0-9]", "", name.lower())


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the peak operations per second of matrix products at `precision` (`bf16` or `no`), None if unknown.

    A GPU's peak comes from its data sheet; a CPU's is measured.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cpu":
        return fastest_product(device, dtype, sides=(1024,), times=2)
    if device.type != "cuda" or precision != "bf16" or (name := gpu_here(device)) is None:
        return None
    return 1e12 * GPUS[name].teraflops


def gpu_here(device: torch.device) -> str | None:
    """Return the name in `GPUS` of a GPU of this machine, None if it is unknown."""
    words = set(re.split("[ -]", torch.cuda.get_device_name(device)))
    if words & {"Laptop", "MIG", "D"}:  # slower than the card of this name, such as a slice of it (MIG)
        return None
    names = [name for name in GPUS if words.issuperset(name.split())]
    return max(names, key=lambda name: name.count(" "), default=None)


def fastest_product(device: torch.device, dtype: torch.dtype, sides: tuple[int, ...], times: int = 5) -> float:
    """Return the operations per second of the fastest of a few square matrix products.

    A product of a second or more ends the search: a CPU that must emulate `dtype` takes minutes for the rest.
    """
    fastest = 0.0
    for side in sides:
        matrix = torch.randn(side, side, device=device).to(dtype)
        for _ in range(times):
            wait_for(device)
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            wait_for(device)
            seconds = time.perf_counter() - start
            fastest = max(fastest, 2 * side**3 / seconds)
            if seconds >= 1.0:
                return fastest
    return fastest


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of tensors on a GPU so far; on a CPU, of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def best_attention(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """Return the transformers attention implementation that trains fastest on `device` with products in `dtype`.

    In bf16 on CPUs two plain matrix products beat the fused kernel. Its backward pass takes 7 times as long at the 50
    tokens of B/16 with a 75 % mask. On GPUs `sdpa` chooses, see `attention_kernel`.
    """
    return "eager" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"


def succeeds(attempt: Callable[[], object], problem: str, fix: str) -> bool:
    """Return whether an attempt on a GPU works. If not, one process of each node logs the problem and the fix."""
    try:
        attempt()
    except Exception as error:  # compilers, assemblers and drivers raise errors of any type
        if os.environ.get("LOCAL_RANK", "0") == "0":
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            _log.warning("%s (%s); %s", problem, reason, fix)
        return False
    return True


def share_compilers() -> None:
    """Give each process's compilers its part of the node's cores, because torch would start up to 32 for each GPU.

    The first compilation starts them, and a later call changes nothing. TORCHINDUCTOR_COMPILE_THREADS wins.
    """
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        from torch._inductor import config  # its import takes time

        config.compile_threads = min(decoding_workers(None), 32)


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile works on a GPU. If it does not, one process of each node logs why."""
    share_compilers()
    return succeeds(
        lambda: torch.compile(torch.nn.functional.gelu, dynamic=False)(torch.ones(64, device=device)),
        "blocks are not compiled, which is slower, because torch.compile fails",
        "to compile them, install a C compiler and the headers of this Python, or set model.compile to false",
    )


def choose_kernels() -> None:
    """Let torch choose kernels as training does. On Hopper it would prefer cuDNN's attention, which plans anew for the
    shapes of each stage and evaluation."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def set_up_gpu() -> None:
    """Set torch's allocator and flight recorder, before the first tensor and process group, where the environment does
    not set them."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Growing segments, because stages and evaluations allocate different sizes. Free parts of fixed segments would
        # be too small.
        # torch reads it at the first allocation on a GPU.
        set_defaults(PYTORCH_ALLOC_CONF="expandable_segments:True")
    # Number of collectives, which name the straggler of a slow or hung step. A step of H/14 has 260, each of its
    # micro-batches 130. TORCH_NCCL_ENABLE_TIMING=1 records their time on the GPU.
    set_defaults(TORCH_FR_BUFFER_SIZE="8192")


def attention_kernel(device: torch.device, bf16: bool, head_dim: int) -> str:
    """Return the kernel that torch chooses for attention in training, such as `flash_attention`."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    query = torch.empty(1, 1, 64, head_dim, dtype=dtype, device=device, requires_grad=True)
    return SDPBackend(torch._fused_sdp_choice(query, query, query)).name.lower()


def default_precision() -> Literal["no", "bf16"]:
    """Return the default precision of matrix products, in accelerate's words: bf16 on a GPU that has it, else `no`.

    On CPUs it is always fp32, so that a recipe learns the same on each. Only AMX or AVX-512's bf16 make bf16 faster.
    """
    return "bf16" if torch.cuda.is_available() and is_faster_in_bf16() else "no"


def is_faster_in_bf16() -> bool:
    """Return whether the device multiplies matrices faster in bf16 than in fp32. A GPU is asked, a CPU measured."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)

    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    # The dtypes alternate, so that other work on the machine slows both. The first turn starts the threads.
    for turn in range(8):
        for dtype in best:
            matrix = torch.ones(512, 512, dtype=dtype)
            start = time.perf_counter()
            matrix @ matrix
            if turn:
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.bfloat16] < 0.8 * best[torch.float32]


def keep_freed_memory() -> None:
    """Set glibc to keep freed memory for the next step. No effect with a preloaded allocator.

    Otherwise every large activation is mapped and unmapped, and page faults take a fifth of a CPU step.
    """
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
    mallopt(top_pad, 2**28)
