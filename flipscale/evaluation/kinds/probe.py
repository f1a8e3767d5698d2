"""Linear probe: a linear classifier on frozen image features, by logistic regression or by the paper's LARS recipe; and
few shots, by ridge regression on a few images a class, cheap enough to follow a run.

Features and sums are fp64, because the result is then the same for any number of processes to about 1e-15. Each
process keeps its own rows; only sums meet.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from typing import Any, ClassVar, Literal, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from flipscale.data.decode import DRAWS_PER_CROP, UndecodableImage, decode_box
from flipscale.data.randomness import keyed_permutation, keyed_uniform
from flipscale.data.samples import Sample
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import Embedder, Features
from flipscale.evaluation.intervals import Estimate, student, wilson
from flipscale.evaluation.kinds.task import LabelledTask
from flipscale.evaluation.metrics import hits_by_class, mean_per_class
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet
from flipscale.evaluation.whole_images import ChosenRows
from flipscale.io.errors import UserError
from flipscale.io.options import Count, CountOrZero, Positive, Seed, ShareAboveZero, ShareBelowOne

# CLIP's probe: 97 penalties, searched from the best of 7 to its neighbours at distance 8, 4, 2 and 1.
PENALTIES: list[float] = np.logspace(-6, 2, num=97).tolist()
VALIDATION_SHARE = 0.2  # of the training images, without a validation set
MAX_ITERATIONS = 1000  # CLIP's
# Decrease in one step, relative to the objective, that ends a fit.
_TOLERANCE, _SEARCH_TOLERANCE = 1e-12, 1e-8
_REFRESH = 50  # L-BFGS steps between two factorisations of the curvature
_MEMORY = 20  # L-BFGS steps whose curvature is kept
_JITTER = 1e-12  # of the largest curvature, which keeps the matrix definite beside a constant feature
_BLOCK = 16_384  # rows multiplied at once: with 1,000 classes, 130 MB of fp64 scores
_FIRST_STD = 0.01  # of the first weights of MAE's head
_NORM_EPS, _NORM_MOMENTUM = 1e-6, 0.1  # of the batch norm before MAE's head
# Penalty and constant feature of few shots, and what is added to each feature's deviation.
L2, CONSTANT, _LEAST_DEVIATION = 1024.0, 100.0, 1e-5

# Collective. Returns the sum of a tensor over the processes.
Total = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LarsRecipe:
    """Training of the classifier by LARS. The defaults are the paper's for ImageNet-1K; `trust` is MAE's.

    Args:
        base_lr: learning rate for 256 images.
        warmup_epochs: epochs of a linear rise from zero; a cosine to zero follows.
        trust: factor of the ratio of a matrix's norm to its gradient's norm. Vectors move by the rate alone.
        batch_norm: whether to normalise each feature over the batch, as MAE's head does, without scale and shift.
        crop_scale: least and largest share of an image's area in a crop.
    """

    base_lr: Positive = 0.01
    batch_size: Count = 16_384
    epochs: Count = 90
    warmup_epochs: CountOrZero = 10
    momentum: ShareBelowOne = 0.9
    trust: Positive = 0.001
    batch_norm: bool = False
    crop_scale: tuple[ShareAboveZero, ShareAboveZero] = (0.08, 1.0)
    seed: Seed = 0

    def __post_init__(self) -> None:
        least, most = self.crop_scale
        if least > most:
            raise UserError(f"lars.crop_scale is {least} {most}; give the least share first")
        if self.warmup_epochs >= self.epochs:
            raise UserError(f"lars.epochs is {self.epochs}; expected more than lars.warmup_epochs {self.warmup_epochs}")

    def rate(self, epoch: float) -> float:
        peak = self.base_lr * self.batch_size / 256
        if epoch < self.warmup_epochs:
            return peak * epoch / self.warmup_epochs
        done = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return peak * 0.5 * (1 + math.cos(math.pi * done))


class LabelledSets(NamedTuple):
    """Training, test and validation images with the same classes."""

    class_names: list[str]
    train: TestSet
    test: TestSet
    validation: TestSet | None

    @classmethod
    def open(cls, train: str, test: TestSet, validation: str = "") -> "LabelledSets":
        """Open the sets. Each is a folder of shards, or has them in its folder `train` or `validation`."""
        sets = [TestSet.open(train, "train"), test]
        if validation:
            sets.append(TestSet.open(validation, "validation"))
        names = sets[0].class_names()
        if len(names) < 2:
            raise UserError(f"{train} has {len(names)} class; a probe needs 2 or more")
        for one in sets:
            if not len(one):
                raise UserError(f"{one.data} has no images; a probe needs shards with KEY.cls next to each image")
            if (theirs := one.class_names()) != names:
                own, other = next(pair for pair in zip_longest(names, theirs) if pair[0] != pair[1])
                raise UserError(
                    f"the classes of {train} and {one.data} differ: {own!r}, {other!r}; give both one classnames.txt"
                )
        return cls(names, sets[0], sets[1], sets[2] if validation else None)


class Rows(NamedTuple):
    """Features `(rows, dim)` of this process and their classes, int64 `(rows,)`."""

    features: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device | str) -> "Rows":
        return Rows(self.features.to(device), self.labels.to(device))

    def where(self, chosen: torch.Tensor) -> "Rows":
        return Rows(self.features[chosen], self.labels[chosen])


class LinearClassifier(NamedTuple):
    """Weights `(classes, dim)` and biases `(classes,)`, fp64; the bias of a class that is never answered is -inf."""

    weight: torch.Tensor
    bias: torch.Tensor

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Return the class scores of features on any device, fp64 `(rows, classes)` on the CPU."""
        parts = (part.to(self.weight.device, self.weight.dtype) for part in features.split(_BLOCK))
        return torch.cat([F.linear(part, self.weight, self.bias).cpu() for part in parts])


class Fit(NamedTuple):
    """A fitted classifier, its penalised objective, and the number of L-BFGS steps."""

    classifier: LinearClassifier
    objective: float
    iterations: int
    converged: bool


@dataclass(frozen=True)
class Probe(LabelledTask):
    """`top1` and `mean_per_class` of a linear classifier, in percent of images. Chance of `top1`: the commonest class.

    `data`, `train` and `validation` have shards with `KEY.cls` and `classnames.txt`.

    Args:
        train: folder of training images; by default the `train/` of `data`, and its `test/` is the test set.
        validation: folder of the images that choose the penalty; by default a fifth of the training images.
        solver: `lbfgs`, logistic regression on whole images; or `lars`, the paper's recipe on random crops.
        features: `pooled`, before the projection and not normalised; or `embeds`, after it and of unit length.
        l2: penalty of `lbfgs`, scikit-learn's 1 / C. By default searched; the last fit includes the validation images.
        seed: seed of the validation images' draw.
    """

    train: str = ""
    validation: str = ""
    solver: Literal["lbfgs", "lars"] = "lbfgs"
    features: Features = "pooled"
    l2: Positive | None = None
    lars: LarsRecipe = field(default_factory=LarsRecipe)
    seed: Seed = 0

    needs: ClassVar[str] = "features"
    protocol: ClassVar[str] = """Linear probe: a linear classifier on the frozen image tower's features of whole test
images, the short side resized to the model's size and the centre cut out. `lbfgs` is multinomial logistic regression;
its penalty is searched on validation images. `lars` is the paper's recipe on random crops."""
    hub_options: ClassVar[tuple[str, ...] | None] = ("train", "validation", "solver", "features")

    def __post_init__(self) -> None:
        if self.solver == "lars" and (self.l2 is not None or self.validation):
            raise UserError("solver is lars, which takes neither l2 nor validation; use solver lbfgs")

    def check(self) -> None:
        num_images, size = len(self._sets(TestSet.open(self.data)).train), self.lars.batch_size
        if self.solver == "lars" and size > num_images:
            raise UserError(
                f"lars.batch_size is {size:,}; expected at most the {num_images:,} training images. Fix: write lars: "
                f"{{batch_size: {max(num_images // 4, 1)}}}"
            )

    def other_sets(self) -> list[TestSet]:
        train = TestSet.open(self.train or self.data, "train")
        return [train, TestSet.open(self.validation, "validation")] if self.validation else [train]

    def evaluate(self, embedder: Embedder, test_set: TestSet) -> list[Result]:
        sets = self._sets(test_set)
        if self.solver == "lars":
            classifier, about = train_by_lars(embedder, sets, self.features, self.lars)
        else:
            classifier, about = self._regression(embedder, sets)
        n, num_classes = len(test_set), len(sets.class_names)
        labels = test_set.labels(embedder, num_classes)

        def measure(mine: slice, features: torch.Tensor) -> torch.Tensor:
            return hits_by_class(classifier.scores(features), labels[mine])

        all_labels, best, top1, _ = embedder.measured(test_set.source, measure, self.features).T
        counts = np.bincount(all_labels, minlength=num_classes)
        right = np.bincount(all_labels[best == 1], minlength=num_classes)
        made_by = {**self.made_by, **about, "num_train": len(sets.train)}
        results = [
            self.proportion("top1", int(top1.sum()), n, 100.0 * float(counts.max() / n)),
            self.estimated("mean_per_class", mean_per_class(right, counts), n, 100.0 / len(counts)),
        ]
        return [dataclasses.replace(result, made_by=made_by) for result in results]

    @property
    def made_by(self) -> dict[str, Any]:
        made_by = {**super().made_by, "solver": self.solver, "features": self.features}
        made_by.pop("lars", None)
        return made_by | (dataclasses.asdict(self.lars) if self.solver == "lars" else {})

    def _sets(self, test_set: TestSet) -> LabelledSets:
        return LabelledSets.open(self.train or self.data, test_set, self.validation)

    def _regression(self, embedder: Embedder, sets: LabelledSets) -> tuple[LinearClassifier, dict[str, Any]]:
        num_classes, total = len(sets.class_names), embedder.accelerator.reduce
        known = _embedded(embedder, sets.train, sets.class_names, self.features)
        _check_every_class(sets, known.labels, total)
        l2, start, about = self.l2, None, {}
        with embedder.bar(None, "steps") as bar:

            def step_done() -> None:
                embedder.alive()
                bar.update()

            if l2 is None:
                if sets.validation is None:
                    rows = embedder.rows(len(sets.train))
                    drawn = keyed_uniform(self.seed, "probe validation", rows, 1)[:, 0] < VALIDATION_SHARE
                    is_asked = torch.from_numpy(drawn).to(known.labels.device)
                    learned, asked = known.where(~is_asked), known.where(is_asked)
                else:
                    learned, asked = known, _embedded(embedder, sets.validation, sets.class_names, self.features)
                    known = Rows(*(torch.cat(both) for both in zip(learned, asked, strict=True)))
                if not all(total(part.labels.new_tensor([len(part.labels)])).item() for part in (learned, asked)):
                    raise UserError(f"train has {len(sets.train)} images, too few to split; give validation or l2")
                l2, start, accuracy = search_penalty(learned, asked, num_classes, total, step_done)
                about["validation_top1"] = 100.0 * accuracy
            last = fit(known, num_classes, l2, total, start=start, step_done=step_done)
        about |= {"l2": l2, "iterations": last.iterations, "converged": last.converged, "objective": last.objective}
        return last.classifier, about


def fit(
    rows: Rows,
    num_classes: int,
    l2: float,
    total: Total,
    *,
    tolerance: float = _TOLERANCE,
    start: LinearClassifier | None = None,
    step_done: Callable[[], None] = lambda: None,
) -> Fit:
    """Collective. Return the multinomial logistic regression of the rows of all processes, by scipy's L-BFGS.

    It is scikit-learn's `LogisticRegression(C=1 / l2)`: the sum of the cross-entropy over the rows plus `l2 / 2` times
    the sum of the squared weights, without the intercept. A class without a row on any process is never answered.

    L-BFGS alone needs thousands of steps for correlated features, features of large mean, or a tiny penalty. So its
    variables are scaled by the Cholesky factor of `X^T diag(w) X + l2`, with w each row's mean over classes of
    p (1 - p). The factor is computed anew every `_REFRESH` steps."""
    from scipy.optimize import minimize  # slow to import, and few tasks need it

    features, device = rows.features, rows.features.device
    present = total(torch.bincount(rows.labels, minlength=num_classes)).nonzero()[:, 0]
    blocks = list(zip(features.split(_BLOCK), torch.searchsorted(present, rows.labels).split(_BLOCK), strict=True))
    shape = (len(present), features.shape[1] + 1)
    penalty = features.new_full(shape[1:], l2 * (2 if len(present) == 2 else 1))
    penalty[-1] = 0.0
    weights = features.new_zeros(shape)
    if start is not None:
        weights = torch.cat([start.weight, start.bias[:, None]], dim=1)[present]
        weights = torch.where(weights.isfinite(), weights, 0.0)

    def curvature() -> torch.Tensor:
        matrix = features.new_zeros(shape[1], shape[1])
        for block, _ in blocks:
            shares = F.linear(block, weights[:, :-1], weights[:, -1]).softmax(dim=1)
            extended = torch.cat([block, torch.ones_like(shares[:, :1])], dim=1)
            matrix += extended.t() @ (extended * (shares * (1 - shares)).mean(dim=1, keepdim=True))
        matrix = total(matrix) + torch.diag(penalty)
        matrix.diagonal().add_(_JITTER * matrix.diagonal().max())
        return matrix

    def unscaled(point: np.ndarray) -> torch.Tensor:
        scaled = torch.from_numpy(point).to(device).view(shape)
        return torch.linalg.solve_triangular(factor, scaled, upper=False, left=False)

    def value_and_gradient(point: np.ndarray) -> tuple[float, np.ndarray]:
        at = unscaled(point).requires_grad_()
        loss = at.new_zeros(1)
        for block, labels in blocks:
            part = F.cross_entropy(F.linear(block, at[:, :-1], at[:, -1]), labels, reduction="sum")
            part.backward()
            loss += part.detach()
        assert at.grad is not None
        sums = total(torch.cat([loss, at.grad.flatten()]))
        at = at.detach()
        value = sums[0] + (penalty * at.square()).sum() / 2
        gradient = sums[1:].view(shape) + penalty * at
        scaled = torch.linalg.solve_triangular(factor.t(), gradient, upper=True, left=False)
        return value.item(), scaled.flatten().cpu().numpy()

    iterations, converged, value = 0, False, math.inf
    while not converged and iterations < MAX_ITERATIONS:
        factor = torch.linalg.cholesky(curvature())
        most = min(_REFRESH, MAX_ITERATIONS - iterations)
        minimum = minimize(
            value_and_gradient,
            (weights @ factor).flatten().cpu().numpy(),
            jac=True,
            method="L-BFGS-B",
            callback=lambda _: step_done(),
            options={"maxiter": most, "maxfun": 20 * most, "maxcor": _MEMORY, "ftol": tolerance, "gtol": 0.0},
        )
        weights, value = unscaled(minimum.x), float(minimum.fun)
        iterations += minimum.nit
        # Status 2 ends a line search whose decrease rounding hides.
        converged = minimum.status != 1

    weight = weights.new_zeros(num_classes, shape[1] - 1)
    bias = weights.new_full((num_classes,), -torch.inf)
    weight[present], bias[present] = weights[:, :-1], weights[:, -1]
    return Fit(LinearClassifier(weight, bias), value, iterations, converged)


def search_penalty(
    learned: Rows, asked: Rows, num_classes: int, total: Total, step_done: Callable[[], None] = lambda: None
) -> tuple[float, LinearClassifier, float]:
    """Collective. Return the penalty whose fit to `learned` answers `asked` best, that fit, and its accuracy."""
    fits: dict[int, LinearClassifier] = {}

    def accuracy(number: int) -> float:
        nearest = min(fits, key=lambda known: abs(known - number), default=None)
        fits[number] = fit(
            *(learned, num_classes, PENALTIES[number], total),
            tolerance=_SEARCH_TOLERANCE,
            start=None if nearest is None else fits[nearest],
            step_done=step_done,
        ).classifier
        right = fits[number].scores(asked.features).argmax(dim=1) == asked.labels.cpu()
        hits, count = total(asked.labels.new_tensor([int(right.sum()), len(right)])).tolist()
        return hits / count

    best, share = best_penalty(accuracy)
    return PENALTIES[best], fits[best], share


def best_penalty(accuracy: Callable[[int], float]) -> tuple[int, float]:
    """Return the index in `PENALTIES` of highest accuracy as CLIP searches it, and the accuracy."""
    known, last = cache(accuracy), len(PENALTIES) - 1
    peak = max(range(0, last + 1, 16), key=known)  # the smallest penalty in a tie
    for step in (8, 4, 2, 1):
        peak = max(max(peak - step, 0), peak, min(peak + step, last), key=known)
    return peak, known(peak)


class Head:
    """The classifier during training by LARS without weight decay (You et al. 2017, in MAE's form): fp64, the same on
    all processes."""

    def __init__(self, dim: int, num_classes: int, recipe: LarsRecipe, total: Total, device: torch.device | str):
        draws = torch.Generator().manual_seed(recipe.seed)
        weight = torch.randn(num_classes, dim, generator=draws, dtype=torch.float64) * _FIRST_STD
        self.weight = weight.to(device)
        self.bias = self.weight.new_zeros(num_classes)
        self._mean, self._variance = self.weight.new_zeros(dim), self.weight.new_ones(dim)
        self._moving = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        self._recipe, self._total = recipe, total

    def learn(self, rows: Rows, count: int, rate: float) -> float:
        """Collective. Take one step on this process's `rows` of a batch of `count`, and return the batch's loss."""
        features = self._normalised(rows.features, count) if self._recipe.batch_norm else rows.features
        weight, bias = self.weight.clone().requires_grad_(), self.bias.clone().requires_grad_()
        loss = F.cross_entropy(F.linear(features, weight, bias), rows.labels, reduction="sum")
        gradients = torch.autograd.grad(loss, (weight, bias))
        sums = self._total(torch.cat([loss.detach()[None], *(one.flatten() for one in gradients)])) / count
        per_sample_loss, of_weight, of_bias = sums.split([1, weight.numel(), len(bias)])
        self.step([of_weight.view_as(weight), of_bias], rate)
        return per_sample_loss.item()

    def step(self, gradients: list[torch.Tensor], rate: float) -> None:
        """Change weights and biases. Only the weights use the ratio of norms."""
        (of_weight, _), norm = gradients, self.weight.norm().item()
        ratio = self._recipe.trust * norm / of_weight.norm().item() if norm and of_weight.any() else 1.0
        parts = zip((self.weight, self.bias), gradients, self._moving, (ratio, 1.0), strict=True)
        for parameter, gradient, moving, factor in parts:
            moving.mul_(self._recipe.momentum).add_(gradient, alpha=factor)
            parameter.sub_(moving, alpha=rate)

    def classifier(self) -> LinearClassifier:
        """Return the classifier of raw features, with the batch norm folded into it."""
        if not self._recipe.batch_norm:
            return LinearClassifier(self.weight, self.bias)
        weight = self.weight / (self._variance + _NORM_EPS).sqrt()
        return LinearClassifier(weight, self.bias - weight @ self._mean)

    def _normalised(self, features: torch.Tensor, count: int) -> torch.Tensor:
        mean = self._total(features.sum(dim=0)) / count
        variance = self._total((features - mean).square().sum(dim=0)) / count
        self._mean.lerp_(mean, _NORM_MOMENTUM)
        self._variance.lerp_(variance * count / max(count - 1, 1), _NORM_MOMENTUM)
        return (features - mean) / (variance + _NORM_EPS).sqrt()


def train_by_lars(
    embedder: Embedder, sets: LabelledSets, features: Features, recipe: LarsRecipe
) -> tuple[LinearClassifier, dict[str, Any]]:
    """Collective. Return the classifier that LARS trains on random crops, and the number of steps and the last loss.

    Each epoch embeds new crops in a new order and leaves out the images after the last full batch. Each process keeps
    the features of its crops of an epoch, fp32. The classifier does not depend on the number of processes, but for
    rounding."""
    source, num_classes, total = sets.train.source, len(sets.class_names), embedder.accelerator.reduce
    my_labels = sets.train.labels(embedder, num_classes)
    _check_every_class(sets, my_labels.to(embedder.accelerator.device), total)
    labels = embedder.gathered(my_labels, len(source))
    steps, size, device = len(source) // recipe.batch_size, recipe.batch_size, embedder.accelerator.device
    head, loss = None, 0.0
    with embedder.bar(recipe.epochs * steps, "steps") as bar:
        for epoch in range(recipe.epochs):
            order = keyed_permutation(recipe.seed, "probe order", epoch, len(source))[: steps * size]
            crops = RandomCrops(source, order, epoch, embedder.image_size, recipe.crop_scale, recipe.seed)
            places = torch.from_numpy(embedder.rows(len(crops)))
            rows = Rows(embedder.unkept().my_images(crops, features), labels[torch.from_numpy(order)[places]])
            head = head or Head(rows.features.shape[1], num_classes, recipe, total, device)
            for step in range(steps):
                due, rate = places // size == step, recipe.rate(epoch + step / steps)
                loss = head.learn(Rows(rows.features[due].double(), rows.labels[due]).to(device), size, rate)
                bar.update()
    assert head is not None
    return head.classifier(), {"steps": recipe.epochs * steps, "loss": loss}


class RandomCrops(ChosenRows):
    """Random crops of rows of a source, resized to the model's square, half of them mirrored.

    A crop is an encoded image of the right size, so that any embedder can decode it. Encoding costs about a millisecond
    at 224 px. Seed, epoch and row determine the crop."""

    def __init__(
        self, source: TarSource, order: np.ndarray, epoch: int, image_size: int, scale: tuple[float, float], seed: int
    ):
        super().__init__(source, order)
        self._first_draw, self._image_size, self._scale, self._seed = epoch * len(source), image_size, scale, seed

    def read(self, shard: int, number: int) -> Sample:
        sample = super().read(shard, number)
        draws = keyed_uniform(self._seed, "probe crop", self._first_draw + self.rows[[number]], DRAWS_PER_CROP)[0]
        try:
            crop = decode_box(sample.image, draws, self._image_size, self._scale)
        except UndecodableImage as error:
            raise UserError(f"training image {sample.name} cannot be decoded: {error}") from error
        bgr = cv2.cvtColor(crop, cv2.COLOR_RGB2BGR)
        png = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
        return dataclasses.replace(sample, image=png)


def _embedded(embedder: Embedder, images: TestSet, class_names: list[str], features: Features) -> Rows:
    labels = images.labels(embedder, len(class_names))
    rows = Rows(embedder.unkept().my_images(images.source, features).double(), labels)
    return rows.to(embedder.accelerator.device)


def _check_every_class(sets: LabelledSets, labels: torch.Tensor, total: Total) -> None:
    counts = total(torch.bincount(labels, minlength=len(sets.class_names)))
    if not counts.all():
        name = sets.class_names[int((counts == 0).nonzero()[0, 0])]
        raise UserError(
            f"class {name!r} has no image in {sets.train.data}; add one, or remove the name from classnames.txt and "
            "renumber the other classes"
        )


@dataclass(frozen=True)
class FewShot(LabelledTask):
    """`1_shot`, `5_shot`, ...: top-1 in percent of the test images, as the mean over draws of the training images.

    `data` and `train` have shards with `KEY.cls` and `classnames.txt`. Only the drawn training images are embedded. A
    class with fewer images gives all of them.

    Args:
        train: folder of training images; by default the `train/` of `data`, and its `test/` is the test set.
        shots: numbers of training images a class.
        seeds: seeds of the draws; the images of fewer shots are a subset of those of more.
    """

    train: str = ""
    shots: list[Count] = field(default_factory=lambda: [1, 5, 10, 25])
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2])

    needs: ClassVar[str] = "features"
    protocol: ClassVar[str] = """Few-shot classification: ridge regression in closed form (penalty 1,024) on features
before the projection, scaled to mean 0 and deviation 1, of whole images. The figure is the mean over draws of the
training images. Its interval counts both the draws (Student's t) and the test images."""

    def __post_init__(self) -> None:
        if not self.shots:
            raise UserError(f"shots is {self.shots}; list one number or more, such as [1, 5]")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds is {self.seeds}; list one number or more, all different")

    def check(self) -> None:
        LabelledSets.open(self.train or self.data, TestSet.open(self.data))

    def other_sets(self) -> list[TestSet]:
        return [TestSet.open(self.train or self.data, "train")]

    def evaluate(self, embedder: Embedder, test_set: TestSet) -> list[Result]:
        sets = LabelledSets.open(self.train or self.data, test_set)
        classifiers = self._classifiers(embedder, sets)
        labels, right = test_set.labels(embedder, len(sets.class_names)), [0] * len(classifiers)
        for mine, features in embedder.image_batches(test_set.source, "pooled"):
            for number, classifier in enumerate(classifiers):
                right[number] += int((classifier.scores(features).argmax(dim=1) == labels[mine]).sum())
        n, draws, chance, results = len(test_set), len(self.seeds), 100.0 / len(sets.class_names), []
        for shots, hits in zip(self.shots, np.array(embedder.total(right)).reshape(-1, draws), strict=True):
            mean = float(hits.mean()) / n
            low, high = wilson(mean * n, n)
            spread = student(draws - 1) * float((hits / n).std(ddof=1)) / math.sqrt(draws) if draws > 1 else 0.0
            down, up = (math.hypot(end - mean, spread) for end in (low, high))
            share = Estimate(mean, max(mean - down, 0.0), min(mean + up, 1.0))
            label, headline = f"{shots}-shot top-1", shots == self.shots[-1]
            results.append(self.estimated(f"{shots}_shot", share, n, chance, headline, label=label))
        return results

    def _classifiers(self, embedder: Embedder, sets: LabelledSets) -> list[LinearClassifier]:
        """Collective. Return the classifier of each number of shots and, within it, of each seed."""
        source, num_classes = sets.train.source, len(sets.class_names)
        labels = embedder.gathered(sets.train.labels(embedder, num_classes), len(source))
        ranks = [_ranks(labels.numpy(), seed) for seed in self.seeds]
        drawn = np.flatnonzero(np.min(ranks, axis=0) < max(self.shots))
        mine = drawn[embedder.rows(len(drawn))]
        features = embedder.unkept().my_images(ChosenRows(source, drawn), "pooled")
        device, total = embedder.accelerator.device, embedder.accelerator.reduce
        known = Rows(features, labels[torch.from_numpy(mine)]).to(device)
        return [
            ridge(known.where(torch.from_numpy(rank[mine] < shots).to(device)), num_classes, total)
            for shots in self.shots
            for rank in ranks
        ]


def ridge(rows: Rows, num_classes: int, total: Total) -> LinearClassifier:
    """Collective. Return the ridge regression of the rows of all processes, fp64. Only sums meet.

    It is big_vision's few-shot probe (`fewshot_lsr`). Each feature is scaled to mean 0 and deviation 1 over the rows. A
    constant feature of 100 is the intercept. The targets are 1 for a row's class and -1 for the others."""
    features = rows.features.double()
    count = total(features.new_tensor([len(features)]))
    mean = total(features.sum(dim=0)) / count
    deviation = (total((features - mean).square().sum(dim=0)) / count).sqrt() + _LEAST_DEVIATION
    inputs = torch.cat([(features - mean) / deviation, features.new_full((len(features), 1), CONSTANT)], dim=1)
    targets = features.new_full((len(features), num_classes), -1.0)
    targets.scatter_(1, rows.labels[:, None], 1.0)
    left, right = total(inputs.t() @ inputs), total(inputs.t() @ targets)
    left.diagonal().add_(L2)
    solved = torch.cholesky_solve(right, torch.linalg.cholesky(left))
    weight = solved[:-1].t() / deviation
    return LinearClassifier(weight, CONSTANT * solved[-1] - weight @ mean)


def _ranks(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return each row's place in a random order of its class, which depends on the seed and the row numbers."""
    noise = keyed_uniform(seed, "few shot", np.arange(len(labels)), 1)[:, 0]
    order = np.lexsort((noise, labels))
    firsts = np.searchsorted(labels[order], labels[order])
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[order] = np.arange(len(labels)) - firsts
    return ranks
