"""A model with a head: what it says of an image in place of an embedding."""

from dataclasses import dataclass

import torch

from flipscale.evaluation.embedding import Embedder


@dataclass(frozen=True)
class ClassifierEmbedder(Embedder):
    """A `FlipForImageClassification` with the processes that share the work. An image's features are its logits, one
    for each class; there are no texts."""

    @property
    def gives(self) -> tuple[str, ...]:
        return ("features", "head")

    def image_features(self, **columns: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(**columns).logits
        return logits
