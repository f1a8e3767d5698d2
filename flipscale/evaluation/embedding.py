"""Whole images and texts to embeddings, shared out over the processes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from flipscale.data.captions import tokenise
from flipscale.data.decode import UndecodableImage, decode_box, visible_patches
from flipscale.data.pairs import InputShape
from flipscale.data.sources.tar_source import TarSource
from flipscale.model.modeling_flip import normalise_embeds


@dataclass(frozen=True)
class Embedder:
    """A model with what it takes to embed: its tokenizer and the processes to share the work.

    Args:
        model: unwrapped, in evaluation mode.
        batch_size: images or texts a process embeds at once.
    """

    model: Any
    tokenizer: Any
    accelerator: Accelerator
    batch_size: int = 256

    def images(self, source: TarSource) -> torch.Tensor:
        """Collective. Embeddings of all images of `source` in shard order: fp32 `(images, dim)`, unit length, CPU."""
        dataset = WholeImages(source, self.decode)
        loader = DataLoader(dataset, batch_sampler=self._share(len(dataset)), collate_fn=torch.as_tensor)
        return self._embed(loader, len(dataset), self.image_features)

    def texts(self, texts: list[str]) -> torch.Tensor:
        """Collective. Embeddings of `texts`: fp32 `(texts, dim)`, unit length, CPU."""
        tokens = self.tokens(texts)
        mine = (tokens[rows] for rows in self._share(len(texts)))
        return self._embed(mine, len(texts), self.text_features)

    # What depends on the kind of model: these four are FLIP's.

    def decode(self, encoded: bytes) -> np.ndarray:
        """An image as the model takes it: the centred square's patches, uint8 `(num_patches, 3 * p * p)`.

        Raises:
            UndecodableImage
        """
        shape = InputShape.of(self.model.config)
        return visible_patches(decode_box(encoded, None, shape.image_size, (1.0, 1.0)), shape.patch_size, None)

    def image_features(self, batch: torch.Tensor) -> torch.Tensor:
        """`(batch, dim)`, not normalised, of decoded images."""
        return self.model.get_image_features(patches=batch).pooler_output

    def tokens(self, texts: list[str]) -> torch.Tensor:
        """`(texts, length)`, as the model takes them."""
        length = self.model.config.text_config.max_position_embeddings
        return tokenise(self.tokenizer, texts, length)["input_ids"]

    def text_features(self, batch: torch.Tensor) -> torch.Tensor:
        """`(batch, dim)`, not normalised, of rows of `tokens`."""
        return self.model.get_text_features(batch).pooler_output

    def _share(self, count: int) -> list[list[int]]:
        """This process's part of `range(count)` in batches, every process's equally long (the end wraps around)."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = [row % count for row in range(rank, -(-count // world) * world, world)]
        return [mine[first : first + self.batch_size] for first in range(0, len(mine), self.batch_size)]

    @torch.no_grad()
    def _embed(
        self, batches: Iterable[torch.Tensor], count: int, features: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        embeds = []
        for batch in batches:
            with self.accelerator.autocast():
                found = features(batch.to(self.accelerator.device))
            embeds.append(normalise_embeds(found))
        gathered = self.accelerator.gather(torch.cat(embeds))
        # Rank after rank in `gathered`; row i of the set is row i // world of rank i % world.
        by_rank = gathered.unflatten(0, (self.accelerator.num_processes, -1))
        return by_rank.transpose(0, 1).flatten(0, 1)[:count].cpu()


class WholeImages(Dataset):
    """Every image of a source, decoded, in batches.

    Raises:
        ValueError: an image that cannot be decoded; a test set must be whole.
    """

    def __init__(self, source: TarSource, decode: Callable[[bytes], np.ndarray]):
        self.source = source
        self.decode = decode
        self.where = sample_numbers(source)

    def __len__(self) -> int:
        return len(self.where)

    def __getitems__(self, rows: list[int]) -> np.ndarray:
        return np.stack([self._decoded(*self.where[row]) for row in rows])

    def _decoded(self, shard: int, number: int) -> np.ndarray:
        sample = self.source.read(shard, number)
        try:
            return self.decode(sample.image)
        except UndecodableImage as error:
            raise ValueError(f"evaluation image {sample.name} cannot be decoded: {error}") from error


def sample_numbers(source: TarSource) -> list[tuple[int, int]]:
    """(shard, number) of every sample, in shard order."""
    return [(shard, number) for shard, size in enumerate(source.shard_sizes) for number in range(size)]
