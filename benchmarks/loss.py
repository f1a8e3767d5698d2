"""Measure time and memory of our contrastive loss and open_clip's, on random unit vectors.

    python benchmarks/loss.py --n 16384 32768 --dim 512 768

Each measurement has its own process, so that the memory of one does not show in the other.
"""

import argparse
import ctypes
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.step_times import Figures, device_label, matmul_peak, timed
from flipscale.objectives.contrastive import contrastive_loss

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Matrix products of 2 n^2 dim operations. Ours computes the logits twice and two gradients. `ClipLoss` with autograd
# computes the logits and two gradients for each of the two directions.
PRODUCTS = {"flipscale": 4, "open_clip": 6}
SCALE = 1 / 0.07  # inverse temperature


def measure_loss(code: str, n: int, dim: int, steps: int) -> Figures:
    """Return the figures of one loss, ready for JSON.

    `seconds` is the median of forward plus backward. `extra_peak_bytes` is the peak of the first run beyond the
    embeddings, gradients included. The allocator keeps its defaults: on a CPU, large freed blocks return to the system
    and are cleared at the next allocation. A training process keeps these blocks, which helps the code that allocates
    more.

    Args:
        code: `flipscale` or `open_clip`.
        n: pairs.
        dim: width of the embeddings.
        steps: timed runs.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loss = contrastive_loss if code == "flipscale" else open_clip_loss()
    run_once(loss, inputs(64, dim, device))
    embeds = inputs(n, dim, device)
    before = reset_peak_memory(device)
    value = run_once(loss, embeds)
    extra = peak_memory(device) - before
    peak_flops = matmul_peak(device, "fp32")
    seconds = statistics.median(timed(lambda: run_once(loss, embeds), device)[0] for _ in range(steps))
    flops = 2 * PRODUCTS[code] * n**2 * dim
    return {
        "code": code,
        "n": n,
        "dim": dim,
        "steps": steps,
        "device": device_label(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": seconds,
        "extra_peak_bytes": extra,
        "flops": flops,
        "matmul_peak_flops": peak_flops,
        "share_of_matmul_peak": flops / seconds / peak_flops,
        "loss": value,
    }


def open_clip_loss() -> Loss:
    """Return open_clip's `ClipLoss`."""
    from open_clip.loss import ClipLoss

    return ClipLoss()


def inputs(n: int, dim: int, device: torch.device) -> list[torch.Tensor]:
    """Return image embeddings, text embeddings and the scale, all with gradients. Matching pairs have cosine 0.45."""
    images, texts = torch.randn(2, n, dim, generator=torch.Generator().manual_seed(0))
    texts = images + 2.0 * texts
    embeds = [normalize(side, dim=1).to(device).requires_grad_() for side in (images, texts)]
    return [*embeds, torch.tensor([SCALE], device=device, requires_grad=True)]


def run_once(loss: Loss, embeds: list[torch.Tensor]) -> float:
    """Run forward and backward, clear the gradients, and return the loss."""
    value = loss(*embeds)
    value.backward()
    for tensor in embeds:
        tensor.grad = None
    return value.item()


def reset_peak_memory(device: torch.device) -> int:
    """Reset the peak that `peak_memory` returns, and return the bytes in use now. CPUs need Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    # Return the free heap to the system first, because reused heap would not count as new memory.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes since `reset_peak_memory`: of tensors on a GPU, of resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert match is not None
    return int(match[1]) * 1024


def compare_losses(n: int, dim: int, steps: int) -> Figures:
    """Return our figures, and open_clip's as `open_clip_*`.

    `time_ratio` is ours over theirs, `memory_ratio` theirs over ours.

    Raises:
        subprocess.CalledProcessError: a measurement failed, for example because memory ran out.
    """
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    for code, figures in (("flipscale", ours), ("open_clip", theirs)):
        flags = ["--code", code, "--n", n, "--dim", dim, "--steps", steps, "--threads", torch.get_num_threads()]
        command = [sys.executable, __file__, *map(str, flags)]
        figures.update(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
    names = ("seconds", "extra_peak_bytes", "loss", "share_of_matmul_peak")
    return {
        **ours,
        **{f"open_clip_{name}": theirs[name] for name in names},
        "time_ratio": ours["seconds"] / theirs["seconds"],
        "memory_ratio": theirs["extra_peak_bytes"] / ours["extra_peak_bytes"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a JSON line or a table row for each size, as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[16384, 32768], help="Pairs.")
    parser.add_argument("--dim", type=int, nargs="+", default=[512, 768], help="Widths of the embeddings.")
    parser.add_argument("--steps", type=int, default=5, help="Timed runs, after an untimed run.")
    parser.add_argument("--threads", type=int, help="CPU threads.")
    parser.add_argument("--code", choices=[*PRODUCTS], help="Measure this loss alone, and print JSON lines.")
    parser.add_argument("--json", action="store_true", help="Print JSON lines instead of a table.")
    args = parser.parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if not (args.json or args.code):
        print("| pairs | dim | flipscale | open_clip | time | flipscale, extra memory | open_clip | memory | of peak |")
        print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for dim in args.dim:
        for n in args.n:
            if args.code:
                print(json.dumps(measure_loss(args.code, n, dim, args.steps)), flush=True)
                continue
            row = compare_losses(n, dim, args.steps)
            print(json.dumps(row) if args.json else _table_row(row), flush=True)


def _table_row(row: Figures) -> str:
    mega = {name: float(row[name]) / 1e6 for name in ("extra_peak_bytes", "open_clip_extra_peak_bytes")}
    return (
        "| {n:,} | {dim} | {seconds:.2f} s | {open_clip_seconds:.2f} s | {time_ratio:.2f}x | "
        "{extra_peak_bytes:,.0f} MB | {open_clip_extra_peak_bytes:,.0f} MB | 1/{memory_ratio:.0f} | "
        "{share_of_matmul_peak:.0%} and {open_clip_share_of_matmul_peak:.0%} |"
    ).format(**{**row, **mega})


if __name__ == "__main__":
    main()
