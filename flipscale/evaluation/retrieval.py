"""Image-text retrieval: recall at 1, 5 and 10, both ways."""

import torch

from flipscale.data.sources.tar_source import TarSource
from flipscale.evaluation.embedding import Embedder, sample_numbers

_TILE = 1024


def _recall(queries: torch.Tensor, targets: torch.Tensor, query_ids: torch.Tensor, target_ids: torch.Tensor) -> list:
    """Percent of queries with a target of the same id among their 1, 5 and 10 nearest."""
    hits = torch.zeros(3)
    for first in range(0, len(queries), _TILE):
        scores = queries[first : first + _TILE] @ targets.t()
        nearest = target_ids[scores.topk(min(10, len(targets))).indices]
        right = nearest == query_ids[first : first + _TILE, None]
        hits += torch.stack([right[:, :k].any(dim=1).sum() for k in (1, 5, 10)])
    return (100.0 * hits / len(queries)).tolist()


def run(embedder: Embedder, folder: str) -> dict[str, float]:
    """Collective. `text_to_image_r1`, ... `image_to_text_r10`, in percent, of the image-caption shards in `folder`.

    A `KEY.txt` of several lines holds several captions of one image, each a query of its own. Images that share a
    caption word for word are each other's right answers.

    Raises:
        ValueError: an image without caption.
    """
    source = TarSource(folder)
    captions, caption_images, image_group = [], [], []
    groups: dict[str, int] = {}
    for image, (shard, number) in enumerate(sample_numbers(source)):
        sample = source.read(shard, number)
        lines = [line.strip() for line in (sample.caption or b"").decode("utf-8").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{folder}: {sample.name} has no caption; retrieval needs a KEY.txt for every image")
        group = groups.setdefault(lines[0], len(groups))
        image_group.append(group)
        captions += lines
        caption_images += [image] * len(lines)
    image_ids = torch.tensor(image_group)
    text_ids = image_ids[torch.tensor(caption_images)]
    images, texts = embedder.images(source), embedder.texts(captions)
    by_text, by_image = _recall(texts, images, text_ids, image_ids), _recall(images, texts, image_ids, text_ids)
    named = {"text_to_image": by_text, "image_to_text": by_image}
    return {f"{way}_r{k}": value for way, values in named.items() for k, value in zip((1, 5, 10), values, strict=True)}
