"""Captioning: a decoder predicts the caption from the visible patches, alone or beside a contrastive loss.

The image is masked before the image tower, so masking also saves the tower's work. CapPa (arXiv 2306.07915) and
OpenVision 2 encode all patches.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from flipscale.data.batch_inputs import BatchInputs
from flipscale.data.columns.column import Column
from flipscale.data.randomness import keyed_uniform
from flipscale.io.errors import UserError
from flipscale.model import FlipConfig, FlipDecoderConfig, FlipForConditionalGeneration, FlipModel, FlipPreTrainedModel
from flipscale.model.modeling_flip import FlipOutput
from flipscale.model.modeling_flip_caption import FlipCaptionDecoder, caption_inputs, read_captions
from flipscale.objectives.objective import (
    Objective,
    SecondLossOutput,
    WithSecondLoss,
    recorded_inputs,
    watch_gradients,
)

Prediction = Literal["next_token", "parallel", "mixed"]
# Share of captions whose tokens are all predicted at once; the share of `mixed` is CapPa's.
PARALLEL_SHARES: dict[str, float] = {"next_token": 0.0, "parallel": 1.0, "mixed": 0.75}


@dataclass(eq=False, repr=False)
class InParallel(Column):
    """`in_parallel` bool `(batch,)`: whether all tokens of a caption are predicted at once."""

    share: float

    def columns(self) -> dict[str, torch.Tensor]:
        draws = keyed_uniform(self.given.seed, "parallel", self.where, 1)[:, 0]
        return {"in_parallel": torch.from_numpy(draws < self.share)}


def in_parallel(given: BatchInputs, prediction: Prediction) -> list[Column]:
    share = PARALLEL_SHARES[prediction]
    return [InParallel(given, share)] if share > 0.0 else []


class CaptioningFlipModel(FlipModel):
    """A `FlipModel` with the decoder of a `FlipForConditionalGeneration` on its image tower."""

    def __init__(self, config: FlipConfig):
        super().__init__(config)
        width = config.vision_config.hidden_size
        self.decoder = FlipCaptionDecoder._from_config(config.decoder_config, image_width=width)
        self.post_init()
        self._keys_to_ignore_on_load_unexpected = set()

    def forward(self, *inputs: Any, in_parallel: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Embed images and captions as `FlipModel.forward`, and predict captions as `FlipCaptionDecoder.forward`."""
        with recorded_inputs(self.image_projection) as means:
            output = super().forward(*inputs, **kwargs)
        if not isinstance(output, FlipOutput):
            return output
        assert output.vision_model_output is not None
        assert output.vision_model_output.last_hidden_state is not None
        tokens, squares = watch_gradients(output.vision_model_output.last_hidden_state, means[0])
        captions = caption_inputs(kwargs["input_ids"], kwargs.get("attention_mask"), self.config.decoder_config)
        _, losses = read_captions(self.decoder, tokens, *captions, in_parallel, use_cache=False)
        return SecondLossOutput(**output, second_losses=losses, gradient_squares=squares)


@dataclass(frozen=True, kw_only=True)
class CaptionLoss(Objective):
    """The cross-entropy of each token, averaged over a caption's tokens, then over captions. There is no text tower.

    Args:
        prediction: `next_token`: each token from the tokens before it. `parallel`: all tokens at once from the image
            alone. `mixed`: three quarters of the captions in parallel, the rest by next token (CapPa).
    """

    model_class: ClassVar[type[FlipPreTrainedModel]] = FlipForConditionalGeneration
    exported_class: ClassVar[type[FlipPreTrainedModel]] = FlipForConditionalGeneration

    prediction: Prediction = "next_token"

    def model_config(self, config: FlipConfig) -> FlipConfig:
        changed = with_decoder(config, self.prediction)
        changed.text_config = None
        return changed

    def makers(self, given: BatchInputs) -> list[Column]:
        return [*super().makers(given), *in_parallel(given, self.prediction)]

    def loss_inputs(self, output: Any) -> tuple[torch.Tensor, ...]:
        return ()

    def per_sample_loss(self, output: Any) -> torch.Tensor:
        assert output.caption_losses is not None
        return output.caption_losses.mean()


@dataclass(frozen=True, kw_only=True)
class WithCaptions(WithSecondLoss):
    """Another objective plus `weight` times `CaptionLoss`."""

    second_loss: ClassVar[str] = "caption"
    model_class: ClassVar[type[FlipPreTrainedModel]] = CaptioningFlipModel
    exported_class: ClassVar[type[FlipPreTrainedModel]] = CaptioningFlipModel

    prediction: Prediction

    def model_config(self, config: FlipConfig) -> FlipConfig:
        changed = with_decoder(self.other.model_config(config), self.prediction)
        positions, longest = (part.max_position_embeddings for part in (changed.decoder_config, changed.text_config))
        if positions < longest:
            raise UserError(
                f"model.decoder_config.max_position_embeddings is {positions}; expected at least the {longest} of "
                "model.text_config.max_position_embeddings, at which captions are cut"
            )
        return changed

    def makers(self, given: BatchInputs) -> list[Column]:
        return [*super().makers(given), *in_parallel(given, self.prediction)]


def with_decoder(config: FlipConfig, prediction: Prediction) -> FlipConfig:
    """Return a copy of `config` with a decoder, by default of the text tower's width."""
    changed = copy.deepcopy(config)
    decoder = changed.decoder_config or FlipDecoderConfig.for_text(changed.text_config)
    if PARALLEL_SHARES[prediction] > 0.0:
        # An additional token, because not every tokenizer has an unused one.
        decoder.mask_token_id, decoder.vocab_size = decoder.vocab_size, decoder.vocab_size + 1
    changed.decoder_config, changed.is_encoder_decoder = decoder, True
    return changed
