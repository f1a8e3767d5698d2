"""Composition: the right caption of an image among wrong ones of almost the same words."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.intervals import Z95, clustered_share, normal
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import CLASS_NAMES, TestSet, read_class_names, read_text
from flipscale.io.errors import UserError

_Choice = tuple[str, ...]  # the right caption of an image, and the wrong ones


@dataclass(frozen=True)
class ImageCaptionSelection(Task):
    """`accuracy`: percent of images that are nearer to their caption than to each wrong one. SugarCrepe (arXiv
    2306.14610) and ARO (2210.01936) have this form.

    `data` has shards of images with captions, one per line of `KEY.txt`. The first is right, the others are wrong.
    `classnames.txt` names subsets, and `KEY.cls` is the number of the image's. `accuracy_SUBSET` is the accuracy of a
    subset, and `macro_accuracy` the mean over subsets. An image without `KEY.cls` counts in `accuracy` alone.

    Args:
        pairs: whether consecutive images have the same two captions, as in Winoground (2204.03162). A pair has a
            `text_score` if each image is nearer to its own caption, an `image_score` if each caption is nearer to its
            own image, and a `group_score` if it has both.
    """

    pairs: bool = False

    protocol: ClassVar[str] = """Image-caption selection: an image is a hit if its cosine with its caption is above that
with each wrong one; an equal cosine is a miss. Wrong captions of the same text as the right one do not count. Samples
of one picture are no independent queries, so their interval counts as many queries as the variance between pictures
shows. The macro accuracy is the mean over subsets, which count as independent."""
    hub_metric: ClassVar[str] = "accuracy"

    def check(self) -> None:
        super().check()
        self._subsets()

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        return partial(_sample, test_set, len(self._subsets()))

    def evaluate(self, embedder: Embedder, test_set: TestSet) -> list[Result]:
        subsets = self._subsets()
        samples = test_set.gathered(embedder, partial(_sample, test_set, len(subsets)))
        texts = list(dict.fromkeys(text for choice, _ in samples for text in choice))
        embeds = dict(zip(texts, embedder.texts(texts).numpy(), strict=True))
        images = embedder.images(test_set.source).numpy()
        scores = [np.stack([embeds[t] for t in s[0]]) @ image for s, image in zip(samples, images, strict=True)]
        if self.pairs:
            return self._scores_of_pairs(test_set, [choice for choice, _ in samples], scores)
        hits = np.array([bool((score[1:] < score[0]).all()) for score in scores])
        chances = 100.0 / np.array([len(score) for score in scores])
        pictures = np.unique(images, axis=0, return_inverse=True)[1].ravel()  # the same embedding is the same picture

        def share(metric: str, label: str, own: np.ndarray) -> Result:
            counts, chance, n = np.bincount(pictures[own]), float(chances[own].mean()), int(own.sum())
            if counts.max() == 1:
                return replace(self.proportion(metric, int(hits[own].sum()), n, chance, False, hits[own]), label=label)
            estimate = clustered_share(np.bincount(pictures[own], hits[own])[counts > 0], counts[counts > 0])
            return self.estimated(metric, estimate, n, chance, False, label=label)

        whole = share("accuracy", "", np.ones(len(hits), bool))
        members = [np.array([subset == number for _, subset in samples]) for number in range(len(subsets))]
        named = [(_metric(name), f"accuracy, {name}") for name in subsets]
        parts = [share(*names, own) for names, own in zip(named, members, strict=True) if own.any()]
        if not parts:
            return [replace(whole, headline=True)]
        figures = np.array([(part.value, part.chance, part.low, part.high) for part in parts], float)
        deviation = float(np.linalg.norm(figures[:, 3] - figures[:, 2])) / len(parts) / (2 * Z95)
        macro, label = normal(figures[:, 0].mean() / 100, deviation / 100), f"macro accuracy of {len(parts)} subsets"
        return [self.estimated("macro_accuracy", macro, len(hits), figures[:, 1].mean(), label=label), whole, *parts]

    def _scores_of_pairs(self, test_set: TestSet, choices: list[_Choice], scores: list[np.ndarray]) -> list[Result]:
        """Return Winoground's scores of the pairs whose images are both there."""
        rows = np.array(test_set.row_numbers)
        firsts = np.flatnonzero((rows[:-1] % 2 == 0) & (np.diff(rows) == 1))
        for first in firsts:
            if len(choices[first]) != 2 or choices[first + 1] != choices[first][::-1]:
                them = f"{rows[first]} and {rows[first + 1]} have {choices[first]} and {choices[first + 1]}"
                raise UserError(f"{self.data}: images {them}; with `pairs`, both have the same two captions, own first")
        if not len(firsts):
            raise UserError(f"{self.data} has no pair of images; leave out `pairs`")
        (own, wrong), (own2, wrong2) = (np.array([scores[row + n] for row in firsts]).T for n in (0, 1))
        text, image = (own > wrong) & (own2 > wrong2), (own > wrong2) & (own2 > wrong)
        shown = ("text", text, 25.0), ("image", image, 25.0), ("group", text & image, 100 / 6)
        return [self.proportion(f"{name}_score", int(h.sum()), len(h), chance, right=h) for name, h, chance in shown]

    def _subsets(self) -> list[str]:
        names = [] if read_text(self.data, CLASS_NAMES) is None else read_class_names(self.data)
        by_metric: dict[str, str] = {}
        for name in names:
            if (other := by_metric.setdefault(_metric(name), name)) != name:
                raise UserError(
                    f"{self.data}/{CLASS_NAMES} has {other!r} and {name!r}, both {_metric(name)}; rename one"
                )
        return names


def _metric(subset: str) -> str:
    """Return the metric of a subset's accuracy."""
    return re.sub(r"\W+", "_", f"accuracy_{subset.lower()}").strip("_")


def _sample(test_set: TestSet, num_subsets: int, shard: int, number: int) -> tuple[_Choice, int]:
    """Return the right caption of an image with the wrong ones, and its subset or -1."""
    where = test_set.place(shard, number)
    right, *wrong = (line for line in test_set.captions_of(shard, number) if line.strip())
    if not wrong:
        raise UserError(f"{where} has only the caption {right!r:.60}; list a wrong caption on the next line of KEY.txt")
    label = test_set.source.read_label(shard, number) if num_subsets else None
    subset = -1 if label is None else test_set.label(num_subsets, shard, number)
    return (right, *(text for text in wrong if text != right)), subset
