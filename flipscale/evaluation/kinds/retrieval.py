"""Image-text retrieval: recall at 1, 5 and 10, both ways."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from flipscale.data.sources.tar_source import TarSource
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.results import Result
from flipscale.evaluation.test_set import read_captions

_QUERIES_AT_ONCE = 1024


@dataclass(frozen=True)
class Retrieval(Task):
    """`text_to_image_r1`, ... `image_to_text_r10` of image-caption shards, in percent of the queries.

    A `KEY.txt` of several lines holds several captions of one image, each a query of its own. Images whose first
    captions are the same word for word are right answers for each other's captions.

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

    def evaluate(self, embedder: Embedder) -> list[Result]:
        source = TarSource(self.data)
        captions = read_captions(embedder, source)
        groups: dict[str, int] = {}
        image_ids = torch.tensor([groups.setdefault(lines[0], len(groups)) for lines in captions])
        texts = [line for lines in captions for line in lines]
        text_ids = image_ids.repeat_interleave(torch.tensor([len(lines) for lines in captions]))
        image_embeds, text_embeds = embedder.images(source), embedder.texts(texts)
        ways = {
            "text_to_image": self._hits(embedder, text_embeds, image_embeds, text_ids, image_ids),
            "image_to_text": self._hits(embedder, image_embeds, text_embeds, image_ids, text_ids),
        }
        num_queries = {"text_to_image": len(texts), "image_to_text": len(captions)}
        return [
            self.proportion(f"{way}_r{k}", hits, num_queries[way], headline=(way, k) == ("text_to_image", self.ks[0]))
            for way, found in ways.items()
            for k, hits in zip(self.ks, found, strict=True)
        ]

    def _hits(
        self,
        embedder: Embedder,
        queries: torch.Tensor,
        targets: torch.Tensor,
        query_ids: torch.Tensor,
        target_ids: torch.Tensor,
    ) -> list[int]:
        """Collective. Return, for each k, how many queries have a target of their id among the k nearest."""
        hits = torch.zeros(len(self.ks), dtype=torch.int64)
        rows = torch.tensor(embedder.rows(len(queries)))
        for some in rows.split(_QUERIES_AT_ONCE):
            nearest = target_ids[(queries[some] @ targets.t()).topk(min(max(self.ks), len(targets))).indices]
            right = nearest == query_ids[some, None]
            hits += torch.stack([right[:, :k].any(dim=1).sum() for k in self.ks])
            embedder.alive()
        return embedder.total(hits.tolist())
