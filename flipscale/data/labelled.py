"""Batches of images with class numbers or questions, and RandAugment, mixup and cutmix of images."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from flipscale.data.pairs import PairDataset
from flipscale.data.randomness import keyed_uniform
from flipscale.data.samples import BadSample, Fault, Sample, Source
from flipscale.io.errors import UserError, needed
from flipscale.model.configuration_flip import IMAGENET_MEAN
from flipscale.recipe.augment import AugmentRecipe

# Score of an answer by the number of people who gave it, 4 or more scoring 1: METER (arXiv 2111.02387).
SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)
_TRANSLATE = 0.45  # largest shift as a fraction of an image's side, as in timm's `create_transform`
_FINETUNE = "'flipscale[finetune]'"


@dataclass(eq=False, repr=False, kw_only=True)
class LabelledDataset(PairDataset):
    """Labelled images by global position. A batch has the columns of `PairDataset` without captions, and:

    * `labels` int64 `(batch, 1)`: class numbers below `num_classes`.

    If `recipe.augment` mixes images, each two neighbours are mixed. `labels` are then `(batch, 2)`, an image's own
    class and the other's, and `label_shares` fp32 `(batch, 2)` are their shares.

    Raise UserError if the mask is impossible, or the shards have no class numbers.
    """

    annotation: ClassVar[str] = "class number"
    num_classes: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self.augment = Augment(self.recipe.augment, self.seed, self.shape.image_size)
        _check_labels(self.source)

    def _annotation(self, sample: Sample, draws: list[float]) -> int:
        return _number(sample, "class", "num_classes", self.num_classes)

    def _images(self, where: np.ndarray) -> Iterator[tuple[np.ndarray, Any, Fault | None]]:
        images = zip(where.tolist(), super()._images(where), strict=True)
        varied = ((self.augment.varied(image, position), label, fault) for position, (image, label, fault) in images)
        if not self.recipe.augment.mixes:
            yield from varied
            return
        assert len(where) % 2 == 0, "a micro-batch has whole couples"
        for position in where[::2].tolist():
            (one, label, fault), (other, other_label, other_fault) = next(varied), next(varied)
            one, other, share = self.augment.mixed(one, other, position)
            yield one, (label, other_label, share), fault
            yield other, (other_label, label, share), other_fault

    def _annotation_columns(self, labels: list[Any], where: np.ndarray) -> dict[str, torch.Tensor]:
        if not self.recipe.augment.mixes:
            return {"labels": torch.tensor(labels, dtype=torch.int64)[:, None]}
        *both, shares = zip(*labels, strict=True)
        own = torch.tensor(shares, dtype=torch.float32)
        return {"labels": torch.tensor(both, dtype=torch.int64).T, "label_shares": torch.stack([own, 1.0 - own], dim=1)}


@dataclass(eq=False, repr=False, kw_only=True)
class QuestionDataset(PairDataset):
    """Questions about images by global position. A batch has `PairDataset`'s columns, with questions as captions, and:

    * `labels` fp32 `(batch, num_answers)`: score of each answer, from 0 to 1.

    `KEY.cls` is the number of a sample's one answer. Or `KEY.npy` counts people for each answer and, last, any other.
    """

    annotation: ClassVar[str] = "question with an answer"
    num_answers: int

    def _annotation(self, sample: Sample, draws: list[float]) -> tuple[list[str], np.ndarray]:
        question, scores = super()._annotation(sample, draws), np.zeros(self.num_answers, np.float32)
        try:
            votes = sample.read_array() if sample.read_array else None
        except BadSample:
            raise
        except ValueError as error:
            raise BadSample(str(error), "wrong_votes") from error
        if votes is None:
            scores[_number(sample, "answer", "num_answers", self.num_answers)] = 1.0
            return question, scores
        if votes.shape != (self.num_answers + 1,) or votes.dtype.kind not in "iu" or not (votes >= 0).all():
            raise BadSample(
                f"KEY.npy is {votes.dtype} {votes.shape}; it must count the people who gave each of the "
                f"{self.num_answers} answers, and any other",
                "wrong_votes",
            )
        scores[:] = np.array(SCORES, np.float32)[np.minimum(votes[:-1], len(SCORES) - 1)]
        return question, scores

    def _texts(self, annotation: Any) -> list[str]:
        return annotation[0]

    def _annotation_columns(self, annotations: list[Any], where: np.ndarray) -> dict[str, torch.Tensor]:
        tokens = super()._annotation_columns([question for question, _ in annotations], where)
        return {**tokens, "labels": torch.from_numpy(np.stack([scores for _, scores in annotations]))}


def _number(sample: Sample, what: str, field: str, count: int) -> int:
    """Return the class or answer of a sample, below `count`, the value of `loss.options.FIELD`."""
    if sample.label is None:
        raise BadSample("there is no KEY.cls with a number" + ", and no KEY.npy" * (what == "answer"), "missing_label")
    if sample.label >= count:
        raise UserError(
            f"{sample.name} has {what} {sample.label}, counted from 0, and loss.options.{field} is {count}; set it "
            "to the number of lines in classnames.txt"
        )
    return sample.label


def _check_labels(source: Source) -> None:
    """Raise if the first good sample has no class number, because then, as a rule, no sample has one."""
    for shard, size in enumerate(source.shard_sizes):
        try:
            if size and source.read(shard, 0).label is not None:
                return
        except BadSample:
            continue
        if size:
            raise UserError(
                f"{source.shard_name(shard)}: {source.key(shard, 0)} has no class number, which loss.kind 'classify' "
                "learns; give shards with KEY.cls, as `flipscale prepare shards --labels` writes them"
            )


class Augment:
    """A recipe's variations of uint8 images, by timm, with draws keyed by the samples' positions.

    The paper's fine-tuning, like MAE's, uses timm, which draws from the global generators of `random` and NumPy. They
    are seeded with a sample's own number for the call and restored after it. So a sample is varied in the same way in
    any worker, at any number of processes, and after a resume. Raise UserError if timm is not installed, or does not
    know the words of `rand_augment`.
    """

    def __init__(self, recipe: AugmentRecipe, seed: int, image_size: int):
        self.recipe = recipe
        self.seed = seed
        self._rand_augment: Callable[[Image.Image], Image.Image] | None = None
        if recipe.rand_augment is not None:
            self._rand_augment = _rand_augment(recipe.rand_augment, image_size)
        if recipe.cutmix_alpha > 0.0:
            needed("timm.data", f"data.augment.cutmix_alpha is {recipe.cutmix_alpha}, which needs timm", _FINETUNE)

    def varied(self, image: np.ndarray, position: int) -> np.ndarray:
        """Return an image, uint8 RGB `(height, width, 3)`, after RandAugment with the draws of its position."""
        if self._rand_augment is None:
            return image
        with _seeded(self.seed, "augment", position):
            return np.asarray(self._rand_augment(Image.fromarray(image)))

    def mixed(self, one: np.ndarray, other: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Return two images, each with a part of the other, and the share of its own, by the draws of the first one."""
        mixup, cutmix = self.recipe.mixup_alpha, self.recipe.cutmix_alpha
        with _seeded(self.seed, "mix", position):
            cuts = cutmix > 0.0 and (mixup == 0.0 or random.random() < 0.5)
            alpha = cutmix if cuts else mixup
            share = random.betavariate(alpha, alpha)
            if cuts:
                return _cut(one, other, share)
        first, second = one.astype(np.float32), other.astype(np.float32)
        blend, rest = share * first + (1.0 - share) * second, share * second + (1.0 - share) * first
        return np.rint(blend).astype(np.uint8), np.rint(rest).astype(np.uint8), share


def _cut(one: np.ndarray, other: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Return two images that exchanged a box; the share is counted in pixels."""
    from timm.data.mixup import cutmix_bbox_and_lam

    (top, bottom, left, right), share = cutmix_bbox_and_lam(one.shape[:2], share)
    mixed, rest = one.copy(), other.copy()
    mixed[top:bottom, left:right] = other[top:bottom, left:right]
    rest[top:bottom, left:right] = one[top:bottom, left:right]
    return mixed, rest, float(share)


def _rand_augment(policy: str, image_size: int) -> Callable[[Image.Image], Image.Image]:
    timm_data = needed("timm.data", f"data.augment.rand_augment is {policy!r}, which needs timm", _FINETUNE)
    options = {
        "translate_const": int(image_size * _TRANSLATE),
        "img_mean": tuple(min(255, round(255 * mean)) for mean in IMAGENET_MEAN),
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        return timm_data.rand_augment_transform(policy, options)
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"data.augment.rand_augment is {policy!r}, which timm does not know ({' '.join(str(error).split())}); use "
            "such as 'rand-m9-mstd0.5-inc1'"
        ) from error


@contextmanager
def _seeded(seed: int, purpose: str, position: int) -> Iterator[None]:
    """Seed the global generators with a position's own number, and restore them afterwards."""
    before, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    number = int(keyed_uniform(seed, purpose, np.array([position]), 1)[0, 0] * 2**32)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(of_numpy)  # noqa: NPY002
