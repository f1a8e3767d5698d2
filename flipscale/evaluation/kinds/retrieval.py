"""Image-text retrieval: recall at 1, 5 and 10, both ways."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.intervals import clustered_share
from flipscale.evaluation.kinds.task import Scorer, StreamedTask
from flipscale.evaluation.metrics import recall_chance, recall_hits
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet
from flipscale.io.errors import UserError
from flipscale.io.options import Count


@dataclass(frozen=True)
class Retrieval(StreamedTask):
    """`text_to_image_r1`, ... `image_to_text_r10` of image-caption shards, in percent of the queries.

    Each line of a `KEY.txt` is a caption of the image and a query. The right answers are an image's own captions and a
    caption's own image, as in CLIP_benchmark.

    Every process holds all captions and all embeddings, 4 bytes per dimension (3 KB at 768 dimensions), and twice the
    embeddings while they are gathered.

    Args:
        ks: numbers of answers to each query.
        group_by_caption: whether images with the same first caption are right answers for each other's captions. This
            is for sets whose captions name the class, such as the demo's.
    """

    ks: list[Count] = field(default_factory=lambda: [1, 5, 10])
    group_by_caption: bool = False

    protocol: ClassVar[str] = """Retrieval: all images and captions of the set, each way; R@k is the share of queries
with a right answer among the k nearest. Intervals are Wilson's. The captions of one image are no independent queries,
so their interval counts as many queries as the variance between images shows."""
    hub_task: ClassVar[str] = "image-text-retrieval"
    hub_metric: ClassVar[str] = "recall"

    def __post_init__(self) -> None:
        if not self.ks:
            raise UserError(f"ks is {self.ks}; list one number or more, such as [1, 5, 10]")

    def truth(self, test_set: TestSet) -> Callable[[int, int], Any]:
        return test_set.captions_of

    def scorer(self, embedder: Embedder, test_set: TestSet) -> "RetrievalScorer":
        return RetrievalScorer(self, embedder, test_set.captions(embedder))


class RetrievalScorer(Scorer):
    """Keeps the embeddings of this process's images and compares all with all at the end."""

    def __init__(self, task: Retrieval, embedder: Embedder, captions: list[list[str]]):
        self._task, self._embedder = task, embedder
        groups: dict[str | int, int] = {}
        keys = [lines[0] if task.group_by_caption else number for number, lines in enumerate(captions)]
        self._image_ids = torch.tensor([groups.setdefault(key, len(groups)) for key in keys])
        self._text_ids = self._image_ids.repeat_interleave(torch.tensor([len(lines) for lines in captions]))
        self._text_embeds = embedder.texts([line for lines in captions for line in lines])
        self._image_embeds = self._text_embeds.new_empty(len(embedder.rows(len(captions))), self._text_embeds.shape[1])
        self._seen = 0

    def add(self, rows: torch.Tensor, embeds: torch.Tensor) -> None:
        self._image_embeds[self._seen : self._seen + len(rows)] = embeds
        self._seen += len(rows)

    def results(self) -> list[Result]:
        images, texts = self._embedder.gathered(self._image_embeds, len(self._image_ids)), self._text_embeds
        return [
            *self._recalls("text_to_image", texts, images, self._text_ids, self._image_ids),
            *self._recalls("image_to_text", images, texts, self._image_ids, self._text_ids),
        ]

    def _recalls(
        self, way: str, queries: torch.Tensor, targets: torch.Tensor, query_ids: torch.Tensor, target_ids: torch.Tensor
    ) -> list[Result]:
        """Collective. Return the results of one direction, one for each k."""
        ks, n, results = self._task.ks, len(queries), []
        hits_of = self._hits(queries, targets, query_ids, target_ids).numpy().astype(np.int64)
        num_right = np.bincount(target_ids.numpy(), minlength=int(query_ids.max()) + 1)[query_ids.numpy()]
        counts = np.bincount(query_ids.numpy())
        for k, hits in zip(ks, hits_of.T, strict=True):
            chance = 100.0 * recall_chance(num_right, len(targets), k)
            headline = (way, k) == ("text_to_image", ks[0])
            if way == "text_to_image":
                # The captions of one image, or of one group of images, are no independent queries.
                clustered = np.bincount(query_ids.numpy(), hits).astype(np.int64)
                share = clustered_share(clustered[counts > 0], counts[counts > 0])
                results.append(self._task.estimated(f"{way}_r{k}", share, n, chance, headline))
            else:
                results.append(self._task.proportion(f"{way}_r{k}", int(hits.sum()), n, chance, headline))
        return results

    def _hits(
        self, queries: torch.Tensor, targets: torch.Tensor, query_ids: torch.Tensor, target_ids: torch.Tensor
    ) -> torch.Tensor:
        """Collective. Return whether each query has a target of its id among the k nearest, uint8 `(queries, ks)`."""
        mine = torch.zeros(len(self._embedder.rows(len(queries))), len(self._task.ks), dtype=torch.uint8)
        first = 0
        for batch in self._embedder.batches(len(queries)):
            rows = slice(batch.start, batch.stop)
            scores = queries[rows] @ targets.t()
            for column, k in enumerate(self._task.ks):
                mine[first : first + len(batch), column] = recall_hits(scores, query_ids[rows], target_ids, k)
            first += len(batch)
            self._embedder.alive()
        return self._embedder.gathered(mine, len(queries))
