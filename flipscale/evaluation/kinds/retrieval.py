"""Image-text retrieval: recall at 1, 5 and 10, both ways."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.intervals import clustered_share
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.metrics import recall_chance, recall_hits
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import TestSet
from flipscale.io.errors import UserError
from flipscale.io.options import Count

_Side = tuple[torch.Tensor, torch.Tensor]  # embeddings, and the number of each one's image or group of images


@dataclass(frozen=True)
class Retrieval(Task):
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

    def evaluate(self, embedder: Embedder, test_set: TestSet) -> list[Result]:
        captions = test_set.captions(embedder)
        return self.recalls(embedder, embedder.images(test_set.source), captions)

    def recalls(self, embedder: Embedder, images: torch.Tensor, captions: list[list[str]]) -> list[Result]:
        """Collective. Return the recalls both ways of all images, `(images, dim)`, and their captions."""
        texts = embedder.texts([line for lines in captions for line in lines])
        groups: dict[str | int, int] = {}
        keys = [lines[0] if self.group_by_caption else number for number, lines in enumerate(captions)]
        image_ids = torch.tensor([groups.setdefault(key, len(groups)) for key in keys])
        text_ids = image_ids.repeat_interleave(torch.tensor([len(lines) for lines in captions]))
        sides = (texts, text_ids), (images, image_ids)
        return [
            *self._recalls(embedder, "text_to_image", *sides),
            *self._recalls(embedder, "image_to_text", *reversed(sides)),
        ]

    def _recalls(self, embedder: Embedder, way: str, asked: _Side, answers: _Side) -> list[Result]:
        (queries, query_ids), (targets, target_ids) = asked, answers
        n = len(queries)
        mine = torch.zeros(len(embedder.rows(n)), len(self.ks), dtype=torch.uint8)
        first = 0
        for batch in embedder.share(n).batches():
            rows = slice(batch.start, batch.stop)
            scores = queries[rows] @ targets.t()
            for column, k in enumerate(self.ks):
                mine[first : first + len(batch), column] = recall_hits(scores, query_ids[rows], target_ids, k)
            first += len(batch)
            embedder.alive()
        hits_of = embedder.gathered(mine, n).numpy().astype(np.int64)
        num_right = np.bincount(target_ids.numpy(), minlength=int(query_ids.max()) + 1)[query_ids.numpy()]
        counts, results = np.bincount(query_ids.numpy()), []
        for k, hits in zip(self.ks, hits_of.T, strict=True):
            chance = 100.0 * recall_chance(num_right, len(targets), k)
            headline = (way, k) == ("text_to_image", self.ks[0])
            if way == "text_to_image":
                # The captions of one image, or of one group of images, are no independent queries.
                clustered = np.bincount(query_ids.numpy(), hits).astype(np.int64)
                share = clustered_share(clustered[counts > 0], counts[counts > 0])
                results.append(self.estimated(f"{way}_r{k}", share, n, chance, headline))
            else:
                results.append(self.proportion(f"{way}_r{k}", int(hits.sum()), n, chance, headline, hits))
        return results
