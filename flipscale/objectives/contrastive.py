"""The contrastive loss (InfoNCE) over the whole global batch: exact, in memory that does not grow with its square.

From top to bottom: the loss, its two passes, the exchange between processes, the softmax, and the tiles of the
similarity matrix. A tile fits the cache, so the work on its logits costs little. One pass over the tiles sums the
negatives of rows and columns together. A second pass makes each tile again and takes both gradients from it: four
matrix products. Autograd on the whole matrix takes six. `contrastive_triton` has the kernels of both passes for GPUs.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

from flipscale.engines.device import succeeds
from flipscale.objectives.objective import Objective

# Up to this many pairs the products are fp64 on a CPU: fp32 resolves a logit near 100 to 4e-6, and few pairs do not
# average that error out. A GPU has its kernels in fp32.
_FEW = 256
# Rows and columns of a tile. On CPUs its fp32 logits and their gradients share the cache; a GPU wants large products.
_TILE = {"cpu": (2048, 512), "cuda": (4096, 8192)}
# A GPU's tile of fewer rows gets more columns, at most this many, so that each launch has as many logits.
_WIDEST = 2**19
# The smallest side of a block that is worth its own thread.
_BLOCK = 1024
# How far above and below the common shift logits may lie. exp(60) times a million is finite in fp32. A million of
# exp(-80) add less than exp(-16) to a row whose positive is above exp(-50).
_ABOVE, _BELOW = 60.0, 50.0
# Exponents are clamped to this, so that no exponential is denormal.
_LOWEST_EXPONENT = -80.0
# Gradients of logits below this become 0, because a CPU's products of denormal numbers take 200 times as long.
_TINY = 1e-30
# Whether the loss is called under autocast.
_in_autocast = ContextVar("in_autocast", default=False)


@dataclass(frozen=True, kw_only=True)
class PairLoss(Objective):
    """A loss of every image and every text of the global batch, which gathers the texts."""

    def pending_gather(self, micro_batches: int) -> "PendingGather | None":
        # With several captions of an image, the images are gathered.
        is_of_texts = self.captions_per_image == 1 and type(self).loss_inputs is Objective.loss_inputs
        return PendingGather(micro_batches) if is_of_texts and world_size() > 1 else None


@dataclass(frozen=True, kw_only=True)
class Contrastive(PairLoss):
    """Each pair against the rest of the batch, in both directions (InfoNCE)."""

    def chance_loss(self, batch_size: int) -> float:
        # With several captions, an image chooses among all of them, and a caption among the images.
        return math.log(batch_size) + math.log(self.captions_per_image) / 2

    def coupled_loss(self, images: Any, texts: Any, **parameters: Any) -> torch.Tensor:
        return contrastive_loss(images, texts, **parameters)


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    pending: "PendingGather | None" = None,
) -> torch.Tensor:
    """Collective. Return the symmetric InfoNCE of this process's pairs against those of all processes, fp32 `()`.

    The mean over processes is the loss of the global batch, and the mean of the gradients is its gradient. Gradients
    are computed along with the loss, so the backward pass exchanges nothing. It must multiply the loss by the same
    number on every process, and can run only once.

    With several views of each image, the loss is the mean over views. Views of one image are not negatives of each
    other. The texts are exchanged once.

    With several captions of each image, the target of an image is spread evenly over its captions, as in
    UniCL (Yang et al. 2022, arXiv 2204.03610). The images are exchanged, not the texts.

    Args:
        image_embeds: `(batch * views, dim)`, of unit length; the views of an image are neighbouring rows.
        text_embeds: `(batch, dim)`, of unit length; the same `batch` on every process. Or `(batch * captions, dim)` for
            `(batch, dim)` images; the captions of an image are neighbouring rows.
        logit_scale: `(1,)`, as `FlipModel.forward` returns it.
        pending: the gather of these texts, if it has begun.
    """
    has_captions = len(text_embeds) > len(image_embeds)
    sides = (text_embeds, image_embeds) if has_captions else (image_embeds, text_embeds)
    compute = functools.partial(_loss_and_gradients, spreads=has_captions, pending=pending)
    loss: torch.Tensor = PrecomputedGradients.apply(compute, loss_dtype(sides[1]), *sides, logit_scale)
    return loss


class PrecomputedGradients(torch.autograd.Function):
    """A loss whose forward pass also computes its gradients, by a function of images, texts and the model's parameters.

    The function gets parameters `(1,)` as 0-dimensional fp64 tensors. In arithmetic these act as Python numbers, digit
    for digit, and the host does not wait for them. `backward` multiplies the gradients in place by the upstream
    gradient, so it can run only once.

    Autocast does not change the loss and its logits. But a GPU then takes TF32 for the gradients of embeddings, which
    enter products in bf16 next.
    """

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Any], dtype: torch.dtype, *tensors: torch.Tensor) -> torch.Tensor:
        numbers = [parameter.detach().double().reshape(()) for parameter in tensors[2:]]
        device_type = tensors[0].device.type
        token = _in_autocast.set(torch.is_autocast_enabled(device_type))
        try:
            with torch.autocast(device_type, enabled=False):
                loss, gradients = compute(*(side.to(dtype) for side in tensors[:2]), *numbers)
        finally:
            _in_autocast.reset(token)
        ctx.gradients = [g.to(t.dtype) for g, t in zip(gradients, tensors, strict=True)]
        return loss.float()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the backward pass of this loss ran before"
        return (None, None, *(gradient.mul_(upstream[0]) for gradient in gradients))


def loss_dtype(texts: torch.Tensor) -> torch.dtype:
    """Return the precision of the loss for a batch with these `texts` on each process."""
    few = len(texts) * world_size() <= _FEW
    return torch.float64 if few and not texts.is_cuda else torch.float32


def _loss_and_gradients(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, spreads: bool, pending: "PendingGather | None"
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Collective. Return the loss, fp64 `()`, and the gradients of images, texts and scale.

    This process computes every logit of its own images, view by view, against the texts of all processes. The softmax
    of an image is therefore known here; the softmax of a text is merged from all processes.

    With `spreads`, `images` are several captions of each image, and `texts` are the images. The softmax of an image is
    then over the captions of all views, and its target is spread over its own.
    """
    gathered = GatheredTexts(texts, pending)
    views = views_of(images, len(texts))
    matrices = [Matrix(view, gathered.rows, scale, gathered.first) for view in views]
    shift = common_shift(matrices)
    matrices = [matrix._replace(shift=shift) for matrix in matrices]
    sums = first_pass(matrices, gathered)
    if spreads:
        sums = _spread_targets(matrices, sums)
    losses = torch.stack([rows.cross_entropy(own) + columns.cross_entropy(own) for rows, columns, own in sums])
    image_gradient, text_gradient = torch.zeros_like(images), torch.zeros_like(gathered.rows)
    second_pass(
        *(matrices, sums, gathered),
        views_of(image_gradient, len(texts)),
        [text_gradient] * len(views),
        captions=len(views) if spreads else 1,
    )
    count = 2 * len(images)
    scale_gradient = row_products(images, image_gradient).sum(dtype=torch.float64).reshape(1) / count
    image_gradient.mul_(scale / count)
    return losses.mean() / 2, (image_gradient, gathered.sum(text_gradient).div_(count), scale_gradient)


def _spread_targets(matrices: list["Matrix"], sums: list["Sums"]) -> list["Sums"]:
    """Return the sums of the views with the targets of `spreads`."""
    # In fp64, because the positives of an image compete, and what they leave of each other's gradient is small.
    positives = [one.scale * row_products(one.rows.double(), one.own_columns.double()) for one in matrices]
    negatives = _beside_each([of_texts for _, of_texts, _ in sums], positives, matrices[0].shift)
    return list(zip([of_view for of_view, _, _ in sums], negatives, positives, strict=True))


def _beside_each(negatives: list["LogSumExp"], positives: list[torch.Tensor], shift: float | None) -> list["LogSumExp"]:
    """Return the log-sum-exp of all logits of a text, per view without that view's positive.

    Args:
        negatives: log-sum-exps of the texts' negatives in each view.
        positives: logits of the pairs in each view.
        shift: `common_shift` of all logits, or None.
    """
    shifts, totals = (torch.stack(parts) for parts in zip(*negatives, strict=True))
    highest = shifts.amax(0)
    both = LogSumExp(highest, (totals * (shifts - highest).exp_()).sum(0))
    if shift is None:
        both.raise_shift(torch.stack(positives).amax(0))
    own = torch.stack([(positive - both.shift).exp() for positive in positives])
    # Sums without one of them, because a difference would round small ones away.
    others = [torch.cat([own[:view], own[view + 1 :]]).sum(0) for view in range(len(own))]
    return [LogSumExp(both.shift, both.total + rest) for rest in others]


class Matrix(NamedTuple):
    """The logits `scale * rows @ columns.T` of this process's rows and all processes' columns, never stored whole.

    Args:
        rows, columns: `(count, dim)`, of one dtype.
        scale: 0-dimensional, fp64, on the rows' device.
        first_pair: column of row 0's pair; the pair of row i is i columns further.
        shift: `common_shift` of the logits, if it is needed.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    scale: torch.Tensor
    first_pair: int
    shift: float | None = None

    @property
    def own_columns(self) -> torch.Tensor:
        """The pairs' columns `(rows, dim)`."""
        return self.columns[self.first_pair : self.first_pair + len(self.rows)]


# The negatives of a matrix's rows and those of its columns, and the logits of its pairs, `(rows,)`.
Sums = tuple["LogSumExp", "LogSumExp", torch.Tensor]


def first_pass(matrices: list[Matrix], gathered: "GatheredTexts") -> list[Sums]:
    """Collective. Return the sums over each matrix; the negatives of columns are those of this process's texts."""
    here = []
    for matrix in matrices:
        rows, columns = (LogSumExp.empty(side, matrix.shift) for side in (matrix.rows, matrix.columns))
        here.append((rows, columns, matrix.rows.new_empty(len(matrix.rows))))
        for_each_tile(_add_negatives, matrix, matrix.shift, *here[-1], fused=triton_serves(matrix.rows))
    merged = gathered.merge([columns for _, columns, _ in here])
    return [(rows, columns, positives) for (rows, _, positives), columns in zip(here, merged, strict=True)]


def second_pass(
    matrices: list[Matrix],
    sums: list[Sums],
    gathered: "GatheredTexts",
    row_gradients: Sequence[torch.Tensor],
    column_gradients: Sequence[torch.Tensor],
    captions: int = 1,
    student: Sequence[torch.Tensor] = (),
) -> None:
    """Collective. Add each matrix's gradient to those of its rows and of its columns.

    The gradients are those of the sum of all cross-entropies. The caller multiplies `row_gradients` by `scale`.

    Args:
        captions: number of captions of an image. The views share the image's one softmax, which counts as often,
            because the mean over views divides by their number.
        student: rows and columns of another model, which get the gradients in place of the matrices' own.
    """
    row_softmax, column_softmax, of_pairs, dtype = [], [], [], matrices[0].rows.dtype
    for rows, columns, positives in sums:
        of_rows, of_columns = rows.softmax(positives), columns.softmax(positives)
        factor = captions * of_columns.factor
        of_pairs.append((captions - 1 - rows.total * of_rows.factor - columns.total * factor).to(dtype))
        row_softmax.append(Softmax(of_rows.shift.to(dtype), of_rows.factor.to(dtype)))
        column_softmax.append(Softmax(of_columns.shift.to(dtype), factor.to(dtype)))
    weights = (row_softmax, gathered.bring(column_softmax), of_pairs)
    for matrix, *arguments in zip(matrices, *weights, row_gradients, column_gradients, strict=True):
        for_each_tile(_add_gradients, matrix, matrix.shift, *arguments, student, fused=triton_serves(matrix.rows))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def exchange_bytes(pairs: int, world: int, dim: int, views: int = 1) -> int:
    """Return the peak bytes of an exchange on one of `world` processes with GPUs, without its own embeddings.

    These are other processes' texts, their gradients, and messages in transit.

    Args:
        pairs: number of pairs of one process.
        dim: width of the embeddings, in fp32.
    """
    if world == 1:
        return 0
    texts, along = 4 * pairs * dim, 4 * 2 * views * pairs
    return (2 * world + 1) * texts + world * along


class PendingGather:
    """The gather of a step's texts, which begins when the text tower is done and goes on beside the image tower."""

    def __init__(self, micro_batches: int):
        self._own: list[torch.Tensor] = []
        self._micro_batches = micro_batches

    def add(self, texts: torch.Tensor) -> dist.Work | None:
        """Collective. Take the embeddings `(batch, dim)` of the next micro-batch. After the last, gather all and return
        the message."""
        self._own.append(texts.detach())
        if len(self._own) == self._micro_batches:
            self._own = [own] = [torch.cat(self._own)]
            self._everywhere = own.new_empty(world_size() * len(own), own.shape[1])
            self._work: dist.Work = dist.all_gather_single(self._everywhere, own, async_op=True)
            return self._work
        return None

    def wait(self) -> torch.Tensor:
        """Return the texts of all processes `(processes * batch, dim)`, once. A GPU's stream waits for them."""
        self._work.wait()
        everywhere = self._everywhere
        # This object outlives the loss, and the backward pass needs the memory.
        del self._work, self._everywhere, self._own
        return everywhere


class GatheredTexts:
    """The texts of all processes, on every process.

    A loss of `V` views of `b` pairs of width `d` on each of `N` processes takes these collectives, for any `N`. Sizes
    are input and output of one process, in numbers of 4 bytes:

    | | in | out | infonce | sigmoid |
    |---|---:|---:|---|---|
    | all-gather of the texts | b d | N b d | 1 | 1 |
    | all-reduce of the texts' largest logits, and of the sums of their exponentials | V N b | V N b | 2 | |
    | all-gather of the texts' softmax | 2 V b | 2 V N b | 1 | |
    | reduce-scatter of the texts' gradients (on CPUs all-to-all, `N b d` out) | N b d | b d | 1 | 1 |
    | all-reduce of three numbers, on CPUs only (`common_shift`) | 3 | 3 | 1 | |
    | all-gather of the captions' ids, only if equal captions are positives | 2 b | 2 N b | | 1 |

    Attributes:
        rows: `(processes * batch, dim)`.
        first: index in `rows` of this process's first text, which is that of its first image.
    """

    def __init__(self, texts: torch.Tensor, pending: PendingGather | None = None):
        """Collective. Gather `texts` `(batch, dim)`, the same `batch` on every process, or wait for `pending`."""
        self._world = world_size()
        self.first = dist.get_rank() * len(texts) if self._world > 1 else 0
        if pending is not None:
            self.rows = pending.wait().to(texts.dtype)
        else:
            self.rows = _gather(texts).flatten(0, 1) if self._world > 1 else texts

    def merge(self, negatives: list["LogSumExp"]) -> list["LogSumExp"]:
        """Collective. Return the negatives of this process's texts on all processes, from those of all texts here."""
        if self._world == 1:
            return negatives
        shifts, totals = (torch.stack(side) for side in zip(*negatives, strict=True))
        highest = shifts.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        dist.all_reduce(totals.mul_(shifts.sub_(highest).exp_()))
        own = [side.unflatten(1, (self._world, -1))[:, dist.get_rank()].clone() for side in (highest, totals)]
        return [LogSumExp(*one) for one in zip(*own, strict=True)]

    def bring(self, softmax: list["Softmax"]) -> list["Softmax"]:
        """Collective. Return each softmax of all processes' texts, from those of this process's texts."""
        if self._world == 1:
            return softmax
        everywhere = _gather(torch.stack([tensor for one in softmax for tensor in one]))
        return [Softmax(*one) for one in everywhere.transpose(0, 1).flatten(1, 2).unflatten(0, (-1, 2))]

    def sum(self, rows: torch.Tensor) -> torch.Tensor:
        """Collective. Return the sum over the processes of the rows of this process's texts."""
        return _sum_to_owner(rows.unflatten(0, (self._world, -1))) if self._world > 1 else rows


def _gather(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows of all processes, `(world, *rows.shape)`."""
    everywhere = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_single(everywhere, rows.contiguous())
    return everywhere.unflatten(0, (world_size(), -1))


def _sum_to_owner(parts: torch.Tensor) -> torch.Tensor:
    """Return on process r the sum over all processes of part r of `(world, ...)`.

    On CPUs this uses all-to-all, because gloo's reduce-scatter reduces all parts everywhere. That took 1.5 times as
    long (2 and 4 processes, 2,048 rows of 512 each).
    """
    if parts.device.type == "cpu":
        received = torch.empty(parts.shape, dtype=parts.dtype)
        dist.all_to_all_single(received, parts.contiguous())
        return received.sum(0)
    mine = parts.new_empty(parts.shape[1:])
    dist.reduce_scatter_single(mine, parts.flatten(0, 1).contiguous())
    return mine


def common_shift(matrices: Sequence[Matrix]) -> float | None:
    """Collective on CPUs. Return a shift with which one exponential of a logit serves both its row and its column.

    The shift is 0 if that suffices for the global batch, and None if no shift does. On accelerators it is always None:
    the host would have to wait for all queued work, and running maxima cost little there.
    """
    rows, scale = matrices[0].rows, matrices[0].scale
    if rows.device.type != "cpu" or isinstance(rows, FakeTensor):
        return None
    lowest_positive = torch.stack([row_products(one.rows, one.own_columns).min() for one in matrices]).min()
    norms = [[side.norm(dim=1).max() for side in (one.rows, one.own_columns)] for one in matrices]
    image_norm, text_norm = (torch.stack(side).max() for side in zip(*norms, strict=True))
    bounds = torch.stack([image_norm, text_norm, -lowest_positive])
    if world_size() > 1:
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
    most_of_images, most_of_texts, negated = bounds.tolist()
    # Bounds of all logits, and of the positives, and so of each row's and each column's largest logit.
    highest, lowest = scale.item() * most_of_images * most_of_texts, -scale.item() * negated
    if highest <= _ABOVE and lowest >= -_BELOW:
        return 0.0
    shift = min(highest, lowest + _BELOW)
    return shift if highest - shift <= _ABOVE else None


class LogSumExp(NamedTuple):
    """The log-sum-exp of each row's negatives so far, as `total * exp(shift)`: two tensors `(count,)`.

    The positive is not in the sum, because it would round the small negatives away once it dominates.
    """

    shift: torch.Tensor
    total: torch.Tensor

    @classmethod
    def empty(cls, rows: torch.Tensor, shift: float | None) -> "LogSumExp":
        """Return empty sums for `rows`. With `shift` None, shifts follow the running maxima."""
        start = rows.new_full((len(rows),), float("-inf") if shift is None else shift)
        return cls(start, torch.zeros_like(start))

    def part(self, rows: slice) -> "LogSumExp":
        return LogSumExp(self.shift[rows], self.total[rows])

    def raise_shift(self, shift: torch.Tensor) -> None:
        higher = torch.maximum(self.shift, shift)
        self.total.mul_((self.shift - higher).exp_())
        self.shift.copy_(higher)

    def cross_entropy(self, positives: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of each row, given the logit of its positive: fp64 `(count,)`."""
        return (self.total.double() * (self.shift.double() - positives).exp()).log1p()

    def softmax(self, positives: torch.Tensor) -> "Softmax":
        """Return the softmax of each row over its negatives and its positive."""
        return Softmax(self.shift, (self.total + (positives - self.shift).exp()).reciprocal_())


class Softmax(NamedTuple):
    """A normalised softmax: the weight of a logit is `exp(logit - shift) * factor`; two tensors `(count,)`."""

    shift: torch.Tensor
    factor: torch.Tensor

    def part(self, rows: slice) -> "Softmax":
        return Softmax(self.shift[rows], self.factor[rows])


class Tile(NamedTuple):
    """A part of a `Matrix`.

    Args:
        rows, columns: its place in the matrix.
        scaled: its rows times `scale`, `(height, dim)`.
        others: its columns, `(width, dim)`.
        first_pair: column in the tile of its first row's pair, which may lie outside.
        logits: `(height, width)`, in memory that the next tile reuses.
        spare: more memory of this size.
        fused: whether a kernel computes the logits. They are then not in `logits`, which is the same memory as `spare`.
    """

    rows: slice
    columns: slice
    scaled: torch.Tensor
    others: torch.Tensor
    first_pair: int
    logits: torch.Tensor
    spare: torch.Tensor
    fused: bool

    def pairs(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return a view of the pairs' elements in a matrix of the tile's size."""
        return matrix.diagonal(self.first_pair)

    @property
    def paired(self) -> slice:
        """Rows that have their pair in this tile."""
        first = self.rows.start + max(0, -self.first_pair)
        return slice(first, first + len(self.pairs(self.logits)))

    def add_products(
        self,
        logit_gradient: torch.Tensor,
        row_gradient: torch.Tensor,
        column_gradient: torch.Tensor,
        student: Sequence[torch.Tensor] = (),
    ) -> None:
        """Back-propagate the gradient of the logits to rows and columns, or to those of a `student`."""
        rows, columns = (student[0][self.rows], student[1][self.columns]) if student else (self.scaled, self.others)
        if not logit_gradient.is_cuda:
            torch.hardshrink(logit_gradient, _TINY, out=logit_gradient)
        with _tf32() if logit_gradient.is_cuda and _in_autocast.get() else nullcontext():
            row_gradient[self.rows].addmm_(logit_gradient, columns)
            column_gradient[self.columns].addmm_(logit_gradient.t(), rows)


@contextmanager
def _tf32() -> Iterator[None]:
    """Let a GPU's products of fp32 take TF32 in a `with` block."""
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before


def _add_negatives(
    tile: Tile, shift: float | None, rows: LogSumExp, columns: LogSumExp, positives: torch.Tensor
) -> None:
    """Add a tile's logits to the negatives of rows and columns, and write those of pairs to `positives`."""
    sides = (rows.part(tile.rows), columns.part(tile.columns))
    if tile.fused:
        from flipscale.objectives import contrastive_triton

        parts = contrastive_triton.block_negatives(tile.scaled, tile.others, tile.first_pair, positives[tile.rows])
        for negatives, (highest, total) in zip(sides, parts, strict=True):
            if shift is None:
                negatives.raise_shift(highest.amax(0))
            negatives.total.add_(total.mul_(highest.sub_(negatives.shift).exp_()).sum(0))
        return
    positives[tile.paired] = tile.pairs(tile.logits)
    if shift is not None:
        tile.pairs(_exponentials(tile.logits, shift)).zero_()
    for negatives, dim in zip(sides, (1, 0), strict=True):
        exponentials = tile.logits
        if shift is None:
            negatives.raise_shift(tile.logits.amax(dim))
            exponentials = torch.sub(tile.logits, negatives.shift.unsqueeze(dim), out=tile.spare)
            tile.pairs(exponentials.clamp_(min=_LOWEST_EXPONENT).exp_()).zero_()
        negatives.total.add_(exponentials.sum(dim))


def _add_gradients(
    tile: Tile, shift: float | None, rows: Softmax, columns: Softmax, of_pairs: torch.Tensor, *results: Any
) -> None:
    """Add a tile's gradients to `results`, the last arguments of `Tile.add_products`."""
    rows, columns, logit_gradient = rows.part(tile.rows), columns.part(tile.columns), tile.spare
    if tile.fused:
        from flipscale.objectives import contrastive_triton

        weights = (of_pairs[tile.rows], *rows, *columns)
        contrastive_triton.logit_gradient(tile.scaled, tile.others, tile.first_pair, *weights, logit_gradient)
    elif shift is not None:
        torch.add(rows.factor[:, None], columns.factor, out=logit_gradient)
        logit_gradient.mul_(_exponentials(tile.logits, shift))
    else:
        torch.sub(tile.logits, rows.shift[:, None], out=logit_gradient)
        logit_gradient.clamp_(min=_LOWEST_EXPONENT).exp_().mul_(rows.factor[:, None])
        exponentials = tile.logits.sub_(columns.shift).clamp_(min=_LOWEST_EXPONENT).exp_()
        logit_gradient.addcmul_(exponentials, columns.factor)
    if not tile.fused:
        tile.pairs(logit_gradient).copy_(of_pairs[tile.paired])
    tile.add_products(logit_gradient, *results)


def _exponentials(logits: torch.Tensor, shift: float) -> torch.Tensor:
    """Replace logits by their exponentials and return them."""
    return (logits.sub_(shift).clamp_(min=_LOWEST_EXPONENT) if shift else logits).exp_()


def for_each_tile(work: Callable[..., None], matrix: Matrix, *arguments: Any, fused: bool = False) -> None:
    """Call `work(tile, *arguments)` for all tiles of a matrix.

    On a CPU, blocks that share no row and no column run at the same time, one thread each. torch would otherwise split
    each product over all threads, which then wait for the slowest thread. A tile's product is too short for such waits.
    """
    rows, columns, scale, first_pair, _ = matrix
    count, height, width = _tiling(len(rows), len(columns), rows.device.type)
    # Sizes of the scaled rows and of the logits, in whole cache lines.
    size, area = (-(-elements // 16) * 16 for elements in (height * rows.shape[1], height * width))
    memory = rows.new_empty(count, size + (1 if fused else 2) * area)

    @torch.no_grad()
    def compute_block(memory: torch.Tensor, row_part: range, column_part: range) -> None:
        for top in row_part[::height]:
            down = slice(top, min(top + height, row_part.stop))
            scaled = memory[: (down.stop - top) * rows.shape[1]].view(-1, rows.shape[1])
            torch.mul(rows[down], scale, out=scaled)
            for left in column_part[::width]:
                across = slice(left, min(left + width, column_part.stop))
                shape = (len(scaled), across.stop - left)
                logits, spare = (part[: math.prod(shape)].view(shape) for part in (memory[size:], memory[-area:]))
                if not fused:
                    torch.mm(scaled, columns[across].t(), out=logits)
                offset = first_pair + top - left
                work(Tile(down, across, scaled, columns[across], offset, logits, spare, fused), *arguments)

    if count == 1:
        compute_block(memory[0], range(len(rows)), range(len(columns)))
        return
    threads = torch.get_num_threads()
    row_parts, column_parts = (
        [range(length * part // count, length * (part + 1) // count) for part in range(count)]
        for length in (len(rows), len(columns))
    )
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(threads // count,)) as pool:
            for turn in range(count):
                list(pool.map(compute_block, memory, row_parts, column_parts[turn:] + column_parts[:turn]))
    finally:
        # torch.set_num_threads in a thread also changes the number for threads that start later.
        torch.set_num_threads(threads)


def _tiling(rows: int, columns: int, device_type: str) -> tuple[int, int, int]:
    """Return the number of parts of rows and of columns for threads, and the shape of the largest tile."""
    threads = torch.get_num_threads() if device_type == "cpu" else 1
    count = max(1, min(threads, rows // _BLOCK, columns // _BLOCK))
    height, width = _TILE["cpu" if device_type == "cpu" else "cuda"]
    if device_type != "cpu" and rows < height:
        width = min(height * width // rows, _WIDEST)
    return count, min(height, -(-rows // count)), min(width, -(-columns // count))


def tile_bytes(rows: int, columns: int, dim: int) -> int:
    """Return the bytes of a tile on a GPU, in fp32: its scaled rows, its logits and their gradients."""
    _, height, width = _tiling(rows, columns, "cuda")
    return 4 * height * (dim + 2 * width)


def views_of(rows: torch.Tensor, batch: int) -> tuple[torch.Tensor, ...]:
    """Split `rows` `(batch * views, ...)` by view: the first view of each image, then the second, and so on.

    The views of an image are neighbouring rows.
    """
    return rows.unflatten(0, (batch, -1)).unbind(1)


def row_products(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the dot product of each row of one with that of the other, `(count,)`."""
    return torch.einsum("nd,nd->n", one, other)


def triton_serves(rows: torch.Tensor) -> bool:
    """Return whether Triton computes the tiles of `rows`: fp32 on a GPU where the kernels compile and run.

    Each process decides by itself: torch's tiles give the same numbers up to rounding.
    """
    is_real = rows.is_cuda and not isinstance(rows, FakeTensor)
    return is_real and rows.dtype == torch.float32 and _triton_runs_on(rows.device)


@functools.cache
def _triton_runs_on(device: torch.device) -> bool:
    """Try the kernels once. If they fail, one process of each node logs why."""

    def attempt() -> None:
        from flipscale.objectives import contrastive_triton

        contrastive_triton.try_out(device)

    return succeeds(
        attempt,
        "the loss's tiles run in torch, slower than in Triton, because Triton fails",
        "to use it, install the package triton, a C compiler such as gcc, and the headers of this Python",
    )
