"""A batch of training pairs: read, decoded, cropped, masked and tokenised, in a loader worker."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from flipscale.data.captions import UntokenizableCaption, choose_caption, tokenise_captions
from flipscale.data.decode import DRAWS_PER_CROP, Crop, decode_crop, visible_patches
from flipscale.data.faults import BadSample, Fault, candidates
from flipscale.data.masks.image import keep_patches
from flipscale.data.masks.keyed import branch_scales, keyed_patches, left_out, mask_tokens
from flipscale.data.masks.recipe import MaskRecipe
from flipscale.data.randomness import keyed_uniform
from flipscale.data.recipe import DataRecipe
from flipscale.data.sources.mixture import order_of
from flipscale.data.sources.source import Sample, Source
from flipscale.io.errors import UserError
from flipscale.model.configuration_flip import FlipConfig, patches_along
from flipscale.model.patches import num_kept

# How the integers of a batch travel to the device; the model widens them there.
_NARROW = {"input_ids": torch.int32, "position_ids": torch.int32, "attention_mask": torch.bool}


@dataclass(frozen=True)
class InputShape:
    """What the loader must know of the model."""

    image_size: int
    patch_size: int
    max_tokens: int
    num_blocks: int = 0

    @classmethod
    def of(cls, config: FlipConfig) -> "InputShape":
        """Return the shape of the inputs that a model of `config` takes."""
        vision, text = config.vision_config, config.caption_config
        return cls(vision.image_size, vision.patch_size, text.max_position_embeddings, vision.num_hidden_layers)

    def at(self, image_size: int | None) -> "InputShape":
        """Return the same for images of `image_size` pixels; None leaves them as they are.

        Raises:
            ValueError: the patch does not divide them.
        """
        if image_size is None:
            return self
        patches_along(image_size, self.patch_size)
        return replace(self, image_size=image_size)

    @property
    def side(self) -> int:
        """Patches along each side of an image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a whole image."""
        return self.side**2


# Pixels of the model's images that are read and decoded before the first of them is resized.
_PIXELS_TOGETHER = 1 << 16


class Pair(NamedTuple):
    """A decoded crop and what goes with it, such as a caption; and the fault of the sample that they replace, if they
    replace one."""

    crop: Crop
    answer: Any
    fault: Fault | None


class PairDataset(Dataset):
    """Training pairs by global position. `__getitems__` returns the batch of a list of positions:

    * `patches` uint8 `(batch, kept, 3 * p * p)`: the visible patches of each crop.
    * `patch_index` int16 `(batch, kept)`: where they stood; absent when nothing is masked.
    * `input_ids` int32 and `attention_mask` bool `(batch, max_tokens)`.
    * `faults`: a list of `Fault`, one for each sample that could not be used. The first good one of its `candidates`
      has taken its place.

    Several views of a masked image make `patches` `(batch, views, kept, 3 * p * p)` and `patch_index`
    `(batch, views, kept)`. Where words are masked too, the captions have only the tokens that are left, and
    `position_ids` say where those stood. With `sends_masked`, the batch also has the patches that are not visible:
    `masked_patches` uint8 `(batch, num_patches - kept, 3 * p * p)`. With a `drop_path_rate`, it has what the branches
    of the image tower's blocks are multiplied by: `branch_scales` fp32 `(batch, blocks, 2)`, or with several views
    `(batch, views, blocks, 2)`. With a `parallel_share`, it has which captions are predicted at once: `in_parallel`
    bool `(batch,)`.
    """

    # What goes with an image, in messages.
    what: ClassVar[str] = "caption"

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase | None,
        recipe: DataRecipe,
        shape: InputShape,
        seed: int,
        mask_ratio: float,
        mask: MaskRecipe | None = None,
        text_mask_ratio: float = 0.0,
        sends_masked: bool = False,
        parallel_share: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        """
        Raises:
            ValueError: the mask is impossible at these ratios.
        """
        self.source = source
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.shape = shape
        self.seed = seed
        self.mask = mask or MaskRecipe()
        self.mask_ratio = mask_ratio
        self.text_mask_ratio = text_mask_ratio
        self.sends_masked = sends_masked
        self.parallel_share = parallel_share
        self.drop_path_rate = drop_path_rate
        self.kept = num_kept(shape.num_patches, mask_ratio)
        num_kept(shape.max_tokens, text_mask_ratio, "tokens")
        if mask_ratio > 0.0:
            # Drawn once, so that an impossible mask is refused here.
            keep_patches(torch.zeros(1, shape.side, shape.side), mask_ratio, self.mask.kind, self.mask.views)
        self.order = order_of(source, seed, recipe)
        # The pid of each worker and the shard it is reading, in shared memory: when a worker dies, the trainer looks
        # here to say what it was reading.
        self.reading = torch.zeros((max(recipe.num_workers, 1), 2), dtype=torch.int64).share_memory_()

    def __getitems__(self, positions: list[int]) -> dict[str, Any]:
        """Return the batch of these global positions; the class says what is in it.

        Raises:
            ValueError, OSError: as `Source.read`, or no sample can take the place of a bad one.
        """
        try:
            return self._batch(positions, each_caption=False)
        except UntokenizableCaption:
            # Which one it is shows where each is tokenised by itself, before its image counts.
            return self._batch(positions, each_caption=True)

    def _batch(self, positions: list[int], each_caption: bool) -> dict[str, Any]:
        where = np.asarray(positions, dtype=np.int64)
        index = self._visible(where)
        masked_index = left_out(index, self.shape.num_patches) if self.sends_masked and index is not None else None
        patches = self._empty((len(where), self.kept) if index is None else index.shape)
        masked_patches = None if masked_index is None else self._empty(masked_index.shape)
        answers: list[Any] = []
        faults: list[Fault] = []
        for row, (image, answer, fault) in enumerate(self._images(where, each_caption)):
            patches[row] = self._cut(image, None if index is None else index[row])
            if masked_index is not None and masked_patches is not None:
                masked_patches[row] = self._cut(image, masked_index[row])
            answers.append(answer)
            faults += [fault] if fault is not None else []
        columns = {**self._answers(answers, where), "patches": torch.from_numpy(patches)}
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
        return {**{name: value.to(_NARROW.get(name, value.dtype)) for name, value in columns.items()}, "faults": faults}

    def _images(self, where: np.ndarray, each_caption: bool) -> Iterator[tuple[np.ndarray, Any, Fault | None]]:
        """Yield the image of each position, uint8 RGB `(image_size, image_size, 3)`, what goes with it, and the fault
        of the sample that it replaces."""
        for pair in self._in_stages(self._pairs(where, each_caption)):
            yield pair.crop.fitted(self.shape.image_size), pair.answer, pair.fault

    def _in_stages(self, pairs: Iterator[Pair]) -> Iterator[Pair]:
        """Yield the pairs, of small images a few at a time: decoders and filters in turns would drive each other's code
        from the cache, and cost a fifth more. Of larger ones, only one is in memory."""
        count = max(1, _PIXELS_TOGETHER // self.shape.image_size**2)
        while some := list(islice(pairs, count)):
            yield from some

    def _visible(self, where: np.ndarray) -> np.ndarray | None:
        """Return the visible patches of each position, `(batch, kept)` or `(batch, views, kept)`; None if all are."""
        if self.mask_ratio == 0.0:
            return None
        index = keyed_patches(self.seed, where, self.shape.side, self.mask_ratio, self.mask)
        return index if self.mask.views > 1 else index[:, 0]

    def _empty(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.empty((*shape, 3 * self.shape.patch_size**2), np.uint8)

    def _cut(self, image: np.ndarray, index: np.ndarray | None) -> np.ndarray:
        return visible_patches(image, self.shape.patch_size, index)

    def _answers(self, captions: list[Any], where: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the captions' columns, with the words masked that the recipe masks."""
        assert self.tokenizer is not None
        tokens = tokenise_captions(self.tokenizer, captions, self.shape.max_tokens)
        if self.text_mask_ratio > 0.0:
            tokens = mask_tokens(tokens, self.seed, where, self.text_mask_ratio, self.mask)
        return tokens

    def _pairs(self, where: np.ndarray, each_caption: bool) -> Iterator[Pair]:
        """Yield the pair of each position, read and decoded when it is asked for; `each_caption` as `_first_good`."""
        shards, numbers = self.order.locate(where)
        self.source.fetch_ahead(self.order.shards_ahead(where))
        crop_draws = keyed_uniform(self.seed, "crop", where, DRAWS_PER_CROP)
        if not self.recipe.mirror:
            crop_draws[:, -1] = 1.0
        caption_draws = keyed_uniform(self.seed, "caption", where, 1)[:, 0].tolist()
        places = zip(where.tolist(), shards.tolist(), numbers.tolist(), strict=True)
        for row, (position, shard, number) in enumerate(places):
            crop, answer, bad = self._first_good(shard, number, crop_draws[row], caption_draws[row], each_caption)
            fault = None
            if bad is not None:
                name, key = self.source.shard_name(shard), self.source.key(shard, number)
                fault = Fault(position, name, number, key, bad.cause, str(bad))
            yield Pair(crop, answer, fault)

    def _first_good(
        self, shard: int, number: int, crop_draw: np.ndarray, caption_draw: float, each_caption: bool
    ) -> tuple[Crop, Any, BadSample | None]:
        """Return the crop of a sample, what goes with it and None, or those of its replacement and what is wrong with
        it.

        Args:
            each_caption: whether a caption that the tokenizer cannot take makes a sample bad.
        """
        why: BadSample | None = None
        worker = get_worker_info()
        if worker is not None:
            self.reading.numpy()[worker.id] = os.getpid(), shard
        for candidate in candidates(self.source.shard_sizes, shard, number):
            try:
                sample = self.source.read(*candidate)
                answer = self._answer(sample, caption_draw, each_caption)
                return decode_crop(sample.image, crop_draw, self.shape.image_size, self.recipe.crop_scale), answer, why
            except BadSample as error:
                why = why or error
        raise UserError(
            f"shard {self.source.shard_name(shard)}: neither sample {number} nor any that could take its place has a "
            f"readable image and {self.what} ({why}); fetch the shards again or remove them"
        )

    def _answer(self, sample: Sample, draw: float, each_caption: bool) -> Any:
        """Return one of the sample's captions, chosen by `draw`.

        Raises:
            BadSample: it has none that is good.
        """
        caption = choose_caption(sample.captions, draw)
        if each_caption:
            assert self.tokenizer is not None
            tokenise_captions(self.tokenizer, [caption], self.shape.max_tokens)
        return caption
