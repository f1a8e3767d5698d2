"""Embeddings of whole images and texts, the work shared by the processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from flipscale.data.captions import tokenise
from flipscale.data.decode import decode_box, visible_patches
from flipscale.data.loader import PackedBatch
from flipscale.data.pairs import InputShape
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.images import (
    DamagedImage,
    Decoder,
    Share,
    WholeImages,
    decoded_batches,
    made_up,
    named,
    one_thread,
)
from flipscale.io.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

# A set of few rows makes this many batches at least, so that several processes have some each.
_LEAST_BATCHES = 16
# A CPU computes as fast on so many images at once as on more, and begins sooner. Their fp32 pixels are less than the
# 32 MiB from which the C library fetches new memory each time, page by page, for longer than the pixels are computed.
_MOST_ON_CPU, _MOST_BYTES_ON_CPU = 128, 24 << 20
# What a core computes in the millisecond in which another decodes an image of 500 x 400 pixels.
_LIGHT_FLOPS = 3e7

Features = Literal["embeds", "pooled"]


@dataclass(frozen=True)
class Embedder:
    """A model with what it takes to embed: its tokenizer, and the processes that share the work.

    A set of rows (images, texts, classes) is cut into batches that do not depend on the number of processes, and
    process r of w embeds batches r, r + w, r + 2 w, ...: `batches` and `rows`. The forward passes of a sharded model
    are collective, so a process that has a batch less than others embeds something made up meanwhile.

    Args:
        model: unwrapped, in evaluation mode.
        batch_size: images or texts that a process embeds at once, at most; fewer on a CPU and of a small set.
        num_workers: processes that decode images; 0 decodes in this one.
        alive: called at the start of a task and after every batch, to tell a watch that the evaluation moves on.
        name: what tables call the model.
        progress: called on every process after each batch of images, with how many images all processes embedded since
            the last call, in place of the bar that is shown without it.
        pixels: along each side of an image, where that is not the model's own size; see `at`.
    """

    model: Any
    tokenizer: Any
    accelerator: "Accelerator"
    batch_size: int = 256
    num_workers: int = 0
    alive: Callable[[], None] = lambda: None
    name: str = ""
    progress: Callable[[int], None] | None = None
    pixels: int | None = None

    def at(self, image_size: int | None) -> "Embedder":
        """Return the embedder of images of `image_size` pixels, whose patches have the positions of the places that
        they show; None leaves it as it is.

        Raises:
            ValueError: the patch does not divide them, or the model is none of flipscale's.
        """
        if image_size is None:
            return self
        if type(self).image_size is not Embedder.image_size:
            raise UserError(
                f"{self.name} takes images of {self.image_size} pixels; an image_size is for flipscale's models"
            )
        self.model.config.vision_config.patches_along(image_size)
        return replace(self, pixels=image_size)

    def batches(self, count: int) -> list[range]:
        """Return this process's rows of `count`, a batch each."""
        return self._share(count).batches()

    def rows(self, count: int) -> np.ndarray:
        """Return this process's rows of `count`, int64 `(rows,)`, in the order of `batches`."""
        return self._share(count).rows()

    def most_in_batch(self, count: int) -> int:
        """Return how many of `count` rows are in a batch, at most: the same on every process."""
        return self._share(count).size

    def image_batches(
        self, source: TarSource, features: Features = "embeds"
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Collective, to its end. Yield this process's rows of `source`, int64 `(rows,)`, and their features, fp32
        `(rows, dim)` on the CPU, a batch at a time.

        No image is read twice. Where others have a batch more, the last has no rows.

        Args:
            features: `embeds`, after the projection and of unit length; or `pooled`, before the projection and not
                normalised, as linear probes take them.

        Raises:
            ValueError: on every process, if an image of any process cannot be decoded.
            OSError: on every process, if any cannot read a shard or lost a worker.
        """
        from flipscale.model.modeling_flip import normalise_embeds  # seconds to import; a model has done it

        compute = {"embeds": self.image_features, "pooled": self.pooled_features}[features]
        for rows, columns in self.image_columns(source):
            with torch.no_grad(), self.accelerator.autocast():
                found = compute(**columns)
            found = normalise_embeds(found) if features == "embeds" else found.float()
            yield torch.arange(rows.start, rows.stop), found.cpu()[: len(rows)]

    def image_columns(self, source: TarSource) -> Iterator[tuple[range, PackedBatch]]:
        """Collective, to its end. Yield this process's rows of `source`, and what the model takes of their images, on
        its device, a batch at a time. Where others have a batch more, the last has no rows, and one made-up image.

        Raises:
            ValueError: on every process, if an image of any process cannot be decoded.
            OSError: on every process, if any cannot read a shard or lost a worker.
        """
        share, decode, nothing = self._share(len(source)), self.decoder(), range(0)
        mine = share.batches()
        decoded = decoded_batches(source, decode, mine, self.num_workers)
        done = 0
        bar = self._bar(len(source), "images", hidden=self.progress is not None)
        with bar, one_thread(self.num_workers > 0 and self._is_light(decode)):
            for rows in mine + [nothing] * (share.rounds - len(mine)):
                try:
                    batch = self._agreed(partial(next, decoded) if rows else partial(made_up, decode))
                except DamagedImage:
                    self._refuse(WholeImages(source, decode))
                    raise
                yield rows, batch.to(self.accelerator.device).with_image_size(self.pixels)
                self.alive()
                news = min(share.size * share.world, share.count - done)
                done += news
                bar.update(news)
                if self.progress is not None:
                    self.progress(news)

    def my_images(self, source: TarSource, features: Features = "embeds") -> torch.Tensor:
        """Collective. Return the features of this process's rows of `source`, as `image_batches` has them: fp32
        `(rows, dim)`.

        Raises:
            ValueError: an image of any process cannot be decoded.
            OSError: a process cannot read a shard, or lost a worker.
        """
        mine, first = torch.empty(0), 0
        for rows, found in self.image_batches(source, features):
            if not first:
                mine = found.new_empty(len(self.rows(len(source))), found.shape[1])
            mine[first : first + len(rows)] = found
            first += len(rows)
        return mine

    def images(self, source: TarSource, features: Features = "embeds") -> torch.Tensor:
        """Collective. Return the features of all images of `source` in shard order, as `image_batches` has them: fp32
        `(images, dim)`.

        Raises:
            ValueError: an image of any process cannot be decoded.
            OSError: a process cannot read a shard, or lost a worker.
        """
        return self.gathered(self.my_images(source, features), len(source))

    def texts(self, texts: Sequence[str], together: int | None = None) -> torch.Tensor:
        """Collective. Return the embeddings of `texts`, which every process has: fp32 `(texts, dim)`, unit length,
        CPU.

        Args:
            together: so many texts in a row, such as the prompts of a class, make one embedding, the mean of theirs, of
                unit length again; left out, each has its own.
        """
        count = together or 1
        share = self._share(len(texts) // count, max(1, self.batch_size // count))
        batches = share.batches()
        mine: list[torch.Tensor] = []
        with self._bar(len(texts), "texts") as bar:
            # A process without a batch embeds the first text meanwhile.
            for rows in batches + [range(0)] * (share.rounds - len(batches)):
                asked = rows or range(1)
                some = texts[asked.start * count : asked.stop * count]
                found = torch.cat([self._embeds_of(part) for part in _parts(some, self.batch_size)])
                if together is not None:
                    found = torch.stack([_mean_direction(embeds) for embeds in found.split(together)])
                mine.append(found[: len(rows)])
                self.alive()
                bar.update(min(share.size * share.world * count, len(texts) - bar.n))
        return self._gathered(torch.cat(mine), share)

    def gathered(self, mine: torch.Tensor, count: int) -> torch.Tensor:
        """Collective. Return all `count` rows, `(count, dim)` on the CPU, of which `mine` are this process's `rows`."""
        return self._gathered(mine, self._share(count))

    def total(self, counts: Sequence[int | float]) -> list[int]:
        """Collective. Return the sums of `counts` over the processes."""
        mine = torch.tensor(counts, dtype=torch.int64, device=self.accelerator.device)
        return self.accelerator.reduce(mine, "sum").tolist()

    # What depends on the kind of model: these are FLIP's.

    @property
    def gives(self) -> tuple[str, ...]:
        """What the model has of what tasks take, see `Task.needs`."""
        return parts_of(getattr(self.model, "config", None))

    @property
    def image_size(self) -> int:
        """Pixels along each side of an image, as the model takes it."""
        return self.pixels or self.model.config.vision_config.image_size

    @property
    def mask(self) -> dict[str, Any]:
        """What is masked of images: `ratio`, `views` and `kind`; nothing where they are whole."""
        return {}

    def decoder(self) -> Decoder:
        """Return what turns an encoded image and its row into the columns that the model takes of it, or raises
        `UndecodableImage`. It goes to the workers, without this embedder and its model."""
        return partial(_whole_square, self.image_size, InputShape.of(self.model.config).patch_size)

    def image_features(self, **columns: torch.Tensor) -> torch.Tensor:
        """Return `(batch, dim)`, not normalised, of the columns of a batch of images."""
        return self.model.get_image_features(**columns).pooler_output

    def pooled_features(self, **columns: torch.Tensor) -> torch.Tensor:
        """Return `(batch, width)`, before the projection, of the columns of a batch of images."""
        return self.model.vision_model(**columns).pooler_output

    def tokens(self, texts: list[str]) -> torch.Tensor:
        """Return `(texts, length)`, as the model takes them."""
        length = self.model.config.text_config.max_position_embeddings
        return tokenise(self.tokenizer, texts, length)["input_ids"]

    def text_features(self, batch: torch.Tensor) -> torch.Tensor:
        """Return `(batch, dim)`, not normalised, of rows of `tokens`."""
        return self.model.get_text_features(batch).pooler_output

    def _share(self, count: int, most: int | None = None) -> Share:
        """Return how `count` rows are shared, at most `most` in a batch (left out, `batch_size`)."""
        if most is None and self._is_on_cpu():
            most = min(self.batch_size, _MOST_ON_CPU, _MOST_BYTES_ON_CPU // (12 * self.image_size**2))
        most = most or self.batch_size
        size = max(1, min(most, -(-count // _LEAST_BATCHES)))
        return Share(count, size, self.accelerator.process_index, self.accelerator.num_processes)

    def _is_on_cpu(self) -> bool:
        return torch.device(self.accelerator.device).type == "cpu"

    def _is_light(self, decode: Decoder) -> bool:
        """Collective. Return whether this is a CPU that computes on several threads, on which an image takes longer to
        decode than to embed."""
        if not self._is_on_cpu() or torch.get_num_threads() == 1:
            return False
        from torch.utils.flop_counter import FlopCounterMode

        with torch.no_grad(), self.accelerator.autocast(), FlopCounterMode(display=False) as counter:
            self.image_features(**made_up(decode).with_image_size(self.pixels))
        return counter.get_total_flops() < _LIGHT_FLOPS

    def _gathered(self, mine: torch.Tensor, share: Share) -> torch.Tensor:
        padded = torch.cat([mine, mine.new_zeros(share.most - len(mine), *mine.shape[1:])])
        return self.accelerator.gather(padded.to(self.accelerator.device)).cpu()[share.places()]

    def _agreed(self, make: Callable[[], PackedBatch]) -> PackedBatch:
        """Collective. Return what `make` returns.

        Raises:
            ValueError, OSError: on every process, if `make` raised it on any: a process that left alone would leave the
                others waiting.
        """
        made, faults = None, []
        try:
            made = make()
        except (ValueError, OSError) as error:
            if self.accelerator.num_processes == 1:
                raise
            faults = [(_kind(error), str(error))]
        if self.accelerator.num_processes > 1 and self.total([len(faults)])[0]:
            from accelerate.utils import gather_object

            kind, text = min(gather_object(faults))
            raise _KINDS[kind](text)
        assert made is not None
        return made

    def _refuse(self, images: WholeImages) -> None:
        """Collective. Look at all images, after one was found that cannot be decoded.

        Raises:
            ValueError: on every process, with the names of those that cannot be decoded.
        """
        from accelerate.utils import gather_object

        mine: list[tuple[int, str]] = []
        for row in self.rows(len(images)).tolist():
            self.alive()
            damage = images.damage(row)
            mine += [(row, damage)] if damage is not None else []
        faults = [damage for _, damage in sorted(gather_object(mine))]
        if faults:
            raise UserError(named(faults, len(images)))

    def _embeds_of(self, texts: list[str]) -> torch.Tensor:
        from flipscale.model.modeling_flip import normalise_embeds  # seconds to import; a model has done it

        with torch.no_grad(), self.accelerator.autocast():
            found = self.text_features(self.tokens(texts).to(self.accelerator.device))
        return normalise_embeds(found).cpu()

    def _bar(self, total: int, what: str, hidden: bool = False) -> tqdm:
        """Return a progress bar, which shows on the main process if it takes long."""
        disable = True if hidden or not self.accelerator.is_main_process else None
        return tqdm(total=total, desc="evaluating", unit=f" {what}", leave=False, delay=5, disable=disable)


def parts_of(config: Any) -> tuple[str, ...]:
    """Return what a model of this configuration has of what tasks take: the image tower's `features`, `texts` unless
    its configuration says that it has none, and a `decoder` or a list of `answers`.
    A model of others has no such configuration."""
    texts = () if config is not None and getattr(config, "text_config", config) is None else ("texts",)
    others = {"decoder": "decoder_config", "answers": "answer_config"}
    return ("features", *texts, *(part for part, name in others.items() if getattr(config, name, None) is not None))


# What a batch may raise; where processes raise several kinds, the first here.
_KINDS: tuple[type[Exception], ...] = (DamagedImage, ValueError, OSError)


def _kind(error: Exception) -> int:
    return next(number for number, kind in enumerate(_KINDS) if isinstance(error, kind))


def _mean_direction(embeds: torch.Tensor) -> torch.Tensor:
    """Return the mean of embeddings `(texts, dim)` at unit length, `(dim,)`: rounded as CLIP_benchmark's own."""
    mean = embeds.mean(dim=0)
    return mean / mean.norm()


def _parts(texts: Sequence[str], size: int) -> Iterator[list[str]]:
    for first in range(0, len(texts), size):
        yield list(texts[first : first + size])


def _whole_square(image_size: int, patch_size: int, encoded: bytes, row: int) -> dict[str, np.ndarray]:
    """Return the centred square's patches, uint8 `(num_patches, 3 * p * p)`; they are the same for every row."""
    return {"patches": visible_patches(decode_box(encoded, None, image_size, (1.0, 1.0)), patch_size, None)}
