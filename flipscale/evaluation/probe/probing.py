"""A probe from its sets to its answers: logistic regression with a searched penalty, or LARS on random crops."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from flipscale.data.randomness import keyed_uniform
from flipscale.evaluation.embedding import Features
from flipscale.evaluation.probe.lars import LarsRecipe, train_lars
from flipscale.evaluation.probe.logistic import SEARCH_TOLERANCE, Fit, fit
from flipscale.evaluation.probe.penalty import PENALTIES, search_penalty
from flipscale.evaluation.probe.rows import Classifier, Rows, Total, class_counts, total_of
from flipscale.evaluation.probe.sets import LabelledSet, Sets
from flipscale.io.errors import UserError

if TYPE_CHECKING:
    from flipscale.evaluation.embedding import Embedder

Solver = Literal["lbfgs", "lars"]
VALIDATION_SHARE = 0.2  # of the training images, where there is no validation set
_MOST_FITS = 7 + 4 * 2 + 1  # of a search, and the last


@dataclass(frozen=True)
class Probed:
    """What a trained classifier answered.

    Args:
        hits: right answers of each class of the test set, int64 `(classes,)`.
        counts: its images.
        about: how the classifier was reached.
    """

    hits: np.ndarray
    counts: np.ndarray
    about: dict[str, Any]


def probe_by_regression(
    embedder: "Embedder", sets: Sets, features: Features = "pooled", l2: float | None = None, seed: int = 0
) -> Probed:
    """Collective. Return what is answered by multinomial logistic regression on the features of whole
    images.

    Args:
        embedder: of the frozen model.
        sets: each is embedded once, and a process keeps its rows.
        features: `pooled`, before the projection, or `embeds`, after it.
        l2: the penalty, 1 / C of scikit-learn; left out, it is searched on validation images, and the classifier is
            then fitted to these too.
        seed: draws the validation images out of the training images.

    Raises:
        ValueError: a label is missing or out of range, a class has no training image, an image cannot be decoded.
        OSError: a shard cannot be read.
    """
    total, num_classes = total_of(embedder.accelerator), len(sets.train.class_names)
    known = _rows(embedder, sets.train, features, total)
    about: dict[str, Any] = {}
    with _fits_bar(embedder, 1 if l2 is not None else _MOST_FITS) as (bar, step_done):
        start: Fit | None = None
        if l2 is None:
            if sets.validation is None:
                drawn = _drawn(embedder, sets.train, seed)
                learned, asked = known.where(~drawn), known.where(drawn)
            else:
                learned, asked = known, _rows(embedder, sets.validation, features, total, every_class=False)
                known = learned.and_also(asked)
            if not all(total(learned.labels.new_tensor([len(part)])).item() for part in (learned, asked)):
                raise UserError(
                    f"{len(sets.train.source)} training images are too few to set a fifth aside; give --validation "
                    "DIR, or the penalty as --l2"
                )
            start, share = _search(learned, asked, num_classes, total, bar, step_done)
            l2 = start.l2
            about["validation_top1"] = 100.0 * share
        last = fit(known, num_classes, l2, total, start=start.classifier if start else None, step_done=step_done)
        bar.update(1)
    about |= {"l2": l2, "iterations": last.iterations, "converged": last.converged, "objective": last.objective}
    return _tested(embedder, sets, last.classifier, features, about)


def probe_by_lars(embedder: "Embedder", sets: Sets, features: Features, recipe: LarsRecipe) -> Probed:
    """Collective. Return what is answered by a linear classifier that LARS trained on random crops.

    Args:
        embedder: of the frozen model.
        sets: the training images are embedded in each epoch; validation images are not used.
        features: `pooled`, before the projection, or `embeds`, after it.
        recipe: how it is trained.

    Raises:
        ValueError: a label is missing or out of range, a class has no training image, the batch is larger than the
            data, an image cannot be decoded.
        OSError: a shard cannot be read.
    """
    source, names = sets.train.source, sets.train.class_names
    recipe.check(len(source))
    mine = sets.train.labels(embedder)
    _check_every_class(sets.train, mine, total_of(embedder.accelerator), embedder.accelerator.device)
    labels = embedder.gathered(mine[:, None], len(source))[:, 0]
    steps = recipe.epochs * (len(source) // recipe.batch_size)
    last_loss = 0.0
    with tqdm(total=steps, desc="probe", unit=" steps", leave=False, delay=5, disable=_hidden(embedder)) as bar:

        def step_done(loss: float) -> None:
            nonlocal last_loss
            last_loss = loss
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(1)

        classifier = train_lars(embedder, source, labels, len(names), features, recipe, step_done)
    return _tested(embedder, sets, classifier, features, {"steps": steps, "loss": last_loss})


def _rows(
    embedder: "Embedder", images: LabelledSet, features: Features, total: Total, every_class: bool = True
) -> Rows:
    """Collective. Return this process's rows of a set, fp64, on the device."""
    labels, device = images.labels(embedder), embedder.accelerator.device
    if every_class:
        _check_every_class(images, labels, total, device)
    return Rows(_quiet(embedder).my_images(images.source, features).double(), labels).to(device)


def _quiet(embedder: "Embedder") -> "Embedder":
    """Return an embedder whose images do not count as images of the test set where a bar counts these."""
    return embedder if embedder.progress is None else dataclasses.replace(embedder, progress=lambda images: None)


def _check_every_class(images: LabelledSet, labels: torch.Tensor, total: Total, device: torch.device) -> None:
    counts = class_counts(labels.to(device), len(images.class_names), total)
    if not counts.all():
        name = images.class_names[int((counts == 0).nonzero()[0, 0])]
        raise UserError(
            f"class {name!r} has no image in {images.data}; add one, or take the name out of classnames.txt and number "
            "the others anew"
        )


def _drawn(embedder: "Embedder", train: LabelledSet, seed: int) -> torch.Tensor:
    """Return which of this process's training images are for validation, bool `(rows,)`."""
    rows = embedder.rows(len(train.source))
    drawn = keyed_uniform(seed, "probe validation", rows, 1)[:, 0] < VALIDATION_SHARE
    return torch.from_numpy(drawn).to(embedder.accelerator.device)


def _search(
    learned: Rows, asked: Rows, num_classes: int, total: Total, bar: tqdm, step_done: Callable[[], None]
) -> tuple[Fit, float]:
    """Collective. Return the fit to `learned` whose penalty answers `asked` best, and its share of right answers."""
    fits: dict[int, Fit] = {}
    shares: dict[int, float] = {}

    def accuracy(number: int) -> float:
        near = min(fits, key=lambda known: abs(known - number), default=None)
        start = None if near is None else fits[near].classifier
        bar.set_description(f"l2 {PENALTIES[number]:.2g}")
        fits[number] = fit(
            *(learned, num_classes, PENALTIES[number], total),
            tolerance=SEARCH_TOLERANCE,
            start=start,
            step_done=step_done,
        )
        hits, counts = _hits(fits[number].classifier, asked, num_classes, total)
        bar.update(1)
        shares[number] = float(hits.sum() / counts.sum())
        return shares[number]

    best = search_penalty(accuracy)
    return fits[best], shares[best]


def _hits(classifier: Classifier, rows: Rows, num_classes: int, total: Total) -> tuple[np.ndarray, np.ndarray]:
    """Collective. Return how many rows of each class are answered rightly, and how many there are."""
    right = rows.labels[classifier.answers(rows.features) == rows.labels]
    hits, counts = (class_counts(labels, num_classes, total) for labels in (right, rows.labels))
    return hits.cpu().numpy(), counts.cpu().numpy()


def _tested(
    embedder: "Embedder", sets: Sets, classifier: Classifier, features: Features, about: dict[str, Any]
) -> Probed:
    """Collective. Return what the classifier answers of the test images, which pass once."""
    total, num_classes, device = total_of(embedder.accelerator), len(sets.test.class_names), embedder.accelerator.device
    labels = sets.test.labels(embedder)
    counted = torch.zeros(2, num_classes, dtype=torch.int64, device=device)
    seen = 0
    for rows, found in embedder.image_batches(sets.test.source, features):
        theirs = labels[seen : seen + len(rows)].to(device)
        seen += len(rows)
        right = theirs[classifier.answers(found.to(device)) == theirs]
        counted += torch.stack([torch.bincount(some, minlength=num_classes) for some in (right, theirs)])
    hits, counts = total(counted).cpu().numpy()
    return Probed(hits, counts, {**about, "num_train": len(sets.train.source)})


@contextmanager
def _fits_bar(embedder: "Embedder", fits: int) -> Iterator[tuple[tqdm, Callable[[], None]]]:
    """Yield a bar over fits, and what to call after each step of one."""
    with tqdm(total=fits, desc="probe", unit=" fits", leave=False, delay=5, disable=_hidden(embedder)) as bar:
        steps = 0

        def step_done() -> None:
            nonlocal steps
            steps += 1
            embedder.alive()
            bar.set_postfix(steps=steps, refresh=steps % 10 == 0)

        yield bar, step_done


def _hidden(embedder: "Embedder") -> bool | None:
    """Return what tqdm takes for: only on the main process, and only if it is a terminal."""
    return None if embedder.accelerator.is_main_process else True
