"""The words of a caption as labels of its image, beside a contrastive loss: SuperCLIP (arXiv 2512.14480).

A linear head predicts the tokens of the caption from the image tower's mean token. It is never exported.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from flipscale.data.pairs import PairDataset
from flipscale.data.samples import BadSample
from flipscale.model import FlipConfig, FlipModel, FlipPreTrainedModel
from flipscale.objectives.objective import (
    SecondLossOutput,
    WithSecondLoss,
    recorded_inputs,
    watch_gradients,
    without_text_mask,
)

# Number of samples whose captions count how rare a word is.
_COUNTED = 8192


class WordsFlipModel(FlipModel):
    """A `FlipModel` for training whose forward pass also predicts the words of captions."""

    def __init__(self, config: FlipConfig):
        super().__init__(config)
        self.word_head = nn.Linear(config.vision_config.hidden_size, config.text_config.vocab_size)
        self.post_init()

    def forward(self, *inputs: Any, word_weights: torch.Tensor | None = None, **kwargs: Any) -> SecondLossOutput:
        """
        Args:
            word_weights: share of each token in its caption's target, fp32 as `input_ids`; None for no target.
        """
        with recorded_inputs(self.image_projection) as means:
            output = super().forward(*inputs, **kwargs)
        tokens, squares = watch_gradients(output.vision_model_output.last_hidden_state, means[0])
        # A sharded head computes in the precision of its weights.
        logits = self.word_head(tokens.mean(dim=1).to(self.word_head.weight.dtype))
        ids = kwargs["input_ids"]
        weights = torch.zeros_like(ids, dtype=torch.float32) if word_weights is None else word_weights
        losses = word_losses(logits, ids, weights)
        return SecondLossOutput(**output, second_losses=losses, gradient_squares=squares)


def word_losses(logits: torch.Tensor, input_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each image with its caption's words, fp32 `(images,)`; 0 for a caption without words.

    Args:
        logits: `(captions * views, vocabulary)`, the views of an image in a row.
        input_ids, weights: tokens of each caption, and their shares of its target: `(captions, tokens)`.
    """
    logits, views = logits.float(), len(logits) // len(input_ids)
    ids, weights = (tensor.repeat_interleave(views, dim=0) for tensor in (input_ids.long(), weights))
    return weights.sum(dim=1) * logits.logsumexp(dim=1) - (weights * logits.gather(1, ids)).sum(dim=1)


def word_rarity(dataset: PairDataset) -> torch.Tensor:
    """Return the inverse document frequency of each token, fp32 `(vocabulary,)`; 0 for special tokens.

    It is ln((1 + captions) / (1 + captions with the token)). The captions are those of the first 8,192 samples of the
    first lane, whose shards process 0 reads anyway. So all processes and starts count the same captions.
    """
    source, tokenizer, lanes = dataset.source, dataset.tokenizer, dataset.order.lanes
    assert tokenizer is not None
    batches, offsets = np.divmod(np.arange(min(_COUNTED, source.num_drawn)), lanes.width)
    texts = []
    for place in zip(*dataset.order.locate(batches * lanes.batch_size + offsets), strict=True):
        with suppress(BadSample):
            captions = source.read(*place).captions if source.kinds else source.read_captions(*place)
            texts += [caption.decode("utf-8", "replace") for caption in captions]
    counts = np.zeros(max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1))
    for ids in tokenizer(texts, truncation=True, max_length=dataset.shape.max_tokens)["input_ids"] if texts else []:
        counts[np.unique(ids)] += 1
    rarity = np.log((1 + len(texts)) / (1 + counts))
    rarity[tokenizer.all_special_ids] = 0.0
    return torch.from_numpy(rarity.astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class WithWords(WithSecondLoss):
    """Another objective plus `weight` times the cross-entropy of the caption's words, weighted by their rarity."""

    second_loss: ClassVar[str] = "word"
    model_class: ClassVar[type[FlipPreTrainedModel]] = WordsFlipModel
    columns: ClassVar[tuple[str, ...]] = ("word_weights",)

    def dataset(self, *arguments: Any, **options: Any) -> PairDataset:
        dataset = without_text_mask(super().dataset(*arguments, **options), "the word head learns every word")
        dataset.word_rarity = word_rarity(dataset)
        return dataset
