"""Which code computes the tiles, and its passes over all of them, each as one operation of torch's.

So whatever follows the loss from outside, such as a tracer or a fake tensor, meets two operations a view in any world,
and needs neither a GPU nor a compiler. Within one, tiles are launched one after another: one for each 33 million logits
of a process on a GPU (`tiles.workspace`).
"""

import functools
import logging
import os
from importlib.util import find_spec
from types import ModuleType

import torch
from torch._subclasses.fake_tensor import FakeTensor

from flipscale.objectives import contrastive_torch
from flipscale.objectives.logsumexp import LogSumExp, Softmax
from flipscale.objectives.tiles import for_each_block, workspace

_log = logging.getLogger(__name__)


def add_negatives(
    images: torch.Tensor,
    texts: torch.Tensor,
    scale: torch.Tensor,
    first_pair: int,
    image_negatives: LogSumExp,
    text_negatives: LogSumExp,
    positives: torch.Tensor,
    shift: float | None,
) -> None:
    """Do what `contrastive_torch.add_negatives` does, for all tiles of `scale * images @ texts.T`.

    Args:
        scale: 0-dimensional and fp64, as any number of Python's.
        first_pair: see `SimilarityTiles`.
    """
    found = (*image_negatives, *text_negatives, positives)
    _add_negatives(images, texts, scale, first_pair, shift, *found, _workspace(images, texts))


def add_gradients(
    images: torch.Tensor,
    texts: torch.Tensor,
    scale: torch.Tensor,
    first_pair: int,
    image_softmax: Softmax,
    text_softmax: Softmax,
    positive_gradient: torch.Tensor,
    image_gradient: torch.Tensor,
    text_gradient: torch.Tensor,
    shift: float | None,
) -> None:
    """Do what `contrastive_torch.add_gradients` does, for all tiles of `scale * images @ texts.T`."""
    given = (*image_softmax, *text_softmax, positive_gradient)
    found = (image_gradient, text_gradient, _workspace(images, texts))
    _add_gradients(images, texts, scale, first_pair, shift, *given, *found)


@torch.library.custom_op(
    "flipscale::add_negatives",
    mutates_args=("image_shift", "image_total", "text_shift", "text_total", "positives", "memory"),
)
def _add_negatives(
    images: torch.Tensor,
    texts: torch.Tensor,
    scale: torch.Tensor,
    first_pair: int,
    shift: float | None,
    image_shift: torch.Tensor,
    image_total: torch.Tensor,
    text_shift: torch.Tensor,
    text_total: torch.Tensor,
    positives: torch.Tensor,
    memory: torch.Tensor,
) -> None:
    found = (LogSumExp(image_shift, image_total), LogSumExp(text_shift, text_total), positives, shift)
    for_each_block(tile_functions(images).add_negatives, images, texts, scale, first_pair, memory, *found)


@torch.library.custom_op("flipscale::add_gradients", mutates_args=("image_gradient", "text_gradient", "memory"))
def _add_gradients(
    images: torch.Tensor,
    texts: torch.Tensor,
    scale: torch.Tensor,
    first_pair: int,
    shift: float | None,
    image_shift: torch.Tensor,
    image_factor: torch.Tensor,
    text_shift: torch.Tensor,
    text_factor: torch.Tensor,
    positive_gradient: torch.Tensor,
    image_gradient: torch.Tensor,
    text_gradient: torch.Tensor,
    memory: torch.Tensor,
) -> None:
    given = (Softmax(image_shift, image_factor), Softmax(text_shift, text_factor), positive_gradient)
    found = (image_gradient, text_gradient, shift)
    for_each_block(tile_functions(images).add_gradients, images, texts, scale, first_pair, memory, *given, *found)


def _workspace(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    return workspace(images, texts, buffers=1 if triton_serves(images) else 2)


def tile_functions(rows: torch.Tensor) -> ModuleType:
    """Return the module that computes the tiles of `rows`."""
    if not triton_serves(rows):
        return contrastive_torch
    from flipscale.objectives import contrastive_triton

    return contrastive_triton


def triton_serves(rows: torch.Tensor) -> bool:
    """Return whether Triton computes the tiles of `rows`: of fp32 on a GPU, if it can be imported and, where there is
    a GPU at all rather than a fake tensor, has compiled and run the kernels there.

    Each process finds out by itself: torch's tiles give the same numbers but for rounding, so that no process needs to
    know what another one uses.
    """
    if not rows.is_cuda or rows.dtype != torch.float32:
        return False
    if isinstance(rows, FakeTensor):
        return find_spec("triton") is not None
    return _triton_runs_on(rows.device)


@functools.cache
def _triton_runs_on(device: torch.device) -> bool:
    """Try the kernels out, once; say why they do not run, on one process of each node."""
    try:
        from flipscale.objectives import contrastive_triton

        contrastive_triton.try_out(device)
    except Exception as error:  # whatever a compiler, an assembler or a driver has to say
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _log.warning(
                "torch computes the loss's tiles, slower than Triton, which fails with %s; for Triton, install its "
                "package, a C compiler such as gcc, and the headers of this Python",
                " ".join(f"{type(error).__name__}: {error}".split())[:300],
            )
        return False
    return True
