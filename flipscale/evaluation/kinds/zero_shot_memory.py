"""Zero-shot classification with a memory: the captions of the nearest stored training images vote too."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from flipscale.data.features import PrecomputedFeatures, read_about, stored_sizes
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.zero_shot import PromptedTask, ZeroShot
from flipscale.evaluation.metrics import hits_by_class
from flipscale.evaluation.results import THIS_MODEL, Result, change_of
from flipscale.evaluation.test_set import TestSet
from flipscale.io.digests import weights_digest
from flipscale.io.errors import UserError
from flipscale.io.options import Count, Share
from flipscale.io.text_table import markdown_table

# Stored images searched at once, and scores of classes by captions held at once.
_BLOCK, _MOST_SCORES = 16_384, 1 << 25
_SHARD = 1 << 32  # a stored pair is `_SHARD * shard + number`

_log = logging.getLogger(__name__)


class Memory:
    """The training pairs of a folder of `flipscale prepare embed`, without those that could not be embedded.

    Raises:
        UserError: the features are of another model, without texts, of crops, not projected, or incomplete.
    """

    def __init__(self, folder: Path, embedder: Embedder):
        about, sizes = read_about(folder), stored_sizes(folder)
        self.images, self.texts = (PrecomputedFeatures(folder, tower, sizes) for tower in ("images", "texts"))
        own = "crops" if "crops" in about["images"] else about["features"], self.images.width, about["model_digest"]
        model = "embeds", embedder.texts(["a"]).shape[1], weights_digest(embedder.model.parameters())
        if own != model:
            had, expected = (f"{kind} of width {width} by weights {of:.12}" for kind, width, of in (own, model))
            fix = "`prepare embed` with this model and --dims"
            raise UserError(f"memory {folder} has {had}; expected {expected}. Fix: {fix}")
        self.scale, self._sizes = about.get("logit_scale", 100.0), sizes
        self._device = embedder.accelerator.device

    def nearest(self, batches: Sequence[torch.Tensor], k: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the cosines and the numbers of the k nearest pairs, or of all, of each image of each batch: fp32 and
        int64 `(images, k)`. The memory is read once, block by block. Raise UserError if no pair is usable."""
        found = [(torch.empty(len(batch), 0), torch.empty(len(batch), 0, dtype=torch.int64)) for batch in batches]
        for pairs, block in self._blocks():
            for number, (batch, (cosines, known)) in enumerate(zip(batches, found, strict=True)):
                new = (batch.to(block.device) @ block.t()).topk(min(k, len(block)), dim=1)
                cosines = torch.cat([cosines, new.values.cpu()], dim=1)
                known = torch.cat([known, pairs[new.indices.cpu()]], dim=1)
                best = cosines.topk(min(k, cosines.shape[1]), dim=1)
                found[number] = best.values, known.gather(1, best.indices)
        if any(not known.shape[1] for _, known in found):
            raise UserError(f"memory {self.images.folder} has no pair whose image and text were both embedded")
        return found

    def _blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield pairs, int64 on the CPU, and their images' embeddings, fp32 on the device."""
        for shard, size in enumerate(self._sizes):
            for numbers in np.split(np.arange(size), range(_BLOCK, size, _BLOCK)):
                images, texts = (one.rows(np.full_like(numbers, shard), numbers) for one in (self.images, self.texts))
                usable = np.flatnonzero(np.isfinite(images[:, 0]) & np.isfinite(texts[:, 0]))
                block = torch.from_numpy(images[usable]).to(self._device).float()
                yield torch.from_numpy(shard * _SHARD + numbers[usable]), block


@dataclass(frozen=True)
class ZeroShotMemory(ZeroShot):
    """The metrics of `zero_shot` with a memory of training pairs, and `top1_gain` over zero-shot alone.

    The probability of class c for image x is (1 - w) p(c) + w q(c), the blend of kNN-LM (arXiv 1911.00172). p is the
    softmax of s cos(x, c). q is proportional to the sum of exp(s cos(x, i) + s cos(t, c)) over the k stored images i
    nearest to x, with captions t, and s is the model's own scale: Tip-Adapter's sum (arXiv 2111.03930), with captions
    in place of labels as in RECO (arXiv 2306.07196).

    Args:
        memory: folder of `embeds` that `flipscale prepare embed` wrote with the same model.
        validation: folder of the images that choose k and w by top-1, laid out as `data`. One k and one w need none.
        neighbours: k to try.
        weights: w to try, 0 for zero-shot alone, 1 for the memory alone. The first of equals is chosen.
    """

    memory: str = ""
    validation: str = ""
    neighbours: list[Count] = field(default_factory=lambda: [1, 4, 16, 64])
    weights: list[Share] = field(default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])

    hub_task: ClassVar[str] = "image-classification"
    hub_options: ClassVar[tuple[str, ...] | None] = ("memory", "templates", "labels")
    protocol: ClassVar[str] = """Zero-shot with a memory: class probabilities are blended with those of the captions of
the nearest training images, whose number and weight validation images choose. Gains are of paired answers."""

    def check(self) -> None:
        super().check()
        tried = len(self.neighbours) * len(self.weights)
        if not (self.memory and read_about(Path(self.memory)) and tried and (self.validation or tried == 1)):
            raise UserError(
                f"memory is {self.memory!r}, validation {self.validation!r}, neighbours {self.neighbours}, weights "
                f"{self.weights}; expected a folder of `flipscale prepare embed`, and one of images that choose among "
                "the numbers, or one number each"
            )
        if self.validation:
            PromptedTask.check(replace(self, data=self.validation, task=""))
            if Path(self.validation).resolve() == Path(self.data).resolve():
                fix = "choose k and w on other images"
                raise UserError(f"validation is {self.validation}, the test images. Fix: {fix}")
        for images in (TestSet.open(self.data), *self.other_sets()):
            if images.source.contents_digest(in_order=True) == self.made_by["pairs_digest"]:
                _log.warning("%s: the memory %s has the images of %s; use others", self.name, self.memory, images.data)

    def other_sets(self) -> list[TestSet]:
        return [TestSet.open(self.validation, "validation")] if self.validation else []

    @property
    def made_by(self) -> dict[str, Any]:
        return {**super().made_by, "pairs_digest": read_about(Path(self.memory))["shards_digest"]}

    def evaluate(self, embedder: Embedder, test_set: TestSet) -> list[Result]:
        chosen = self._chosen(embedder) if self.validation else self
        known = replace(embedder, kept={} if embedder.kept is None else embedder.kept)
        results = ZeroShot.evaluate(chosen, known, test_set)
        alone = ZeroShot(**{one.name: getattr(self, one.name) for one in fields(ZeroShot)}).evaluate(known, test_set)
        for new, old in zip(results[:], alone, strict=True):
            if new.outcomes:
                gain = replace(change_of(new, old), who=THIS_MODEL, metric=f"{new.metric}_gain")
                results.append(replace(gain, label=f"{new.shown} gain over zero-shot"))
        return results

    def scored(self, embedder: Embedder, test_set: TestSet) -> Iterator[tuple[slice, torch.Tensor]]:
        return ((mine, scores) for mine, (scores,) in self._scored(embedder, test_set))

    def _chosen(self, embedder: Embedder) -> "ZeroShotMemory":
        """Collective. Return the task with the w and the k of most right answers on the validation images."""
        (images,), hits = self.other_sets(), torch.zeros(len(self.weights) * len(self.neighbours), dtype=torch.int64)
        labels = images.labels(embedder, len(images.class_names()))
        for mine, blends in self._scored(embedder.unkept(), images):
            hits += torch.stack([hits_by_class(one, labels[mine])[:, 2].sum() for one in blends])
        shares = np.array(embedder.total(hits.tolist())).reshape(len(self.weights), -1) / len(images)
        weight, k = list(product(self.weights, self.neighbours))[shares.argmax()]
        if embedder.accelerator.is_main_process:
            rows = ([f"{w:g}", *map("{:.1%}".format, row)] for w, row in zip(self.weights, shares, strict=True))
            table = markdown_table([["w", *(f"k = {one}" for one in self.neighbours)], *rows], num_names=1)
            _log.info("%s: w is %g and k is %d by top-1 on %s:\n%s", self.name, weight, k, self.validation, table)
        return replace(self, neighbours=[k], weights=[weight])

    def _scored(self, embedder: Embedder, test_set: TestSet) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """Collective, to its end. Yield the places of some of this process's rows, and their class probabilities
        `(rows, classes)` for each w and k."""
        memory, score = Memory(Path(self.memory), embedder), self.classifier(embedder, test_set)
        places, batches = zip(*embedder.image_batches(test_set.source), strict=True)
        size = max(1, _MOST_SCORES // (max(self.neighbours) * len(test_set.class_names())))
        for mine, batch, near in zip(places, batches, memory.nearest(batches, max(self.neighbours)), strict=True):
            for first in range(0, len(batch), size):
                images, cosines, pairs = (one[first : first + size] for one in (batch, *near))
                p = (memory.scale / 100 * score(images)).softmax(dim=1)
                texts = torch.from_numpy(memory.texts.rows(*divmod(pairs.flatten().numpy(), _SHARD))).float()
                fits = score(texts).view(*pairs.shape, -1) / 100  # cosines of captions and classes
                logits = memory.scale * (cosines[..., None] + fits)
                q = {k: logits[:, :k].logsumexp(dim=1).softmax(dim=1) for k in self.neighbours}
                blends = [p.lerp(q[k], w) for w, k in product(self.weights, self.neighbours)]
                yield slice(mine.start + first, mine.start + first + len(images)), blends
