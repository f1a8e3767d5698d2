"""The tokens of each image's captions: chosen, tokenised, masked and packed."""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from flipscale.data.captions import UntokenizableCaption, choose_captions, pack_captions, tokenise_captions
from flipscale.data.columns.column import Candidate, Column, UnusableRows
from flipscale.data.masks import mask_tokens
from flipscale.data.randomness import keyed_uniform


@dataclass(eq=False, repr=False)
class Tokens(Column):
    """The tokens of captions, an image's captions in a row.

    * `input_ids` int32, `attention_mask` bool `(batch * per_image, max_tokens)`.
    * With `text_mask_ratio`, captions have the kept tokens only, and `position_ids` int32 are their positions.
    * With `recipe.pack_captions`: the columns of `pack_captions`, with `input_ids` `(rows, max_tokens)`.
    * With `sends_ids`: `caption_ids` int64 `(batch,)`, equal for captions with equal tokens, before their mask.

    With teachers, each image has its first caption, which they saw.
    """

    reads: ClassVar[str] = "caption"

    per_image: int = 1
    sends_ids: bool = False

    def draw(self) -> None:
        self._checks = False
        draws = keyed_uniform(self.given.seed, "caption", self.where, self.per_image)
        self._draws = (0.0 * draws if self.given.teachers else draws).tolist()

    def read(self, row: int, candidate: Candidate) -> list[str]:
        if weights := self.given.recipe.captions:
            texts = choose_captions(candidate.sample.kinds, weights, self._draws[row])
        else:
            # The image of a sample is not read if its features are stored.
            read = candidate.source.read_captions
            captions = read(*candidate.place) if "images" in self.given.stored else candidate.sample.captions
            texts = choose_captions({"": captions}, {"": 1.0}, self._draws[row])
        if self._checks:
            self._tokenise(texts)
        return texts

    def columns(self) -> dict[str, torch.Tensor]:
        try:
            tokens = self._tokenise([text for texts in self.values for text in texts])
        except UntokenizableCaption:
            # From now on, a caption is tokenised as soon as it is read.
            self._checks = True
            raise UnusableRows([row for row, texts in enumerate(self.values) if not self._has_tokens(texts)]) from None
        ids = {"caption_ids": caption_ids(tokens["input_ids"])} if self.sends_ids else {}
        if self.given.text_mask_ratio > 0.0:
            kind, ratio = self.given.mask.text_kind, self.given.text_mask_ratio
            tokens = mask_tokens(tokens, self.given.seed, self.where, ratio, kind)
        if self.given.recipe.pack_captions:
            tokens = pack_captions(tokens)
        # Integers travel to the device in narrow types; the model widens them there.
        narrow = {name: torch.bool if name == "attention_mask" else torch.int32 for name in tokens}
        return {**{name: value.to(narrow[name]) for name, value in tokens.items()}, **ids}

    def _has_tokens(self, texts: list[str]) -> bool:
        try:
            return bool(self._tokenise(texts))
        except UntokenizableCaption:
            return False

    def _tokenise(self, captions: list[str]) -> dict[str, torch.Tensor]:
        assert self.given.tokenizer is not None
        return tokenise_captions(self.given.tokenizer, captions, self.given.shape.max_tokens)


def caption_ids(input_ids: torch.Tensor) -> torch.Tensor:
    """Return a hash of each row of tokens, int64 `(captions,)`, the same in all processes."""
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in input_ids.numpy()]
    return torch.from_numpy(np.frombuffer(b"".join(digests), "<i8").copy())
