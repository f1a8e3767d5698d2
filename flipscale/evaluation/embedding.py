"""Whole images and texts to embeddings, shared out over the processes."""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from flipscale.data.decode import UndecodableImage, decode_box, visible_patches
from flipscale.data.loader import InputShape, tokenise
from flipscale.data.tar_source import TarSource
from flipscale.model import FlipModel
from flipscale.model.modeling_flip import normalise_embeds


@dataclass(frozen=True)
class Embedder:
    """A model with what it takes to embed: its tokenizer and the processes to share the work.

    Args:
        model: unwrapped, in evaluation mode.
        batch_size: images or texts a process embeds at once.
    """

    model: FlipModel
    tokenizer: PreTrainedTokenizerBase
    accelerator: Accelerator
    batch_size: int = 256

    def images(self, source: TarSource) -> torch.Tensor:
        """Collective. Embeddings of all images of `source` in shard order: fp32 `(images, dim)`, unit length, CPU."""
        dataset = WholeImages(source, InputShape.of(self.model.config))
        loader = DataLoader(dataset, batch_sampler=self._share(len(dataset)), collate_fn=torch.as_tensor)
        return self._embed(loader, len(dataset), lambda patches: self.model.get_image_features(patches=patches))

    def texts(self, texts: list[str]) -> torch.Tensor:
        """Collective. Embeddings of `texts`: fp32 `(texts, dim)`, unit length, CPU."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = tokenise(self.tokenizer, texts, length)["input_ids"]
        mine = (tokens[rows] for rows in self._share(len(texts)))
        return self._embed(mine, len(texts), lambda input_ids: self.model.get_text_features(input_ids))

    def _share(self, count: int) -> list[list[int]]:
        """This process's part of `range(count)` in batches, every process's equally long (the end wraps around)."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = [row % count for row in range(rank, -(-count // world) * world, world)]
        return [mine[first : first + self.batch_size] for first in range(0, len(mine), self.batch_size)]

    @torch.no_grad()
    def _embed(self, batches, count: int, features) -> torch.Tensor:  # type: ignore[no-untyped-def]
        embeds = []
        for batch in batches:
            with self.accelerator.autocast():
                output = features(batch.to(self.accelerator.device))
            embeds.append(normalise_embeds(output.pooler_output))
        gathered = self.accelerator.gather(torch.cat(embeds))
        # Rank after rank in `gathered`; row i of the set is row i // world of rank i % world.
        by_rank = gathered.unflatten(0, (self.accelerator.num_processes, -1))
        return by_rank.transpose(0, 1).flatten(0, 1)[:count].cpu()


class WholeImages(Dataset):
    """The centred square of every image of a source, unmasked: uint8 `(batch, num_patches, 3 * p * p)`.

    Raises:
        ValueError: an image that cannot be decoded; a test set must be whole.
    """

    def __init__(self, source: TarSource, shape: InputShape):
        self.source = source
        self.shape = shape
        self.where = sample_numbers(source)

    def __len__(self) -> int:
        return len(self.where)

    def __getitems__(self, rows: list[int]) -> np.ndarray:
        return np.stack([self._patches(*self.where[row]) for row in rows])

    def _patches(self, shard: int, number: int) -> np.ndarray:
        sample = self.source.read(shard, number)
        try:
            image = decode_box(sample.image, None, self.shape.image_size, (1.0, 1.0))
        except UndecodableImage as error:
            raise ValueError(f"evaluation image {sample.name} cannot be decoded: {error}") from error
        return visible_patches(image, self.shape.patch_size, None)


def sample_numbers(source: TarSource) -> list[tuple[int, int]]:
    """(shard, number) of every sample, in shard order."""
    return [(shard, number) for shard, size in enumerate(source.shard_sizes) for number in range(size)]
