"""Zero-shot classification: the nearest class name, the embeddings of all templates averaged and renormalised."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import Scorer, StreamedTask
from flipscale.evaluation.kinds.templates import TEMPLATES
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet, read_class_names, read_labels, read_lines


@dataclass(frozen=True)
class ZeroShot(StreamedTask):
    """`top1` and `top5` of classification shards, in percent of the images.

    `data` has shards with `KEY.cls`, and beside them `classnames.txt` and (unless `templates` is given)
    `zeroshot_classification_templates.txt` with `{c}` for the name, as CLIP_benchmark lays them out.

    Args:
        templates: `imagenet7` or `imagenet80`, CLIP's prompts in place of the folder's own.
    """

    templates: str | None = None

    protocol: ClassVar[str] = """Zero-shot classification: whole images, the short side resized to the model's size and
the centre cut out; the answer is the class whose embedding (the mean over the set's prompts) is nearest in cosine."""
    hub_task: ClassVar[str] = "zero-shot-image-classification"
    hub_metric: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        if self.templates is not None and self.templates not in TEMPLATES:
            raise ValueError(f"templates {self.templates!r} are unknown; use one of {', '.join(TEMPLATES)}")

    def check(self) -> None:
        super().check()
        read_class_names(self.data)
        self._prompts()

    def scorer(self, embedder: Embedder, test_set: TestSet) -> "ZeroShotScorer":
        names, prompts = read_class_names(self.data), self._prompts()
        labels = read_labels(embedder, test_set.source, len(names))
        return ZeroShotScorer(self, embedder, len(test_set.source), labels, class_embeds(embedder, names, prompts))

    def _prompts(self) -> list[str]:
        if self.templates is not None:
            return TEMPLATES[self.templates]
        file = Path(self.data) / "zeroshot_classification_templates.txt"
        return read_lines(file, "the prompts, {c} for the name")


class ZeroShotScorer(Scorer):
    """Counts the images whose class is the nearest, or among the five nearest."""

    def __init__(self, task: ZeroShot, embedder: Embedder, count: int, labels: torch.Tensor, classes: torch.Tensor):
        self._task, self._embedder, self._count = task, embedder, count
        self._labels, self._classes = labels, classes
        self._seen = 0
        self._right = torch.zeros(2, dtype=torch.int64)

    def add(self, rows: torch.Tensor, embeds: torch.Tensor) -> None:
        labels = self._labels[self._seen : self._seen + len(rows)]
        self._seen += len(rows)
        nearest = (embeds @ self._classes.t()).topk(min(5, len(self._classes))).indices
        right = nearest == labels[:, None]
        self._right += torch.stack([right[:, 0].sum(), right.any(dim=1).sum()])

    def results(self) -> list[Result]:
        top1, top5 = self._embedder.total(self._right.tolist())
        chance = 100.0 / len(self._classes)
        return [
            self._task.proportion("top1", top1, self._count, chance),
            self._task.proportion("top5", top5, self._count),
        ]


def class_embeds(embedder: Embedder, class_names: list[str], templates: list[str]) -> torch.Tensor:
    """Collective. Return one embedding a class, `(classes, dim)` of unit length: the mean over the templates, as CLIP
    and FLIP have it."""
    prompts = [template.replace("{c}", name) for name in class_names for template in templates]
    return embedder.texts(prompts, together=len(templates))
