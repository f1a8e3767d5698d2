"""Image-text retrieval: recall at 1, 5 and 10, both ways."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import Scorer, StreamedTask
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet, read_captions


@dataclass(frozen=True)
class Retrieval(StreamedTask):
    """`text_to_image_r1`, ... `image_to_text_r10` of image-caption shards, in percent of the queries.

    A `KEY.txt` of several lines holds several captions of one image, each a query of its own. Images whose first
    captions are the same word for word are right answers for each other's captions.

    Every process holds all embeddings: 4 bytes a dimension of each image and each caption, 3 KB of each at 768
    dimensions, twice over while they are gathered; and the captions themselves.

    Args:
        ks: how many answers a query may have.
    """

    ks: list[int] = field(default_factory=lambda: [1, 5, 10])

    protocol: ClassVar[str] = """Retrieval: all images and captions of the set, each way; R@k is the share of queries
with a right answer among the k nearest."""
    hub_task: ClassVar[str] = "image-text-retrieval"
    hub_metric: ClassVar[str] = "recall"

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks is {self.ks}; it must list one number or more, each at least 1, such as [1, 5, 10]")

    def scorer(self, embedder: Embedder, test_set: TestSet) -> "RetrievalScorer":
        return RetrievalScorer(self, embedder, read_captions(embedder, test_set.source))


class RetrievalScorer(Scorer):
    """Keeps the embeddings of this process's images, and compares all with all at the end."""

    def __init__(self, task: Retrieval, embedder: Embedder, captions: list[list[str]]):
        self._task, self._embedder = task, embedder
        groups: dict[str, int] = {}
        self._image_ids = torch.tensor([groups.setdefault(lines[0], len(groups)) for lines in captions])
        self._text_ids = self._image_ids.repeat_interleave(torch.tensor([len(lines) for lines in captions]))
        self._text_embeds = embedder.texts([line for lines in captions for line in lines])
        self._image_embeds = self._text_embeds.new_empty(len(embedder.rows(len(captions))), self._text_embeds.shape[1])
        self._seen = 0

    def add(self, rows: torch.Tensor, embeds: torch.Tensor) -> None:
        self._image_embeds[self._seen : self._seen + len(rows)] = embeds
        self._seen += len(rows)

    def results(self) -> list[Result]:
        images, texts = self._embedder.gathered(self._image_embeds, len(self._image_ids)), self._text_embeds
        ways = {
            "text_to_image": self._hits(texts, images, self._text_ids, self._image_ids),
            "image_to_text": self._hits(images, texts, self._image_ids, self._text_ids),
        }
        num_queries = {"text_to_image": len(texts), "image_to_text": len(images)}
        first = ("text_to_image", self._task.ks[0])
        return [
            self._task.proportion(f"{way}_r{k}", hits, num_queries[way], headline=(way, k) == first)
            for way, found in ways.items()
            for k, hits in zip(self._task.ks, found, strict=True)
        ]

    def _hits(
        self, queries: torch.Tensor, targets: torch.Tensor, query_ids: torch.Tensor, target_ids: torch.Tensor
    ) -> list[int]:
        """Collective. Return, for each k, how many queries have a target of their id among the k nearest."""
        hits = torch.zeros(len(self._task.ks), dtype=torch.int64)
        for some in self._embedder.batches(len(queries)):
            asked = slice(some.start, some.stop)
            scores = queries[asked] @ targets.t()
            nearest = target_ids[scores.topk(min(max(self._task.ks), len(targets))).indices]
            right = nearest == query_ids[asked, None]
            hits += torch.stack([right[:, :k].any(dim=1).sum() for k in self._task.ks])
            self._embedder.alive()
        return self._embedder.total(hits.tolist())
