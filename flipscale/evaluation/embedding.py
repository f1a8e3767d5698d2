"""Embeddings of whole images and texts: the rows of each process, and the forward passes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
import torch
from PIL import Image

from flipscale.data.captions import tokenise
from flipscale.data.decode import UndecodableImage, rgb_pixels
from flipscale.data.loader import PackedBatch
from flipscale.data.pairs import InputShape
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.whole_images import Decoder, WholeImages, decoded_batches, dummy_batch, whole_square
from flipscale.io.errors import UserError
from flipscale.io.progress import Progress, each
from flipscale.process.world import gather_objects

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flipscale.model import FlipModel, FlipProcessor

# A small set makes at least this many batches, so that several processes have some each.
_LEAST_BATCHES = 16
# A CPU embeds this many images as fast as more, and begins sooner. Their fp32 pixels stay below the 32 MiB from which
# the C library maps new memory for each batch, page by page, which takes longer than the pixels.
_MOST_ON_CPU, _MOST_BYTES_ON_CPU = 128, 24 << 20

Features = Literal["embeds", "pooled"]
Picture = str | Path | Image.Image
Value = TypeVar("Value")


@dataclass(frozen=True)
class Share:
    """The rows of one process: every `world`th batch of `size` rows among `count`. The batches do not depend on the
    number of processes, so each embedding is the same to the last bit."""

    count: int
    size: int
    rank: int
    world: int

    def batches(self) -> list[range]:
        """Return the rows of this process, batch by batch."""
        firsts = range(self.rank * self.size, self.count, self.size * self.world)
        return [range(first, min(first + self.size, self.count)) for first in firsts]

    def rounds(self) -> Iterator[tuple[range, int]]:
        """Yield this process's rows of each round of batches, perhaps none, and the number of rows of all processes."""
        together, mine = self.size * self.world, self.batches()
        for number, first in enumerate(range(0, self.count, together)):
            yield mine[number] if number < len(mine) else range(0), min(together, self.count - first)

    def rows(self) -> np.ndarray:
        """Return the rows of this process, int64 `(rows,)`."""
        rows = np.arange(self.count)
        return rows[rows // self.size % self.world == self.rank]


@dataclass(frozen=True)
class Embedder:
    """A FLIP model, its tokenizer, and the processes that share the work. Subclasses embed by other models.

    Process r of w embeds batches r, r + w, r + 2 w, ... of a set of rows (images, texts, classes). The forward passes
    of a sharded model are collective, so a process with a batch less embeds a dummy meanwhile.

    Args:
        model: the model, unwrapped, in evaluation mode.
        batch_size: most images or texts in a batch; a CPU and a small set use fewer.
        num_workers: number of processes that decode images; 0 decodes in this process.
        alive: function called at the start of a task and after every batch, for a watchdog.
        pixels: pixels along each side of an image, if not the model's size; see `at`.
        dims: width that embeddings are cut to, with unit length again; None keeps the model's width.
        kept: features of this process's images by source and kind, which are kept for further tasks on the same
            images; None keeps nothing, and needs memory for one batch.
        files: digest of the model's configuration, tokenizer and processor, for stored results.
    """

    model: Any
    tokenizer: Any
    accelerator: "Accelerator"
    batch_size: int = 256
    num_workers: int = 0
    alive: Callable[[], None] = lambda: None
    name: str = ""
    pixels: int | None = None
    dims: int | None = None
    kept: dict[tuple[TarSource, str], list[tuple[range, torch.Tensor]]] | None = None
    files: str = ""

    def at(self, image_size: int | None) -> "Embedder":
        """Return the embedder of images of `image_size` pixels; None returns this embedder. Raise ValueError if the
        patch size does not divide the image size, or the model is not flipscale's."""
        if image_size is None:
            return self
        if not self.is_ours:
            raise UserError(f"{self.name} takes images of {self.image_size} pixels; an image_size is for flipscale's")
        self.model.config.vision_config.patches_along(image_size)
        return replace(self, pixels=image_size)

    def unit_embeds(self, features: torch.Tensor) -> torch.Tensor:
        """Return projected features `(rows, width)` cut to `dims`, fp32 and of unit length. Raise UserError if they are
        narrower."""
        return _unit_embeds(features, self.dims, self.name)

    def unkept(self) -> "Embedder":
        """Return an embedder for images outside the test set, whose features are not kept."""
        return replace(self, kept=None)

    def bar(self, total: int | None, unit: str) -> Progress:
        what = f"evaluating {self.name}".rstrip()
        return Progress(total, what, unit, leave=False, delay=5, hidden=not self.accelerator.is_main_process)

    def share(self, count: int, most: int | None = None) -> Share:
        """Return this process's share of `count` images, or of `count` texts with at most `most` in a batch."""
        if most is None and torch.device(self.accelerator.device).type == "cpu":
            most = min(self.batch_size, _MOST_ON_CPU, _MOST_BYTES_ON_CPU // (12 * self.image_size**2))
        size = max(1, min(most or self.batch_size, -(-count // _LEAST_BATCHES)))
        return Share(count, size, self.accelerator.process_index, self.accelerator.num_processes)

    def rows(self, count: int) -> np.ndarray:
        """Return this process's rows of `count`, int64 `(rows,)`, in the order of its batches."""
        return self.share(count).rows()

    def image_batches(
        self, source: TarSource, features: Features | Literal["logits"] = "embeds"
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Collective, to its end. Yield the place of each batch among this process's rows of `source`, and the features
        of its images, fp32 `(rows, dim)` on the CPU.

        The last batch has no rows if other processes have a batch more.

        Args:
            features: `embeds`, projected and of unit length; `pooled`, before the projection, for linear probes; or the
                `logits` of a classifier.

        Raises:
            UserError, OSError: any process cannot decode an image, read a shard, or lost a worker.
        """
        batches: Iterable[tuple[range, torch.Tensor]] = self._embedded(source, features)
        if self.kept is not None:
            if (source, features) not in self.kept:
                self.kept[source, features] = list(batches)
            batches = self.kept[source, features]
        seen = 0
        for rows, output in batches:
            yield slice(seen, seen + len(rows)), output
            seen += len(rows)
            self.alive()

    def _embedded(self, source: TarSource, features: str) -> Iterator[tuple[range, torch.Tensor]]:
        """Collective, to its end. Yield the rows and the features of each batch of this process."""
        compute = self.pooled_features if features == "pooled" else self.image_features
        for rows, columns in self.image_columns(source):
            with torch.no_grad(), self.accelerator.autocast():
                output = compute(**columns)
            output = self.unit_embeds(output) if features == "embeds" else output.float()
            yield rows, output.cpu()[: len(rows)]

    def image_columns(self, source: TarSource) -> Iterator[tuple[range, PackedBatch]]:
        """Collective, to its end. Yield this process's rows of `source` and the model's inputs of their images, on its
        device, batch by batch. If other processes have a batch more, the last has no rows and one dummy image."""
        share, decode = self.share(len(source)), self.decoder()
        mine = share.batches()
        workers = min(self.num_workers, len(mine) if len(mine) > 1 else 0)
        decoded = decoded_batches(WholeImages(source, decode), mine, workers)
        with self.bar(len(source), "images") as bar:
            for rows, news in share.rounds():
                batch = agreed(self.accelerator, partial(next, decoded) if rows else partial(dummy_batch, decode))
                yield rows, batch.to(self.accelerator.device).with_image_size(self.pixels)
                self.alive()
                bar.update(news)

    def my_images(self, source: TarSource, features: Features = "embeds") -> torch.Tensor:
        """Collective. Return the features of this process's rows of `source`, fp32 `(rows, dim)`."""
        mine = torch.empty(0)
        for place, batch in self.image_batches(source, features):
            if not place.start:
                mine = batch.new_empty(len(self.rows(len(source))), batch.shape[1])
            mine[place] = batch
        return mine

    def measured(
        self, source: TarSource, measure: Callable[[slice, torch.Tensor], torch.Tensor], features: Any = "embeds"
    ) -> np.ndarray:
        """Collective. Return what `measure` makes of each batch of `image_batches`, `(rows, columns)`, of all images of
        `source` in shard order: `(images, columns)`."""
        mine = [measure(place, batch) for place, batch in self.image_batches(source, features)]
        return self.gathered(torch.cat(mine), len(source)).numpy()

    def images(self, source: TarSource, features: Features = "embeds") -> torch.Tensor:
        """Collective. Return the features of all images of `source` in shard order, fp32 `(images, dim)`."""
        return self.gathered(self.my_images(source, features), len(source))

    def texts(self, texts: Sequence[str], together: int | None = None) -> torch.Tensor:
        """Collective. Return the embeddings of `texts`, equal on all processes: unit fp32 `(texts, dim)`, on the CPU.

        Args:
            together: number of consecutive texts that share an embedding, such as the prompts of a class: their mean,
                of unit length again. By default each text has its own.
        """
        count = together or 1
        share = self.share(len(texts) // count, max(1, self.batch_size // count))
        mine: list[torch.Tensor] = []
        with self.bar(len(texts), "texts") as bar:
            # A process without a batch embeds the first text meanwhile.
            for rows, news in share.rounds():
                asked = rows or range(1)
                batch = texts[asked.start * count : asked.stop * count]
                firsts = range(0, len(batch), self.batch_size)
                embeds = torch.cat([self._embeds_of(list(batch[f : f + self.batch_size])) for f in firsts])
                if together is not None:  # means at unit length, rounded as in CLIP_benchmark
                    means = [group.mean(dim=0) for group in embeds.split(together)]
                    embeds = torch.stack([mean / mean.norm() for mean in means])
                mine.append(embeds[: len(rows)])
                self.alive()
                bar.update(news * count)
        return self.gathered(torch.cat(mine), share)

    def gathered(self, mine: torch.Tensor, share: int | Share) -> torch.Tensor:
        """Collective. Return all rows, `(count, dim)` on the CPU.

        Args:
            mine: this process's rows.
            share: its share, or the number of images.
        """
        share = share if isinstance(share, Share) else self.share(share)
        rows = [replace(share, rank=rank).rows() for rank in range(share.world)]
        # No process has more rows than the first.
        padded = torch.cat([mine, mine.new_zeros(len(rows[0]) - len(mine), *mine.shape[1:])])
        parts = self.accelerator.gather(padded.to(self.accelerator.device)).cpu().split(len(rows[0]))
        whole = torch.cat([part[: len(own)] for part, own in zip(parts, rows, strict=True)])
        return whole[torch.from_numpy(np.concatenate(rows).argsort())]

    def total(self, counts: Sequence[int]) -> list[int]:
        """Collective. Return the sums over the processes."""
        mine = torch.tensor(counts, dtype=torch.int64, device=self.accelerator.device)
        return self.accelerator.reduce(mine, "sum").tolist()

    @property
    def is_ours(self) -> bool:
        """Whether the model is flipscale's, whose images may have any size."""
        return type(self).image_size is Embedder.image_size

    # A subclass for another kind of model overrides the members below.

    def side(self, tower: str) -> "Embedder":
        """Return the embedder of the tower of `images` or `texts`."""
        return self

    @property
    def gives(self) -> tuple[str, ...]:
        """Parts of the model that tasks may need, see `Task.needs`."""
        return parts_of(getattr(self.model, "config", None))

    @property
    def image_size(self) -> int:
        """Number of pixels along each side of an image."""
        return self.pixels or self.model.config.vision_config.image_size

    @property
    def crop(self) -> str:
        """The crop of images, for tables."""
        return "squash" if InputShape.of(self.model.config).squashes else "resize, crop"

    @property
    def mask(self) -> dict[str, Any]:
        """The mask of the images as `ratio`, `views` and `kind`; empty for whole images."""
        return {}

    def decoder(self) -> Decoder:
        """Return the function that turns an encoded image and its row into the model's columns, or raises
        `UndecodableImage`. It goes to the workers, without this embedder and its model."""
        return partial(whole_square, InputShape.of(self.model.config).at(self.image_size))

    def image_features(self, **columns: torch.Tensor) -> torch.Tensor:
        """Return the features of a batch of images, `(batch, dim)`, not normalised."""
        return self.model.get_image_features(**columns).pooler_output

    def pooled_features(self, **columns: torch.Tensor) -> torch.Tensor:
        """Return the features before the projection, `(batch, width)`."""
        return self.model.vision_model(**columns).pooler_output

    def tokens(self, texts: list[str]) -> Any:
        """Return the tokens of texts, `(texts, length)`, in the form that `text_features` takes."""
        length = self.model.config.caption_config.max_position_embeddings
        return tokenise(self.tokenizer, texts, length)["input_ids"]

    def text_features(self, batch: Any) -> torch.Tensor:
        """Return the features of `tokens`, `(batch, dim)`, not normalised."""
        return self.model.get_text_features(batch).pooler_output

    def pooled_text_features(self, batch: Any) -> torch.Tensor:
        """Return the features of `tokens` before the projection, `(batch, width)`; of SigLIP, which has none, after."""
        projection, inputs = getattr(self.model, "text_projection", None), list[torch.Tensor]()
        if projection is None:
            return self.text_features(batch)
        with projection.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])):
            self.text_features(batch)
        return inputs[0]

    def _embeds_of(self, texts: list[str]) -> torch.Tensor:
        with torch.no_grad(), self.accelerator.autocast():
            output = self.text_features(self.tokens(texts).to(self.accelerator.device))
        return self.unit_embeds(output).cpu()


@dataclass(frozen=True)
class ClassifierEmbedder(Embedder):
    """An embedder of a `FlipForImageClassification`. An image's features are its logits; there are no texts."""

    @property
    def gives(self) -> tuple[str, ...]:
        return ("features", "head")

    def image_features(self, **columns: torch.Tensor) -> torch.Tensor:
        return self.model(**columns).logits


def agreed(accelerator: "Accelerator", make: Callable[[], Value]) -> Value:
    """Collective. Return the result of `make`. If it raised UserError or OSError on any process, all raise it, because
    a process that stopped alone would leave the others waiting."""
    made, faults = None, list[tuple[bool, str]]()
    try:
        made = make()
    except (UserError, OSError) as error:
        if accelerator.num_processes == 1:
            raise
        faults = [(isinstance(error, OSError), str(error))]
    if accelerator.num_processes > 1:
        is_fault = torch.tensor([len(faults)], device=accelerator.device)
        if accelerator.reduce(is_fault, "sum").item():
            is_of_system, text = min(gather_objects(faults))
            raise (OSError if is_of_system else UserError)(text)
    return cast(Value, made)


def parts_of(config: Any) -> tuple[str, ...]:
    """Return the parts of a model that tasks may need: the image tower's `features`, `texts`, a `decoder`, a list of
    `answers`. A foreign model has no configuration of flipscale's, and a dual encoder's parts."""
    texts = () if config is not None and getattr(config, "text_config", config) is None else ("texts",)
    others = {"decoder": "decoder_config", "answers": "answer_config"}
    return ("features", *texts, *(part for part, name in others.items() if getattr(config, name, None) is not None))


def image_embeds(
    model: "FlipModel",
    processor: "FlipProcessor",
    pictures: Sequence[Picture],
    batch_size: int = 64,
    dims: int | None = None,
) -> np.ndarray:
    """Return the embeddings of picture files or PIL images, for a search index, a linear probe or other arrays: fp32
    `(pictures, dim)` of unit length, so that inner products are cosines. They are cut to their first `dims` numbers."""
    batches = _batches(pictures, batch_size, "pictures")
    inputs = (processor(images=[_in_rgb(picture) for picture in batch], return_tensors="pt") for batch in batches)
    return _embeds(model, model.get_image_features, inputs, dims)


def text_embeds(
    model: "FlipModel",
    processor: "FlipProcessor",
    texts: Sequence[str],
    batch_size: int = 256,
    dims: int | None = None,
) -> np.ndarray:
    """Return the embeddings of texts: fp32 `(texts, dim)` of unit length, cut to their first `dims` numbers."""
    options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    inputs = (processor(text=list(batch), **options) for batch in _batches(texts, batch_size, "texts"))
    return _embeds(model, model.get_text_features, inputs, dims)


def _batches(items: Sequence[Value], size: int, unit: str) -> Iterator[Sequence[Value]]:
    if isinstance(items, Picture):  # the letters of a text are texts, too
        raise UserError(f"{unit} is {items!r:.80}; expected a list of {unit}")
    if not len(items):
        raise UserError(f"there are no {unit} to embed; check the folder's name")
    for first in each(range(0, len(items), size), "embedding", f"batches of {unit}"):
        yield items[first : first + size]


@torch.no_grad()
def _embeds(model: "FlipModel", features: Any, inputs: Iterator[Any], dims: int | None) -> np.ndarray:
    model.eval()
    outputs = (features(**batch.to(model.device)).pooler_output for batch in inputs)
    return np.concatenate([_unit_embeds(output, dims, "the model").cpu().numpy() for output in outputs])


def _unit_embeds(features: torch.Tensor, dims: int | None, name: str) -> torch.Tensor:
    from flipscale.model.modeling_flip import normalise_embeds  # slow to import; a model has done it

    width = features.shape[1]
    if dims is not None and not 1 <= dims <= width:
        raise UserError(f"dims is {dims}, and the embeddings of {name} have {width} numbers; name 1 to {width}")
    return normalise_embeds(features[:, :dims])


def _in_rgb(picture: Picture) -> Image.Image:
    """Return a picture in RGB as training decodes it: upright, and with transparent parts white."""
    if not isinstance(picture, Picture):
        raise UserError(f"a picture is of the type {type(picture).__name__}; expected a file's name or a PIL image")
    try:
        if isinstance(picture, Image.Image):
            return Image.fromarray(rgb_pixels(picture))
        with Image.open(picture) as image:
            return Image.fromarray(rgb_pixels(image))
    except (OSError, UndecodableImage) as error:
        raise UserError(f"{picture} cannot be read as a picture ({error})") from error
