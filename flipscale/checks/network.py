"""NCCL: its set-up, and the bandwidth of collectives at the sizes of a step."""

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from flipscale.checks.findings import Bench
from flipscale.checks.group import Row
from flipscale.checks.kernels import seconds_of
from flipscale.engines.device import wait_for
from flipscale.engines.optimizers import encoder_blocks, num_trained
from flipscale.engines.start import start_accelerator
from flipscale.planning.memory import trained_model
from flipscale.training.recipe import parse_recipe

_BUCKET_BYTES = 25 * 2**20
_TIMES = 10


def collectives(recipe: str, batch_size: int, folder: str) -> Iterator[Row]:
    """Collective. Yield the seconds until the first message has arrived, then the bandwidth of a step's messages.

    Bandwidths are NCCL's bus bandwidths: bytes that a process sends, as if around a ring.
    """
    import accelerate  # noqa: F401  # its import is no part of the set-up

    start = time.perf_counter()
    device = start_accelerator([], folder).device
    dist.all_reduce(torch.ones(1, device=device))
    wait_for(device)
    yield {"setup_s": time.perf_counter() - start}
    planned = parse_recipe(["--config", recipe])
    model, world = trained_model(planned), dist.get_world_size()
    block = max(num_trained(block) for block in encoder_blocks(model))
    texts = batch_size * world * int(planned.model_config().projection_dim or 0)
    # Name, dtype, elements of the whole message.
    for name, dtype, size in (
        ("all_reduce a bucket", torch.float32, _BUCKET_BYTES // 4),
        ("all_reduce gradients", torch.float32, num_trained(model)),
        ("all_gather a block", torch.bfloat16, block),
        ("reduce_scatter a block", torch.float32, block),
        ("all_gather texts", torch.float32, texts),
    ):
        whole = torch.zeros(-(-size // world) * world, dtype=dtype, device=device)
        calls: dict[str, Callable[..., object]] = {
            "all_reduce": lambda whole, part: dist.all_reduce(whole),
            "all_gather": dist.all_gather_single,
            "reduce_scatter": lambda whole, part: dist.reduce_scatter_single(part, whole),
        }
        kind = name.split()[0]
        call = functools.partial(calls[kind], whole, whole[: len(whole) // world].clone())
        seconds = seconds_of(call, device, _TIMES)
        bus = (2 if kind == "all_reduce" else 1) * whole.nbytes * (world - 1) / world / seconds
        yield {"name": name, "bytes": whole.nbytes, "seconds": seconds, "bus_bytes_per_s": bus,
               "is_large": name in ("all_reduce gradients", "all_gather a block")}  # fmt: skip


def check_collectives(bench: Bench) -> None:
    """Report the set-up and the bandwidths of each recipe's messages."""
    bench.need_gpus(2)
    for recipe in bench.recipes:
        rows = bench.node.run(
            f"{__name__}:collectives", 180.0, bench.node.num_gpus, recipe=recipe, batch_size=bench.batch_size,
            folder=str(bench.node.folder),
        )  # fmt: skip
        setup = max(of_rank[0]["setup_s"] for of_rank in rows)
        found = rows[0][1:]
        bench.figures.setdefault("collectives", []).extend({"recipe": recipe, **row} for row in found)
        bench.figures["setup_s"] = max(setup, bench.figures.get("setup_s", 0.0))
        words = ", ".join(f"{row['name']} {row['bus_bytes_per_s'] / 1e9:.3g}" for row in found)
        bench.add(f"NCCL {Path(recipe).stem}", f"set up in {setup:.1f} s; GB/s: {words}")
