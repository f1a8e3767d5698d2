"""Embeddings of whole images and texts, the work shared by the processes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from flipscale.data.captions import tokenise
from flipscale.data.decode import UndecodableImage, decode_box, visible_patches
from flipscale.data.loader import settle_worker, start_workers, worker_context
from flipscale.data.pairs import InputShape
from flipscale.data.sources.tar_source import TarSource

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Embedder:
    """A model with what it takes to embed: its tokenizer, and the processes that share the work.

    Of a set of rows (images, texts, classes), process r of w embeds rows r, r + w, r + 2 w, ...: `rows`. The forward
    passes of a sharded model are collective, so all processes run equally many batches: `padded_rows`.

    Args:
        model: unwrapped, in evaluation mode.
        batch_size: images or texts that a process embeds at once.
        num_workers: processes that decode images; 0 decodes in this one.
        alive: called at the start of a task and after every batch, to tell a watch that the evaluation moves on.
    """

    model: Any
    tokenizer: Any
    accelerator: "Accelerator"
    batch_size: int = 256
    num_workers: int = 0
    alive: Callable[[], None] = lambda: None

    def rows(self, count: int) -> list[int]:
        """Return this process's rows of `count`."""
        return list(range(self.accelerator.process_index, count, self.accelerator.num_processes))

    def padded_rows(self, count: int) -> list[int]:
        """Return this process's rows of `count`, and where others have one more, a first row again."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        return [row % count for row in range(rank, -(-count // world) * world, world)]

    def my_images(self, source: TarSource) -> torch.Tensor:
        """Collective. Return the embeddings of this process's rows of `source`: fp32 `(rows, dim)`, unit length, CPU.

        Raises:
            ValueError: an image cannot be decoded.
            OSError: a shard cannot be read, or a worker died.
        """
        embeds = self._embed(self._decoded(source), self.image_features, "images", len(source))
        return embeds[: len(self.rows(len(source)))]

    def images(self, source: TarSource) -> torch.Tensor:
        """Collective. Return the embeddings of all images of `source` in shard order: fp32 `(images, dim)`, unit
        length, CPU.

        Raises:
            ValueError: an image cannot be decoded.
            OSError: a shard cannot be read, or a worker died.
        """
        return self.gathered(self.my_images(source), len(source))

    def my_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Collective. Return the embeddings of this process's `texts`, of which every process must have equally many:
        fp32 `(texts, dim)`, unit length, CPU."""
        batches = (
            self.tokens(list(texts[first : first + self.batch_size])) for first in range(0, len(texts), self.batch_size)
        )
        return self._embed(batches, self.text_features, "texts", len(texts) * self.accelerator.num_processes)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Collective. Return the embeddings of `texts`, which every process has: fp32 `(texts, dim)`, unit length,
        CPU."""
        return self.gathered(self.my_texts([texts[row] for row in self.padded_rows(len(texts))]), len(texts))

    def gathered(self, mine: torch.Tensor, count: int) -> torch.Tensor:
        """Collective. Return all `count` rows, `(count, dim)` on the CPU, of which `mine` are this process's rows,
        padded or not."""
        world = self.accelerator.num_processes
        padding = -(-count // world) - len(mine)
        mine = torch.cat([mine, mine.new_zeros(padding, mine.shape[1])])
        by_rank = self.accelerator.gather(mine.to(self.accelerator.device)).unflatten(0, (world, -1))
        return by_rank.transpose(0, 1).flatten(0, 1)[:count].cpu()

    def total(self, counts: Sequence[int | float]) -> list[int]:
        """Collective. Return the sums of `counts` over the processes."""
        mine = torch.tensor(counts, dtype=torch.int64, device=self.accelerator.device)
        return self.accelerator.reduce(mine, "sum").tolist()

    # What depends on the kind of model: these four are FLIP's.

    def decoder(self) -> Callable[[bytes], np.ndarray]:
        """Return what turns an encoded image into what the model takes, or raises `UndecodableImage`. It goes to the
        workers, without this embedder and its model."""
        shape = InputShape.of(self.model.config)
        return partial(_whole_square, shape.image_size, shape.patch_size)

    def image_features(self, batch: torch.Tensor) -> torch.Tensor:
        """Return `(batch, dim)`, not normalised, of decoded images."""
        return self.model.get_image_features(patches=batch).pooler_output

    def tokens(self, texts: list[str]) -> torch.Tensor:
        """Return `(texts, length)`, as the model takes them."""
        length = self.model.config.text_config.max_position_embeddings
        return tokenise(self.tokenizer, texts, length)["input_ids"]

    def text_features(self, batch: torch.Tensor) -> torch.Tensor:
        """Return `(batch, dim)`, not normalised, of rows of `tokens`."""
        return self.model.get_text_features(batch).pooler_output

    def _decoded(self, source: TarSource) -> Iterator[torch.Tensor]:
        """The decoded images of this process's padded rows, in batches."""
        mine = self.padded_rows(len(source))
        batches = [mine[first : first + self.batch_size] for first in range(0, len(mine), self.batch_size)]
        workers = min(self.num_workers, len(batches) if len(batches) > 1 else 0)
        loader = DataLoader(
            WholeImages(source, self.decoder()),
            batch_sampler=batches,
            collate_fn=_as_is,
            num_workers=workers,
            worker_init_fn=settle_worker,
            multiprocessing_context=worker_context() if workers else None,
        )
        try:
            for batch in start_workers(loader):
                if isinstance(batch, Exception):
                    raise batch
                yield torch.as_tensor(batch)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise OSError(
                f"a worker that decoded evaluation images died ({' '.join(str(error).split())}); give it more memory "
                "or set eval.num_workers to 0"
            ) from error

    @torch.no_grad()
    def _embed(
        self,
        batches: Iterable[torch.Tensor],
        features: Callable[[torch.Tensor], torch.Tensor],
        what: str,
        total: int,
    ) -> torch.Tensor:
        """Collective. Return the normalised features of all batches on the CPU; a progress bar shows if it takes
        long."""
        from flipscale.model.modeling_flip import normalise_embeds  # seconds to import; a model has done it

        hidden = None if self.accelerator.is_main_process else True
        embeds = []
        with tqdm(total=total, desc="evaluating", unit=f" {what}", leave=False, delay=5, disable=hidden) as bar:
            for batch in batches:
                with self.accelerator.autocast():
                    found = features(batch.to(self.accelerator.device))
                embeds.append(normalise_embeds(found).cpu())
                self.alive()
                bar.update(min(len(batch) * self.accelerator.num_processes, total - bar.n))
        return torch.cat(embeds)


def _as_is(batch: Any) -> Any:
    return batch


def _whole_square(image_size: int, patch_size: int, encoded: bytes) -> np.ndarray:
    """Return the centred square's patches, uint8 `(num_patches, 3 * p * p)`."""
    return visible_patches(decode_box(encoded, None, image_size, (1.0, 1.0)), patch_size, None)


class WholeImages(Dataset):
    """Every image of a source, decoded, in batches; what goes wrong is handed out in place of a batch, since raising
    it would wrap a worker's error in its traceback."""

    def __init__(self, source: TarSource, decode: Callable[[bytes], np.ndarray]):
        self.source = source
        self.decode = decode
        self.where = sample_numbers(source)

    def __len__(self) -> int:
        return len(self.where)

    def __getitems__(self, rows: list[int]) -> np.ndarray | Exception:
        try:
            return np.stack([self._decoded(*self.where[row]) for row in rows])
        except (ValueError, OSError) as error:
            return error

    def _decoded(self, shard: int, number: int) -> np.ndarray:
        sample = self.source.read(shard, number)
        try:
            return self.decode(sample.image)
        except UndecodableImage as error:
            raise ValueError(f"evaluation image {sample.name} cannot be decoded: {error}") from error


def sample_numbers(source: TarSource) -> list[tuple[int, int]]:
    """Return (shard, number) of every sample, in shard order."""
    return [(shard, number) for shard, size in enumerate(source.shard_sizes) for number in range(size)]
