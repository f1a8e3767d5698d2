"""Time and memory of the contrastive loss with its gradients, on unit vectors in memory."""

import ctypes
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from flipscale.benchmarks.peer import require_open_clip
from flipscale.benchmarks.step import device_name, matmul_peak, timed
from flipscale.objectives.contrastive import contrastive_loss

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Matrix products of 2 n^2 dim operations: ours makes the logits twice and takes two gradients from them; autograd on
# `ClipLoss` makes them for each direction and takes two gradients from each.
PRODUCTS = {"flipscale": 4, "open_clip": 6}


@dataclass(frozen=True)
class LossSetting:
    """What is measured.

    Args:
        n: pairs.
        dim: width of the embeddings.
        scale: inverse temperature.
        steps: how often it is timed; the median counts.
        code: `flipscale` or `open_clip`.
    """

    n: int = 16384
    dim: int = 512
    scale: float = 1 / 0.07
    steps: int = 5
    code: str = "flipscale"

    def __post_init__(self) -> None:
        for name in ("n", "dim", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def flops(self) -> int:
        """Operations of the matrix products that the code takes, forward and backward."""
        return 2 * PRODUCTS[self.code] * self.n**2 * self.dim


def open_clip_loss() -> Loss:
    """open_clip's `ClipLoss`.

    Raises:
        ValueError: open_clip is not installed.
    """
    require_open_clip()
    from open_clip.loss import ClipLoss

    return ClipLoss()


def measure_loss(setting: LossSetting) -> dict[str, Any]:
    """Figures of one loss, ready for JSON: `seconds` forward and backward, `extra_peak_bytes` above the embeddings
    while it runs for the first time, gradients counted, `flops`, `share_of_matmul_peak` and `loss`.

    The allocator is as it comes: on a CPU, what is large and freed goes back to the system and is cleared anew. A
    trainer's process keeps it (`flipscale.engines.launch`), which helps the code that takes more.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loss = contrastive_loss if setting.code == "flipscale" else open_clip_loss()
    run_once(loss, inputs(64, setting, device))
    held = inputs(setting.n, setting, device)
    before = forget_peak_memory(device)
    value = run_once(loss, held)
    extra = peak_memory_bytes(device) - before
    peak_flops = matmul_peak(device, "fp32")
    seconds = statistics.median(timed(lambda: run_once(loss, held), device)[0] for _ in range(setting.steps))
    return {
        **asdict(setting),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": seconds,
        "extra_peak_bytes": extra,
        "flops": setting.flops,
        "matmul_peak_flops": peak_flops,
        "share_of_matmul_peak": setting.flops / seconds / peak_flops,
        "loss": value,
    }


def inputs(n: int, setting: LossSetting, device: torch.device) -> list[torch.Tensor]:
    """Images, texts and the scale, all to be given gradients; a text has a cosine of about 0.45 with its image."""
    images, texts = torch.randn(2, n, setting.dim, generator=torch.Generator().manual_seed(0))
    texts = images + 2.0 * texts
    embeds = [normalize(side, dim=1).to(device).requires_grad_() for side in (images, texts)]
    return [*embeds, torch.tensor([setting.scale], device=device, requires_grad=True)]


def run_once(loss: Loss, held: list[torch.Tensor]) -> float:
    """The loss; leaves its gradients on none of `held`."""
    value = loss(*held)
    value.backward()
    for tensor in held:
        tensor.grad = None
    return value.item()


def forget_peak_memory(device: torch.device) -> int:
    """The bytes in use, above which `peak_memory_bytes` finds the peak from now on.

    Raises:
        ValueError: neither a GPU nor Linux.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not Path("/proc/self/clear_refs").exists():
        raise ValueError("the loss's peak memory is measured on a GPU or on Linux only")
    # What was freed before would be taken again and not be seen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_bytes(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that tensors held on a GPU; on a CPU the most that was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def compare_losses(sizes: list[int], dims: list[int], steps: int) -> Iterator[dict[str, Any]]:
    """Our loss and open_clip's, each measured in a process of its own: our figures, with open_clip's as `open_clip_*`,
    `time_ratio` (ours to theirs) and `memory_ratio` (theirs to ours).

    Raises:
        ValueError: open_clip is not installed.
        OSError: a measurement failed, e.g. for want of memory.
    """
    require_open_clip()
    for dim in dims:
        for n in sizes:
            ours, theirs = (_measure_apart(LossSetting(n, dim, steps=steps, code=code)) for code in PRODUCTS)
            yield {
                **ours,
                **{f"open_clip_{name}": theirs[name] for name in ("seconds", "extra_peak_bytes", "loss")},
                "open_clip_share_of_matmul_peak": theirs["share_of_matmul_peak"],
                "time_ratio": ours["seconds"] / theirs["seconds"],
                "memory_ratio": theirs["extra_peak_bytes"] / ours["extra_peak_bytes"],
            }


def _measure_apart(setting: LossSetting) -> dict[str, Any]:
    flags = ["--n", setting.n, "--dim", setting.dim, "--steps", setting.steps, "--threads", torch.get_num_threads()]
    flags += ["--peer", setting.code] if setting.code != "flipscale" else []
    command = [sys.executable, "-m", "flipscale.cli", "bench", "loss", "--json", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message: out of memory?"]
        raise OSError(f"{setting.code} at n {setting.n}, dim {setting.dim} ended with {done.returncode}: {said[-1]}")
    return json.loads(done.stdout)
