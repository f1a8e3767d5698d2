"""The Triton kernels without a GPU: their results in Triton's interpreter, and their compilation for real GPUs."""

import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from objectives import test_contrastive, test_sigmoid, test_teachers

from flipscale.engines import device as gpus
from flipscale.objectives import contrastive, sigmoid
from flipscale.objectives.contrastive import LogSumExp, Matrix, for_each_tile

contrastive_triton = pytest.importorskip("flipscale.objectives.contrastive_triton")

Interpreted = Callable[..., None]


def tf32(numbers: np.ndarray) -> np.ndarray:
    """Round as `cvt.rna.tf32.f32`: 10 bits of the mantissa stay, ties away from zero."""
    return ((numbers.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def product_as_on_a_gpu(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Multiply fp32 matrices as Triton's `tf32x3` does: three products of tf32, without that of both remainders."""
    large, others = tf32(left), tf32(right)
    small, other_small = tf32(left - large), tf32(right - others)
    # What is not finite is in the large parts; Triton drops it from the small products.
    return np.nan_to_num(small @ others + large @ other_small, nan=0.0) + large @ others


def interpret() -> None:
    """Let the kernels compute all fp32 tiles, in tiles of several blocks, with products as on a GPU."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(_: Any, left: Any, right: Any, before: Any, precision: Any, __: Any) -> Any:
        assert precision.name == "TF32x3"
        with np.errstate(invalid="ignore"):
            return TensorHandle(product_as_on_a_gpu(left.data, right.data) + before.data, before.dtype.scalar)

    InterpreterBuilder.create_dot = dot
    torch.set_num_threads(1)
    contrastive._TILE["cpu"] = (200, 150)
    contrastive.triton_serves = lambda rows: rows.dtype == torch.float32
    contrastive._FEW = 0


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreted]:
    """Calls a function in a process whose Triton interprets kernels. Triton decides that when it is imported."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            process.submit(interpret).result()
        yield lambda function, *inputs: process.submit(function, *inputs).result()


@pytest.mark.parametrize(
    ("batch", "dim", "dtype", "scale", "noise"),
    [
        (1, 32, torch.float32, 100.0, 0.5),
        (7, 33, torch.bfloat16, 14.3, 3.0),
        (257, 96, torch.bfloat16, 1.0, None),
        (300, 33, torch.float32, 100.0, 0.5),
    ],
)
def test_value_and_gradients(
    interpreted: Interpreted, batch: int, dim: int, dtype: torch.dtype, scale: float, noise: float | None
) -> None:
    interpreted(test_contrastive.test_value_and_gradients, batch, dim, dtype, scale, noise)


@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_opposite_pairs(interpreted: Interpreted, scale: float) -> None:
    interpreted(test_contrastive.test_opposite_pairs, scale)


def test_targets_of_teachers(interpreted: Interpreted) -> None:
    interpreted(test_teachers.test_value_and_gradients, 300, 24, 2, [14.3, 60.0], 0.3, 0.5)


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (1.0, 3.0), (100.0, -60.0)])
@pytest.mark.parametrize(
    ("batch", "dim", "dtype"),
    [(1, 32, torch.float32), (7, 1024, torch.bfloat16), (257, 96, torch.float32), (300, 33, torch.bfloat16)],
)
def test_sigmoid_loss(
    interpreted: Interpreted, batch: int, dim: int, dtype: torch.dtype, scale: float, bias: float
) -> None:
    interpreted(test_sigmoid.test_value_and_gradients, batch, dim, dtype, scale, bias)


def test_sigmoid_loss_of_ids_and_of_captions(interpreted: Interpreted) -> None:
    interpreted(test_sigmoid.test_equal_ids_are_positives, 300, 96, 100.0, -60.0, 200)
    interpreted(test_sigmoid.test_several_captions_of_an_image, 257, 96, 100.0, -60.0, 5)


def check_non_finite(number: float, loss_function: Callable[..., torch.Tensor], *bias: torch.Tensor) -> None:
    images, texts = test_contrastive.embeds_of(300, 16, 1.0)
    images[5, 3] = number
    for side in (images, texts):
        side.requires_grad_()
    loss = loss_function(images, texts, torch.tensor([100.0]), *bias)
    loss.backward()
    assert not loss.isfinite()
    assert not torch.cat([images.grad, texts.grad]).isfinite().all()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_non_finite_embeddings(interpreted: Interpreted, number: float) -> None:
    interpreted(check_non_finite, number, contrastive.contrastive_loss)
    interpreted(check_non_finite, number, sigmoid.sigmoid_loss, torch.zeros(1))


def check_decisions(height: int, width: int, first_pair: int) -> None:
    """Compare the sigmoid loss's kernel on strided fp32 with torch in fp64."""
    embeds = torch.randn(height + width, 40, 2, generator=torch.Generator().manual_seed(height))
    sides = torch.nn.functional.normalize(embeds, dim=1)[..., 0].split([height, width])
    found = []
    for rows, columns in (sides, [side.double() for side in sides]):
        scale, bias = torch.tensor([30.0, -4.0], dtype=torch.float64)
        sums = torch.zeros(height, 2, dtype=torch.float64)
        results = (sums, torch.zeros_like(rows), torch.zeros_like(columns))
        matrix = Matrix(rows, columns, scale, first_pair)
        for_each_tile(sigmoid._add_tile, matrix, bias, None, *results, fused=contrastive.triton_serves(rows))
        found.append(results)
    for ours, plain in zip(*found, strict=True):
        assert torch.allclose(ours.double(), plain.double(), rtol=1e-5, atol=1e-5 * plain.abs().max().item())


def both_passes(rows: torch.Tensor, columns: torch.Tensor, first_pair: int, shift: float | None) -> list[torch.Tensor]:
    """Return the log-sum-exp of the negatives, the positives, and the gradients of rows and columns."""
    fused = contrastive.triton_serves(rows)
    matrix = Matrix(rows, columns, torch.tensor(30.0, dtype=torch.float64), first_pair, shift)
    positives, column_positives = torch.ones_like(rows[:, 0]), torch.ones_like(columns[:, 0])
    of_rows, of_columns = LogSumExp.empty(rows, shift), LogSumExp.empty(columns, shift)
    for_each_tile(contrastive._add_negatives, matrix, shift, of_rows, of_columns, positives, fused=fused)
    softmax = of_rows.softmax(positives), of_columns.softmax(column_positives)
    gradients = torch.zeros_like(rows), torch.zeros_like(columns)
    positive_gradient = torch.linspace(-1, 1, len(rows), dtype=rows.dtype)
    weights = (shift, *softmax, positive_gradient, *gradients)
    for_each_tile(contrastive._add_gradients, matrix, *weights, fused=fused)
    if shift is not None:
        assert {*of_rows.shift.tolist(), *of_columns.shift.tolist()} == {shift}
    return [of_rows.total.log() + of_rows.shift, of_columns.total.log() + of_columns.shift, positives, *gradients]


def check_against_plain(height: int, width: int, first_pair: int, shift: float | None) -> None:
    """Compare the kernels on strided fp32 with torch in fp64."""
    embeds = torch.randn(height + width, 40, 2, generator=torch.Generator().manual_seed(height))
    rows, columns = torch.nn.functional.normalize(embeds, dim=1)[..., 0].split([height, width])
    found = both_passes(rows, columns, first_pair, shift)
    expected = both_passes(rows.double(), columns.double(), first_pair, shift)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("shift", [None, 5.0])
@pytest.mark.parametrize(
    ("height", "width", "first_pair"), [(2, 5, 1), (7, 300, 40), (300, 257, -50), (257, 130, 100), (33, 64, 70)]
)
def test_any_part_of_the_matrix(
    interpreted: Interpreted, height: int, width: int, first_pair: int, shift: float | None
) -> None:
    interpreted(check_against_plain, height, width, first_pair, shift)
    interpreted(check_decisions, height, width, first_pair)


class Compiler:
    """Replaces a kernel: Triton binds and compiles it as on a GPU, but does not launch it."""

    def __init__(self, kernel: Any):
        self.kernel, self.programs = kernel, []

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        return lambda *arguments, **options: self.programs.append(
            self.kernel.run(*arguments, grid=grid, warmup=True, **options)
        )


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Compiler]]:
    """All kernels, on a GPU of the capability `request.param` that Triton takes to be there."""
    from triton import runtime
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", request.param, 32),
    )
    monkeypatch.setattr(runtime.driver, "_active", driver)
    kernels = (contrastive_triton.tile_negatives, contrastive_triton.tile_gradients, contrastive_triton.tile_decisions)
    compilers = [Compiler(kernel) for kernel in kernels]
    for compiler in compilers:
        compiler.kernel.device_caches.clear()
        monkeypatch.setattr(contrastive_triton, compiler.kernel.__name__, compiler)
    monkeypatch.setattr(contrastive, "triton_serves", lambda rows: True)
    yield compilers
    for compiler in compilers:
        compiler.kernel.device_caches.clear()


@pytest.mark.long
@pytest.mark.parametrize("gpu", [80, 90, 100], indirect=True)
def test_kernels_compile_without_spills(gpu: list[Compiler], tmp_path: Path) -> None:
    from triton import knobs

    # Triton compiles anew for a 1 and for multiples of 16.
    for first_pair in (0, 1, -7, 48):
        sides = torch.zeros(2, 512, 512)
        both_passes(*sides, first_pair, None)
        for ids in (None, [torch.arange(512)] * 2):
            bias, gradients = torch.zeros((), dtype=torch.float64), torch.empty(512, 512)
            contrastive_triton.block_decisions(*sides, first_pair, bias, ids, gradients)
    for compiler in gpu:
        assert len(compiler.programs) >= 4
        for program in compiler.programs:
            binary = tmp_path / "kernel.cubin"
            binary.write_bytes(program.asm["cubin"])
            command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert " STACK:0 " in usage
            assert "tf32" in program.asm["ptx"]


def check_trial() -> None:
    torch.cuda.synchronize = lambda device: None
    contrastive_triton.try_out(torch.device("cpu"))


def test_the_trial_runs_all_kernels(interpreted: Interpreted) -> None:
    interpreted(check_trial)


@pytest.mark.parametrize(
    "fault", [ImportError("No module named 'triton'"), RuntimeError("Failed to find C compiler.\nPlease specify one")]
)
def test_torch_replaces_failing_kernels_with_one_warning(fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []

    def fail(device: torch.device) -> None:
        raise fault

    monkeypatch.setattr(contrastive_triton, "try_out", fail)
    contrastive._triton_runs_on.cache_clear()
    monkeypatch.setattr(gpus._log, "warning", lambda words, *values: warnings.append(words % values))
    gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cuda", 0))
    try:
        assert [contrastive.triton_serves(gpu) for _ in range(3)] == [False] * 3
        monkeypatch.setenv("LOCAL_RANK", "3")
        contrastive._triton_runs_on.cache_clear()
        assert not contrastive.triton_serves(gpu)
    finally:
        contrastive._triton_runs_on.cache_clear()
    (line,) = warnings
    assert line.startswith("the loss's tiles run in torch, slower than in Triton, because Triton fails (")
    assert " ".join(str(fault).split()) in line
    assert "install" in line
