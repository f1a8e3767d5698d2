"""A batch of training pairs: read, decoded, cropped, masked and tokenised, in a loader worker."""

import copy
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from flipscale.data.augment import draw_colors, recolored
from flipscale.data.captions import UntokenizableCaption, choose_captions, pack_captions, tokenise_captions
from flipscale.data.decode import DRAWS_PER_CROP, Crop, decode_crop, visible_patches
from flipscale.data.masks import branch_scales, keep_patches, keyed_patches, mask_tokens, removed_patches
from flipscale.data.order import order_of
from flipscale.data.randomness import keyed_uniform
from flipscale.data.samples import BadSample, Fault, Sample, SampleNumbers, Source, candidates
from flipscale.io.errors import UserError
from flipscale.model.configuration_flip import FlipConfig, patches_along
from flipscale.model.patches import num_kept
from flipscale.recipe.data import DataRecipe, MaskRecipe

_log = logging.getLogger(__name__)

Value = TypeVar("Value")

# Integers travel to the device in these types; the model widens them there.
_NARROW = {
    **dict.fromkeys(("input_ids", "position_ids", "caption_ends"), torch.int32),
    "attention_mask": torch.bool,
}


@dataclass(frozen=True)
class InputShape:
    """The sizes of the model's inputs: pixels along each side, tokens of a caption, blocks of the image tower.

    Args:
        squashes: whether a test image is resized to the square, else its centre is cut out.
    """

    image_size: int
    patch_size: int
    max_tokens: int
    num_blocks: int = 0
    squashes: bool = False

    @classmethod
    def of(cls, config: FlipConfig) -> "InputShape":
        vision, text = config.vision_config, config.caption_config
        sizes = (vision.image_size, vision.patch_size, text.max_position_embeddings, vision.num_hidden_layers)
        return cls(*sizes, squashes=getattr(config, "squashes", False))

    def at(self, image_size: int | None) -> "InputShape":
        """Return the shape for another image size; None keeps the size."""
        if image_size is None:
            return self
        try:
            patches_along(image_size, self.patch_size)
        except ValueError as error:
            raise UserError(str(error)) from error
        return replace(self, image_size=image_size)

    @property
    def side(self) -> int:
        """Number of patches along each side of an image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.side**2


# Number of samples that are read at the start for the names of kinds of captions.
_SAMPLES_WITH_KINDS = 256
# Number of the model's pixels that are decoded before the first crop is resized. Alternating decoders and filters would
# evict each other's code from the cache and cost a fifth more. Of large images, only one is in memory.
_PIXELS_TOGETHER = 1 << 16


@dataclass(eq=False, repr=False)
class PairDataset(Dataset):
    """Training pairs by global position. `__getitems__` returns the batch of a list of positions.

    Columns:

    * `patches` uint8 `(batch, kept, 3 * p * p)`: visible patches of each crop.
    * `patch_index` int16 `(batch, kept)`: positions of the visible patches; absent without a mask.
    * `input_ids` int32, `attention_mask` bool `(batch * captions_per_image, max_tokens)`, an image's captions in a row.
    * `faults`: a list of `Fault`, one for each bad sample. The first good one of its `candidates` replaces it.

    Options add columns or change shapes:

    * Several views: `patches` `(batch, views, kept, 3 * p * p)` and `patch_index` `(batch, views, kept)`.
    * `text_mask_ratio`: captions have the kept tokens only, and `position_ids` are their positions.
    * `recipe.pack_captions`: the columns of `pack_captions`, `input_ids` `(rows, max_tokens)`, in place of the mask.
    * `sends_masked`: `masked_patches` uint8 `(batch, num_patches - kept, 3 * p * p)`, the removed patches.
    * `drop_path_rate`: `branch_scales` fp32 `(batch, blocks, 2)`, with several views `(batch, views, blocks, 2)`:
      factors of the branches of the image tower's blocks.
    * `sends_caption_ids`: `caption_ids` int64 `(batch,)`, equal for captions with equal tokens, before their mask.
    * `parallel_share`: `in_parallel` bool `(batch,)`, whether all tokens of a caption are predicted at once.

    Raise UserError if the mask is impossible at these ratios.
    """

    # Name of the annotation of an image, for messages.
    annotation: ClassVar[str] = "caption"

    source: Source
    tokenizer: PreTrainedTokenizerBase | None
    recipe: DataRecipe
    shape: InputShape
    seed: int
    mask_ratio: float
    mask: MaskRecipe = field(default_factory=MaskRecipe)
    text_mask_ratio: float = 0.0
    sends_masked: bool = False
    sends_caption_ids: bool = False
    parallel_share: float = 0.0
    drop_path_rate: float = 0.0
    captions_per_image: int = 1

    def __post_init__(self) -> None:
        self.kept = check_masks(self.shape, self.mask_ratio, self.mask, self.text_mask_ratio)
        self.order = order_of(self.source, self.seed, self.recipe)
        # Process number and current shard of each worker, in shared memory, to report the shard of a dead worker.
        self.reading = torch.zeros((max(self.recipe.workers, 1), 2), dtype=torch.int64).share_memory_()
        # Whether a caption is tokenised as soon as it is read, so that an untokenizable caption is replaced.
        self.checks_captions = False

    def __getitems__(self, positions: list[int]) -> dict[str, Any]:
        where = np.asarray(positions, dtype=np.int64)
        index: np.ndarray | None = None
        if self.mask_ratio > 0.0:
            mask = self.mask
            index = keyed_patches(self.seed, where, self.shape.side, self.mask_ratio, mask.kind, mask.views)
            index = index if mask.views > 1 else index[:, 0]
        removed = removed_patches(index, self.shape.num_patches) if self.sends_masked and index is not None else None
        patch_bytes = 3 * self.shape.patch_size**2
        patches = np.empty((*((len(where), self.kept) if index is None else index.shape), patch_bytes), np.uint8)
        masked_patches = None if removed is None else np.empty((*removed.shape, patch_bytes), np.uint8)
        annotations: list[Any] = [None] * len(where)
        faults: dict[int, Fault] = {}

        def fill(row: int, image: np.ndarray, annotation: Any, fault: Fault | None) -> None:
            patches[row] = visible_patches(image, self.shape.patch_size, None if index is None else index[row])
            if removed is not None and masked_patches is not None:
                masked_patches[row] = visible_patches(image, self.shape.patch_size, removed[row])
            annotations[row] = annotation
            if fault is not None:
                faults[row] = fault

        for row, content in enumerate(self._images(where)):
            fill(row, *content)
        try:
            columns = self._annotation_columns(annotations, where)
        except UntokenizableCaption:
            checked = copy.copy(self)
            checked.checks_captions = True
            for row, annotation in enumerate(annotations):
                try:
                    self._tokenise(self._texts(annotation))
                except UntokenizableCaption:
                    fill(row, *next(checked._images(where[row : row + 1])))
            columns = self._annotation_columns(annotations, where)
        columns["patches"] = torch.from_numpy(patches)
        if index is not None:
            columns["patch_index"] = torch.from_numpy(index)
        if self.parallel_share > 0.0:
            draws = keyed_uniform(self.seed, "parallel", where, 1)[:, 0]
            columns["in_parallel"] = torch.from_numpy(draws < self.parallel_share)
        if masked_patches is not None:
            columns["masked_patches"] = torch.from_numpy(masked_patches)
        if self.drop_path_rate > 0.0:
            views = self.mask.views_at(self.mask_ratio)
            scales = branch_scales(self.seed, where, views, self.shape.num_blocks, self.drop_path_rate)
            columns["branch_scales"] = torch.from_numpy(scales if views > 1 else scales[:, 0])
        return {**narrowed(columns), "faults": [faults[row] for row in sorted(faults)]}

    def _images(self, where: np.ndarray) -> Iterator[tuple[np.ndarray, Any, Fault | None]]:
        """Yield the image of each position, uint8 RGB `(image_size, image_size, 3)`, its annotation and its fault."""
        pairs, size, jitter = self._pairs(where), self.shape.image_size, self.recipe.augment.color_jitter
        colors = iter(draw_colors(jitter, self.seed, where)) if jitter.changes else None
        together = max(1, _PIXELS_TOGETHER // size**2)
        while group := list(islice(pairs, together)):
            for crop, annotation, fault in group:
                image = crop.fitted(size)
                yield recolored(image, next(colors)) if colors else image, annotation, fault

    def _pairs(self, where: np.ndarray) -> Iterator[tuple[Crop, Any, Fault | None]]:
        """Yield the crop of each position, its annotation, and the fault of the sample that they replace."""
        shards, numbers = self.order.locate(where)
        self.source.fetch_ahead(self.order.shards_ahead(where))
        crop_draws = keyed_uniform(self.seed, "crop", where, DRAWS_PER_CROP)
        if not self.recipe.mirror:
            crop_draws[:, -1] = 1.0
        caption_draws = keyed_uniform(self.seed, "caption", where, self.captions_per_image).tolist()
        places = zip(where.tolist(), shards.tolist(), numbers.tolist(), strict=True)
        for row, (position, shard, number) in enumerate(places):
            read = partial(self._read, crop_draw=crop_draws[row], draws=caption_draws[row])
            (crop, annotation), fault = self._read_or_replace(position, shard, number, read)
            yield crop, annotation, fault

    def _read_or_replace(
        self, position: int, shard: int, number: int, read: Callable[[tuple[int, int]], Value]
    ) -> tuple[Value, Fault | None]:
        """Read a sample, or its first good replacement. Return the value, and the fault of a replaced sample."""
        fault: Fault | None = None
        worker = get_worker_info()
        if worker is not None:
            self.reading.numpy()[worker.id] = os.getpid(), shard
        for candidate in candidates(self.source, shard, number):
            try:
                return read(candidate), fault
            except BadSample as error:
                if fault is None:
                    name, key = self.source.shard_name(shard), self.source.key(shard, number)
                    fault = Fault(position, name, number, key, error.cause, str(error))
        raise UserError(
            f"shard {self.source.shard_name(shard)}: neither sample {number} nor any of its replacements has a "
            f"readable image and {self.annotation} ({fault and fault.detail}); fetch the shards again or remove them"
        )

    def _read(self, place: tuple[int, int], crop_draw: np.ndarray, draws: list[float]) -> tuple[Crop, Any]:
        sample = self.source.read(*place)
        annotation = self._annotation(sample, draws)
        if self.checks_captions:
            self._tokenise(self._texts(annotation))
        return decode_crop(sample.image, crop_draw, self.shape.image_size, self.recipe.crop_scale), annotation

    def _annotation(self, sample: Sample, draws: list[float]) -> Any:
        """Return the annotation of a sample; each of `draws` chooses one of its captions."""
        if self.recipe.captions:
            return choose_captions(sample.kinds, self.recipe.captions, draws)
        return choose_captions({"": sample.captions}, {"": 1.0}, draws)

    def _texts(self, annotation: Any) -> list[str]:
        return annotation

    def _annotation_columns(self, captions: list[Any], where: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the columns of the annotations, with the recipe's mask of tokens."""
        tokens = self._tokenise([text for texts in captions for text in texts])
        ids = {"caption_ids": caption_ids(tokens["input_ids"])} if self.sends_caption_ids else {}
        if self.text_mask_ratio > 0.0:
            tokens = mask_tokens(tokens, self.seed, where, self.text_mask_ratio, self.mask.text_kind)
        if self.recipe.pack_captions:
            tokens = pack_captions(tokens)
        return {**tokens, **ids}

    def _tokenise(self, captions: list[str]) -> dict[str, torch.Tensor]:
        assert self.tokenizer is not None
        return tokenise_captions(self.tokenizer, captions, self.shape.max_tokens)


def check_masks(shape: InputShape, mask_ratio: float, mask: MaskRecipe, text_mask_ratio: float) -> int:
    """Return the number of kept patches of an image. Raise UserError if a mask is impossible at these ratios."""
    try:
        kept = num_kept(shape.num_patches, mask_ratio)
        num_kept(shape.max_tokens, text_mask_ratio, "tokens")
    except ValueError as error:
        raise UserError(str(error)) from error
    if mask_ratio > 0.0:
        # Drawn once, so that an impossible mask is refused here.
        keep_patches(torch.zeros(1, shape.side, shape.side), mask_ratio, mask.kind, mask.views)
    return kept


def narrowed(columns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the columns in the types in which they travel to the device."""
    return {name: value.to(_NARROW.get(name, value.dtype)) for name, value in columns.items()}


def caption_ids(input_ids: torch.Tensor) -> torch.Tensor:
    """Return a hash of each row of tokens, int64 `(captions,)`, the same in all processes."""
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in input_ids.numpy()]
    return torch.from_numpy(np.frombuffer(b"".join(digests), "<i8").copy())


def check_kinds(source: Source, names: Sequence[str]) -> None:
    """Log how many of the first samples of a source, or of each source of a mixture, have each of some kinds of
    captions. Raise UserError if none of them has a kind."""
    counts, total = dict.fromkeys(names, 0), 0
    for part in source.parts or [source]:
        for place in islice(SampleNumbers(part), _SAMPLES_WITH_KINDS if names else 0):
            with suppress(BadSample):
                kinds, total = part.read(*place).kinds, total + 1
                for kind in counts:
                    counts[kind] += any(text.strip() for text in kinds.get(kind, ()))
    shares = ", ".join(f"{kind} in {count}" for kind, count in counts.items())
    for kind, count in counts.items():
        if total and not count:
            raise UserError(
                f"data.captions or a stage's has the kind {kind!r}, which none of the first {total} samples has "
                f"({shares}); name a field of KEY.json, txt, or a column"
            )
    if names:
        _log.info("captions: of the first %d samples, %s", total, shares)
