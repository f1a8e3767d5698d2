"""Matrix products, attention and the loss's Triton kernels at a model's own shapes, on each GPU by itself."""

import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flipscale.checks.findings import OFF, Bench, NotRun
from flipscale.checks.group import Row
from flipscale.checks.machine import own_device, query_gpus
from flipscale.engines.device import attention_kernel, wait_for
from flipscale.model.patches import num_kept
from flipscale.objectives import tiles
from flipscale.objectives.tiles import LogSumExp, SimilarityTiles, workspace
from flipscale.training.recipe import parse_recipe

_TIMES, _WARM_UP = 20, 3
_LOADED_PRODUCTS = 500
_MASK_RATIOS = (0.75, 0.5)
_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_NAMES = [backend.name.lower() for backend in _BACKENDS]
# Largest difference from fp64, relative to the largest number. fp32 differs by 1e-6 to 1e-5.
TILE_TOLERANCE = 1e-4


class Tower(NamedTuple):
    """The sizes of a tower's products: tokens of an image or a text, and its blocks' widths."""

    name: str
    tokens: int
    width: int
    mlp: int
    heads: int


def towers(recipe: str, mask_ratios: tuple[float, ...]) -> list[Tower]:
    """Return the towers of a recipe's model, the image tower once for each mask ratio."""
    config = parse_recipe(["--config", recipe]).model_config()
    vision, text = config.vision_config, config.text_config
    sides = [
        (f"image {ratio:.0%}", num_kept(vision.num_patches, ratio) + vision.num_prefix_tokens, vision)
        for ratio in mask_ratios
    ]
    return [
        Tower(name, tokens, one.hidden_size, one.intermediate_size, one.num_attention_heads)
        for name, tokens, one in [*sides, ("text", text.max_position_embeddings, text)]
    ]


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
    """Yield the operations per second of the blocks' bf16 products, then the GPU's clock and power during them."""
    device = own_device()
    for tower in towers(recipe, _MASK_RATIOS[1:]):
        rows, width, mlp = batch_size * tower.tokens, tower.width, tower.mlp
        # Forward products of a block, and the weight gradient of the wide one, which sums over the rows.
        for m, k, n in ((rows, width, 3 * width), (rows, width, width), (rows, width, mlp), (rows, mlp, width),
                        (width, rows, mlp)):  # fmt: skip
            left = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            right = torch.randn(k, n, device=device, dtype=torch.bfloat16)
            seconds = seconds_of(lambda a=left, b=right: torch.mm(a, b), device)  # type: ignore[misc]
            yield {"tower": tower.name, "shape": [m, k, n], "flops_per_s": 2 * m * k * n / seconds}
    # Queue about a second of products, fewer than a launch queue holds, and ask while the GPU computes them.
    square = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(_LOADED_PRODUCTS):
        torch.mm(square, square)
    yield {"loaded": query_gpus(device)}
    wait_for(device)


def attention(recipe: str, batch_size: int) -> Iterator[Row]:
    """Yield the milliseconds of attention, forward and backward, with each of torch's kernels."""
    device = own_device()
    torch.backends.cuda.enable_cudnn_sdp(False)  # as the trainer does
    for tower in towers(recipe, _MASK_RATIOS):
        head_dim = tower.width // tower.heads
        shape = (batch_size, tower.heads, tower.tokens, head_dim)
        inputs = tuple(torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        gradient = torch.randn(shape, device=device, dtype=torch.bfloat16)

        def call(inputs: tuple[torch.Tensor, ...] = inputs, gradient: torch.Tensor = gradient) -> None:
            torch.autograd.grad(scaled_dot_product_attention(*inputs), inputs, gradient)

        row: Row = {"tower": tower.name, "tokens": tower.tokens, "head_dim": head_dim, "absent": {}}
        row["used"] = attention_kernel(device, bf16=True, head_dim=head_dim)
        for backend in _BACKENDS:
            name = backend.name.lower()
            try:
                with sdpa_kernel(backend):
                    row[name] = 1e3 * seconds_of(call, device)
            except RuntimeError as error:
                row["absent"][name] = str(error).strip().splitlines()[0]
        yield row


def triton_tiles(dim: int, batch_size: int) -> Iterator[Row]:
    """Yield the differences of the Triton kernels' results from torch's in fp64, then the times of both in fp32."""
    from flipscale.objectives import contrastive_triton

    device = own_device()
    for height, width, first_pair in ((300, 257, -50), (batch_size, 8 * batch_size, batch_size)):
        rows, columns = _unit_rows(height, dim, device), _unit_rows(width, dim, device)
        found = both_passes(contrastive_triton, rows, columns, first_pair)
        exact = both_passes(tiles, rows.double(), columns.double(), first_pair)
        for name, ours, theirs in zip(_RESULTS, found, exact, strict=True):
            off = (ours.double() - theirs).abs().max() / theirs.abs().max()
            yield {"result": name, "shape": [height, width, dim], "difference": off.item()}
    for name, functions in (("triton", contrastive_triton), ("torch", tiles)):
        yield {name: 1e3 * seconds_of(lambda f=functions: both_passes(f, rows, columns, first_pair), device, 5)}  # type: ignore[misc]


_RESULTS = ("row sums", "column sums", "positives", "row gradient", "column gradient")


def both_passes(
    functions: ModuleType, rows: torch.Tensor, columns: torch.Tensor, first_pair: int, scale: float = 30.0
) -> list[torch.Tensor]:
    """Return the log-sum-exps of the negatives, the positives' logits, and the gradients, by a module's kernels."""
    memory = workspace(rows, columns, buffers=2)[0]
    scales = torch.tensor(scale, dtype=torch.float64, device=rows.device)
    matrix = SimilarityTiles(rows, columns, scales, first_pair, memory)
    positives, of_columns_pairs = torch.ones_like(rows[:, 0]), torch.ones_like(columns[:, 0])
    of_rows, of_columns = LogSumExp.empty(rows, None), LogSumExp.empty(columns, None)
    functions.add_negatives(matrix, of_rows, of_columns, positives, None)
    softmax = of_rows.softmax(positives), of_columns.softmax(of_columns_pairs)
    gradients = torch.zeros_like(rows), torch.zeros_like(columns)
    positive_gradient = torch.linspace(-1, 1, len(rows), dtype=rows.dtype, device=rows.device)
    functions.add_gradients(matrix, *softmax, positive_gradient, *gradients, None)
    return [of_rows.total.log() + of_rows.shift, of_columns.total.log() + of_columns.shift, positives, *gradients]


def _unit_rows(count: int, dim: int, device: torch.device) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, dim, device=device), dim=1)


def check_products(bench: Bench) -> None:
    """Report the speed of matrix products on all GPUs at once; GPUs must be equally fast."""
    for recipe in bench.recipes:
        rows = bench.node.run(
            f"{__name__}:products", 180, bench.node.num_gpus, recipe=recipe, batch_size=bench.batch_size
        )
        speeds = [[row["flops_per_s"] for row in of_rank if "shape" in row] for of_rank in rows]
        means = [len(of_rank) / sum(1 / speed for speed in of_rank) for of_rank in speeds]
        slowest = min(range(len(means)), key=means.__getitem__)
        faults = []
        if means[slowest] < (1 - OFF) * max(means):
            faults.append(f"GPU {slowest} has {means[slowest] / 1e12:.0f} Tflop/s, another {max(means) / 1e12:.0f}")
        loaded = [gpu for of_rank in rows for row in of_rank for gpu in row.get("loaded", [])]
        clocks = sorted(float(gpu["clocks.sm"]) for gpu in loaded if gpu["clocks.sm"].replace(".", "").isdigit())
        bench.figures.setdefault("products", {})[recipe] = {"flops_per_s": means, "rows": rows[slowest]}
        bench.add(
            f"products {recipe}",
            f"{min(map(min, speeds)) / 1e12:.0f} to {max(map(max, speeds)) / 1e12:.0f} Tflop/s in bf16, mean "
            f"{sum(means) / len(means) / 1e12:.0f}" + (f"; {clocks[0]:.0f} to {clocks[-1]:.0f} MHz" if clocks else ""),
            faults,
        )


def check_attention(bench: Bench) -> None:
    """Report the speed of attention's kernels; the one that the trainer uses must be there."""
    for recipe in bench.recipes:
        (rows,) = bench.node.run(f"{__name__}:attention", 180, recipe=recipe, batch_size=bench.batch_size)
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
        bench.add(f"attention {recipe}", f"ms, fastest first, {used} is used: {'; '.join(texts)}", faults)


def check_triton(bench: Bench) -> None:
    """Compare the loss's Triton kernels with torch in fp64, and time both."""
    if find_spec("triton") is None:
        raise NotRun("triton is not installed")
    dim = int(parse_recipe(["--config", bench.recipes[0]]).model_config().projection_dim or 0)
    (rows,) = bench.node.run(f"{__name__}:triton_tiles", 180, dim=dim, batch_size=bench.batch_size)
    bench.figures["triton"] = rows
    compared = [row for row in rows if "difference" in row]
    faults = [
        f"{row['result']} of {row['shape']} off by {row['difference']:.1e}"
        for row in compared
        if not row["difference"] <= TILE_TOLERANCE  # NaN too
    ]
    times = "; ".join(f"{name} {ms:.2f} ms" for row in rows if "result" not in row for name, ms in row.items())
    largest = max(row["difference"] for row in compared)
    bench.add("triton", f"largest difference from fp64 {largest:.1e}; {times}", faults)
