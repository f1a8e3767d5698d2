"""Training pairs with a teacher's stored embeddings of the same crop and caption.

`flipscale prepare embed --crops` stores embeddings of several random crops of each image. Training draws one of these
crops for each position, so that student and teacher see the same window.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from flipscale.data.decode import DRAWS_PER_CROP, Crop, decode_crop
from flipscale.data.features import StoredFeatures
from flipscale.data.pairs import PairDataset
from flipscale.data.randomness import keyed_uniform

# Size for the square in place of a crop that does not fit, so that the window depends on no model.
_FALLBACK_SIZE = 224


@dataclass(frozen=True)
class StoredCrops:
    """Random crops of each sample, a function of (seed, crop number, shard, sample).

    Args:
        scale: least and most area of a crop as fractions of the image's.
        mirror: whether half of the crops are mirrored.
    """

    count: int
    scale: tuple[float, float]
    mirror: bool
    seed: int

    def decode(self, encoded: bytes, place: tuple[int, int], number: int, image_size: int) -> Crop:
        """Return crop `number` of the sample (shard, number) at `place`, see `decode_crop`."""
        purpose, position = f"crop {number} of shard {place[0]}", np.array([place[1]])
        draws = keyed_uniform(self.seed, purpose, position, DRAWS_PER_CROP)[0]
        if not self.mirror:
            draws[-1] = 1.0
        return decode_crop(encoded, draws, image_size, self.scale, fallback_size=_FALLBACK_SIZE)


@dataclass(frozen=True)
class Teacher:
    """The stored embeddings of a teacher.

    Args:
        images: embeddings of each sample's crops, `(crops, width)`.
        texts: embedding of each sample's first caption, `(width,)`.
        logit_scale: factor of the cosine of an image and a text.
    """

    images: StoredFeatures
    texts: StoredFeatures
    crops: StoredCrops
    logit_scale: float

    @property
    def digest(self) -> int:
        """Digest of the teacher's weights and crops."""
        content = json.dumps([self.images.about["model_digest"], asdict(self.crops)])
        return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")

    def logit_sides(self, place: tuple[int, int], number: int) -> np.ndarray:
        """Return two vectors of a sample, fp32 `(2, width)`, or raise MissingFeatures. The logit of an image and a text
        is their product."""
        sides = np.stack([self.images.row(place)[number], self.texts.row(place)]).astype(np.float32)
        sides[0] *= self.logit_scale
        return sides


@dataclass(eq=False, repr=False, kw_only=True)
class TaughtPairs(PairDataset):
    """Training pairs with the embeddings of teachers. The crop is one of the teachers', and the caption is the first.

    Columns: `PairDataset`'s, and `teacher_embeds` fp32 `(batch, teachers, 2, width)`, see `change_of_targets`.
    Narrow embeddings are padded with zeros.
    """

    teachers: Sequence[Teacher]

    def _read(self, place: tuple[int, int], crop_draw: np.ndarray, draws: list[float]) -> tuple[Crop, Any]:
        crops = self.teachers[0].crops
        number = int(crop_draw[0] * crops.count)
        width = max(teacher.texts.width for teacher in self.teachers)
        embeds = np.zeros((len(self.teachers), 2, width), np.float32)
        for row, teacher in zip(embeds, self.teachers, strict=True):
            row[:, : teacher.texts.width] = teacher.logit_sides(place, number)
        sample = self.source.read(*place)
        texts = self._annotation(sample, [0.0])
        if self.checks_captions:
            self._tokenise(texts)
        return crops.decode(sample.image, place, number, self.shape.image_size), (texts, embeds)

    def _texts(self, annotation: Any) -> list[str]:
        return annotation[0]

    def _annotation_columns(self, annotations: list[Any], where: np.ndarray) -> dict[str, torch.Tensor]:
        texts, embeds = zip(*annotations, strict=True)
        return {
            **super()._annotation_columns(list(texts), where),
            "teacher_embeds": torch.from_numpy(np.stack(embeds)),
        }
