"""Time and memory of the contrastive loss and its gradients, measured on random unit vectors."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import normalize

from flipscale.benchmarks.memory import forget_peak_memory, peak_memory_since
from flipscale.benchmarks.peer import require_open_clip
from flipscale.benchmarks.step import device_label, matmul_peak, timed
from flipscale.io.errors import UserError
from flipscale.objectives.contrastive import contrastive_loss

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Matrix products of 2 n^2 dim operations. Ours computes the logits twice and two gradients. `ClipLoss` with autograd
# computes the logits and two gradients for each of the two directions.
PRODUCTS = {"flipscale": 4, "open_clip": 6}


@dataclass(frozen=True)
class LossSetting:
    """What is measured.

    Args:
        n: pairs.
        dim: width of the embeddings.
        scale: inverse temperature.
        steps: how often it is timed; the result is the median.
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
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def flops(self) -> int:
        """Operations of the matrix products, forward and backward."""
        return 2 * PRODUCTS[self.code] * self.n**2 * self.dim


def open_clip_loss() -> Loss:
    """Return open_clip's `ClipLoss`.

    Raises:
        ValueError: open_clip is not installed.
    """
    require_open_clip()
    from open_clip.loss import ClipLoss

    return ClipLoss()


def measure_loss(setting: LossSetting) -> dict[str, Any]:
    """Return the figures of one loss, ready for JSON.

    `seconds` are of forward and backward. `extra_peak_bytes` is the peak of the first run above what the embeddings
    take, gradients included. The allocator is left at its defaults: on a CPU, large blocks that are freed go back to
    the system and are cleared when they are allocated again. A trainer's process keeps them
    (`flipscale.engines.launch`), which helps the code that allocates more.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loss = contrastive_loss if setting.code == "flipscale" else open_clip_loss()
    run_once(loss, inputs(64, setting, device))
    held = inputs(setting.n, setting, device)
    before = forget_peak_memory(device)
    value = run_once(loss, held)
    extra = peak_memory_since(device) - before
    peak_flops = matmul_peak(device, "fp32")
    seconds = statistics.median(timed(lambda: run_once(loss, held), device)[0] for _ in range(setting.steps))
    return {
        **asdict(setting),
        "device": device_label(device),
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
    """Return image and text embeddings and the scale, all of which require gradients.

    The cosine of a text with its image is about 0.45.
    """
    images, texts = torch.randn(2, n, setting.dim, generator=torch.Generator().manual_seed(0))
    texts = images + 2.0 * texts
    embeds = [normalize(side, dim=1).to(device).requires_grad_() for side in (images, texts)]
    return [*embeds, torch.tensor([setting.scale], device=device, requires_grad=True)]


def run_once(loss: Loss, held: list[torch.Tensor]) -> float:
    """Return the loss after one forward and backward pass, the gradients of `held` cleared."""
    value = loss(*held)
    value.backward()
    for tensor in held:
        tensor.grad = None
    return value.item()


def compare_losses(sizes: list[int], dims: list[int], steps: int) -> Iterator[dict[str, Any]]:
    """Measure our loss and open_clip's, each in a process of its own, and yield the figures of each size.

    They are ours, with open_clip's as `open_clip_*`, `time_ratio` (ours over theirs) and `memory_ratio` (theirs over
    ours).

    Raises:
        ValueError: open_clip is not installed.
        OSError: a measurement failed, for example because memory ran out.
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
