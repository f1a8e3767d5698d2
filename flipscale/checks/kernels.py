"""Matrix products, attention, the loss's Triton kernels, and NCCL's collectives, at a model's own shapes."""

import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, logsigmoid, normalize, scaled_dot_product_attention

from flipscale.checks.machine import own_device
from flipscale.checks.node import OFF, Bench, Row
from flipscale.checks.timing import timed_steps
from flipscale.engines.build_engine import start_accelerator
from flipscale.engines.device import attention_kernel, wait_for
from flipscale.engines.optimizers import encoder_blocks, num_trained
from flipscale.model.patches import num_kept
from flipscale.objectives.build_objective import build_config
from flipscale.objectives.contrastive import contrastive_loss, triton_serves
from flipscale.objectives.sigmoid import sigmoid_loss
from flipscale.planning.memory import trained_model
from flipscale.start.complete_recipe import parse_recipe

_TIMES, _WARM_UP = 20, 3
_LOADED_PRODUCTS = 500
_BUCKET_BYTES, _LINK_BYTES = 25 * 2**20, 64 * 2**20
_LINK_TRIES = 3
_MASK_RATIOS = (0.75, 0.5)
_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_NAMES = [backend.name.lower() for backend in _BACKENDS]
# Largest difference from fp64, relative to the largest number. fp32 differs by 1e-6 to 1e-5.
LOSS_TOLERANCE = 1e-4
_INPUTS = ("images", "texts", "scale", "bias")
# A loss, values of its parameters, and its matrix products over all logits.
_LOSSES: tuple[tuple[str, Callable[..., torch.Tensor], tuple[float, ...], int], ...] = (
    ("infonce", contrastive_loss, (30.0,), 4),
    ("sigmoid", sigmoid_loss, (10.0, -10.0), 3),
)


class Tower(NamedTuple):
    """A tower's tokens of an image or a text, and its configuration."""

    name: str
    tokens: int
    config: Any


def towers(recipe: str, mask_ratios: tuple[float, ...]) -> list[Tower]:
    """Return the towers of a recipe's model, the image tower once for each mask ratio."""
    config = build_config(parse_recipe(["--config", recipe]))
    vision, text = config.vision_config, config.text_config
    kept = {ratio: num_kept(vision.num_patches, ratio) + vision.num_prefix_tokens for ratio in mask_ratios}
    images = [Tower(f"image {ratio:.0%}", tokens, vision) for ratio, tokens in kept.items()]
    return [*images, Tower("text", text.max_position_embeddings, text)]


def seconds_of(call: Callable[[], object], device: torch.device, times: int = _TIMES) -> float:
    """Return the seconds of a call, the mean of several that are queued one behind the other."""
    for _ in range(_WARM_UP):
        call()
    wait_for(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    wait_for(device)
    return (time.perf_counter() - start) / times


def products(recipe: str, batch_size: int) -> Iterator[Row]:
    """Yield the operations per second of the blocks' bf16 products, then the GPU's clock and energy during them."""
    device = own_device()
    for tower in towers(recipe, _MASK_RATIOS[1:]):
        rows, width, mlp = batch_size * tower.tokens, tower.config.hidden_size, tower.config.intermediate_size
        # Forward products of a block, and the weight gradient of the wide one, which sums over the rows.
        for m, k, n in (*((rows, width, to) for to in (3 * width, width, mlp)), (rows, mlp, width), (width, rows, mlp)):
            left = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            right = torch.randn(k, n, device=device, dtype=torch.bfloat16)
            seconds = seconds_of(lambda a=left, b=right: torch.mm(a, b), device)  # type: ignore[misc]
            yield {"tower": tower.name, "shape": [m, k, n], "flops_per_s": 2 * m * k * n / seconds}
    square = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    yield timed_steps(lambda: torch.mm(square, square), _LOADED_PRODUCTS, device)  # about a second


def attention(recipe: str, batch_size: int) -> Iterator[Row]:
    """Yield the milliseconds of attention, forward and backward, with each of torch's kernels."""
    device = own_device()
    torch.backends.cuda.enable_cudnn_sdp(False)  # as the trainer does
    for tower in towers(recipe, _MASK_RATIOS):
        heads = tower.config.num_attention_heads
        shape = (batch_size, heads, tower.tokens, head_dim := tower.config.hidden_size // heads)
        inputs = tuple(torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        gradient = torch.randn(shape, device=device, dtype=torch.bfloat16)

        def call(inputs: tuple[torch.Tensor, ...] = inputs, gradient: torch.Tensor = gradient) -> None:
            torch.autograd.grad(scaled_dot_product_attention(*inputs), inputs, gradient)  # type: ignore[arg-type]

        row: Row = {"tower": tower.name, "tokens": tower.tokens, "head_dim": head_dim, "absent": {}}
        row["used"] = attention_kernel(device, bf16=True, head_dim=head_dim)
        for backend, name in zip(_BACKENDS, _NAMES, strict=True):
            try:
                with sdpa_kernel(backend):
                    row[name] = 1e3 * seconds_of(call, device)
            except RuntimeError as error:
                row["absent"][name] = str(error).strip().splitlines()[0]
        yield row


def triton_losses(dim: int, batch_size: int) -> Iterator[Row]:
    """Yield the differences of each loss and its gradients from torch's in fp64, and the losses' speeds."""
    device = own_device()
    for kind, loss_of, parameters, products in _LOSSES:
        for pairs in (300, 16 * batch_size):  # 300 leaves incomplete tiles
            embeds = (normalize(torch.randn(pairs, dim, device=device), dim=1) for _ in range(2))
            inputs = [*embeds, *(torch.full((1,), value, device=device) for value in parameters)]
            exact = [tensor.double().requires_grad_() for tensor in inputs]
            expected = _in_fp64(*exact)
            found = loss_of(*(tensor.requires_grad_() for tensor in inputs))
            yield _difference(f"{kind} of {pairs} pairs", found, expected)
            for name, ours, theirs in zip(
                _INPUTS, torch.autograd.grad(found, inputs), torch.autograd.grad(expected, exact), strict=False
            ):
                yield _difference(f"gradient of the {name}, {kind} of {pairs} pairs", ours, theirs)
        seconds = seconds_of(lambda inputs=inputs, loss_of=loss_of: loss_of(*inputs), device, 5)  # type: ignore[misc]
        yield {"loss": kind, "flops_per_s": 2 * products * pairs**2 * dim / seconds}
    yield {"uses_triton": triton_serves(inputs[0])}


def _in_fp64(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
    """Return the sigmoid loss if there is a bias, else InfoNCE, `()`."""
    logits = scale * images @ texts.T
    if bias:
        return -logsigmoid((logits + bias[0]) * (2 * torch.eye(*logits.shape).to(logits) - 1)).sum() / len(logits)
    targets = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2


def _difference(result: str, found: torch.Tensor, expected: torch.Tensor) -> Row:
    return {"result": result, "difference": ((found.double() - expected).abs().max() / expected.abs().max()).item()}


def check_products(bench: Bench) -> None:
    """Report the speed of matrix products on all GPUs at once; GPUs must be equally fast."""
    for recipe in bench.recipes:
        rows = bench.run(products, bench.num_gpus, recipe=recipe, batch_size=bench.batch_size)
        speeds = [[row["flops_per_s"] for row in of_rank if "shape" in row] for of_rank in rows]
        means = [len(of_rank) / sum(1 / speed for speed in of_rank) for of_rank in speeds]
        slowest = min(range(len(means)), key=means.__getitem__)
        slow = [rank for rank, mean in enumerate(means) if mean < (1 - OFF) * max(means)]
        least = f"at least {means[slowest] / 1e12:.0f} Tflop/s, another {max(means) / 1e12:.0f}"
        faults = [f"slow: {bench.gpu_names(slow)}, {least}"] if slow else []
        clocks = sorted(row["mhz"] for of_rank in rows for row in of_rank if row.get("mhz"))
        bench.figures.setdefault("products", {})[recipe] = {"flops_per_s": means, "rows": rows[slowest]}
        bench.add(
            f"products {Path(recipe).stem}",
            f"{min(map(min, speeds)) / 1e12:.0f} to {max(map(max, speeds)) / 1e12:.0f} Tflop/s in bf16, mean "
            f"{sum(means) / len(means) / 1e12:.0f}" + (f"; {clocks[0]:.0f} to {clocks[-1]:.0f} MHz" if clocks else ""),
            faults,
        )


def check_attention(bench: Bench) -> None:
    """Report the speed of attention's kernels; the one that the trainer uses must be there."""
    for recipe in bench.recipes:
        (rows,) = bench.run(attention, recipe=recipe, batch_size=bench.batch_size)
        bench.figures.setdefault("attention", {})[recipe] = rows
        faults, texts = [], []
        for row in rows:
            times = {name: row[name] for name in row if name in _NAMES}
            for name in dict.fromkeys(("flash_attention", row["used"])):
                if name not in times:
                    reason = row["absent"].get(name, "torch chose no kernel")
                    faults.append(f"{name} is not there at {row['tokens']} tokens: {reason}")
            if times.get(row["used"], 0.0) > (1 + OFF) * min(times.values(), default=0.0):
                faults.append(f"{row['used']} is used at {row['tokens']} tokens and is not the fastest")
            best = (f"{name.split('_')[0]} {times[name]:.2f}" for name in sorted(times, key=times.__getitem__)[:3])
            texts.append(f"{row['tokens']} tokens {', '.join(best)}")
        used = rows[0]["used"].removesuffix("_attention")
        bench.add(f"attention {Path(recipe).stem}", f"ms, fastest first, {used} is used: {'; '.join(texts)}", faults)


def check_triton(bench: Bench) -> None:
    """Compare both losses in Triton with torch in fp64."""
    dim = int(build_config(parse_recipe(["--config", bench.recipes[0]])).projection_dim or 0)
    (rows,) = bench.run(triton_losses, dim=dim, batch_size=bench.batch_size)
    bench.figures["triton"] = rows
    # NaN is no match either.
    differences = {row["result"]: row["difference"] for row in rows if "result" in row}
    faults = [f"{result} off by {off:.1e}" for result, off in differences.items() if not off <= LOSS_TOLERANCE]
    faults += [] if rows[-1]["uses_triton"] else ["Triton is absent or fails, and torch's operations are slower"]
    speeds = [f"{row['loss']} {row['flops_per_s'] / 1e12:.1f} Tflop/s" for row in rows if "loss" in row]
    words = f"largest difference from fp64 {max(differences.values()):.1e}, {', '.join(speeds)}"
    bench.add("triton losses", words, faults)


def collectives(recipe: str, batch_size: int, folder: str) -> Iterator[Row]:
    """Collective. Yield the seconds until the first message has arrived, then the bandwidth of a step's messages.

    Bandwidths are NCCL's bus bandwidths: bytes that a process sends, as if around a ring.
    """
    import accelerate  # noqa: F401  # its import is not a part of the set-up

    start = time.perf_counter()
    device = start_accelerator([], folder).device
    dist.all_reduce(torch.ones(1, device=device))
    wait_for(device)
    yield {"setup_s": time.perf_counter() - start}
    planned = parse_recipe(["--config", recipe])
    model, world = trained_model(planned), dist.get_world_size()
    block = max(num_trained(block) for block in encoder_blocks(model))
    texts = batch_size * world * int(build_config(planned).projection_dim or 0)
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
        seconds = seconds_of(call, device, 10)
        bus = (2 if kind == "all_reduce" else 1) * whole.nbytes * (world - 1) / world / seconds
        yield {"name": name, "bytes": whole.nbytes, "seconds": seconds, "bus_bytes_per_s": bus}


def check_collectives(bench: Bench) -> None:
    """Report the set-up and the bandwidths of each recipe's messages."""
    bench.need_gpus(2)
    for recipe in bench.recipes:
        given: Row = {"recipe": recipe, "batch_size": bench.batch_size, "folder": str(bench.folder)}
        rows = bench.run(collectives, bench.num_gpus, **given)
        setup = max(of_rank[0]["setup_s"] for of_rank in rows)
        found = rows[0][1:]
        bench.figures.setdefault("collectives", []).extend({"recipe": recipe, **row} for row in found)
        bench.figures["setup_s"] = max(setup, bench.figures.get("setup_s", 0.0))
        words = ", ".join(f"{row['name']} {row['bus_bytes_per_s'] / 1e9:.3g}" for row in found)
        bench.add(f"NCCL {Path(recipe).stem}", f"set up in {setup:.1f} s; GB/s: {words}")


def links(folder: str) -> Iterator[Row]:
    """Collective. Yield the bytes per second that this GPU sends to the GPU of the same rail on each other node, while
    it receives as many. Nodes meet in pairs, and all GPUs are busy at once."""
    device = start_accelerator([], folder).device
    dist.all_reduce(torch.ones(1, device=device))  # all processes make NCCL's communicator
    here, world = int(os.environ["LOCAL_WORLD_SIZE"]), dist.get_world_size()
    node, rail = divmod(dist.get_rank(), here)
    sent, received = (torch.zeros(_LINK_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    for turn in range(1, 1 << (world // here - 1).bit_length()):
        if (other := node ^ turn) * here < world:
            peer = other * here + rail
            ops = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
            seconds = seconds_of(lambda ops=ops: [one.wait() for one in dist.batch_isend_irecv(ops)], device, 10)  # type: ignore[misc]
            yield {"node": node, "other": other, "rail": rail, "bytes_per_s": _LINK_BYTES / seconds}


def check_links(bench: Bench) -> None:
    """Report the bandwidth between nodes by pairs. A GPU that is slow with every node has failed.

    While a GPU seems slow, all links are measured again, and each counts with its fastest time: other work slows sound
    links too.
    """
    rows: list[Row] = []
    for _ in range(_LINK_TRIES):
        ranks = bench.run(links, bench.num_gpus, folder=str(bench.folder))
        before, rows = rows, list(itertools.chain(*ranks))
        for row, last in zip(rows, before, strict=False):  # there are none before the first
            row["bytes_per_s"] = max(row["bytes_per_s"], last["bytes_per_s"])
        best = [max(row["bytes_per_s"] for row in of_rank) for of_rank in ranks]
        slow = [rank for rank, speed in enumerate(best) if speed < (1 - OFF) * np.median(best)]
        if not slow:
            break
    bench.figures["links"] = rows
    least = min(rows, key=lambda row: row["bytes_per_s"])
    words = f"{np.median(best) / 1e9:.3g} GB/s a GPU each way; slowest {least['bytes_per_s'] / 1e9:.3g}"
    pair = f", GPU {least['rail']} between {bench.nodes.hosts[least['node']]} and {bench.nodes.hosts[least['other']]}"
    bench.add("links between nodes", words + pair, [f"slow: {bench.gpu_names(slow)}"] if slow else [])
