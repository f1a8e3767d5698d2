"""Captioning: a decoder predicts the caption from the patches that the mask leaves, alone or beside a contrastive loss.

The image is masked before the image tower sees it, so that masking saves the tower's work too; CapPa (arXiv 2306.07915)
and OpenVision 2 encode all patches.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from flipscale.data.pairs import PairDataset
from flipscale.io.errors import UserError
from flipscale.model import FlipConfig, FlipDecoderConfig, FlipForConditionalGeneration, FlipModel, FlipPreTrainedModel
from flipscale.model.modeling_flip import FlipOutput
from flipscale.model.modeling_flip_decoder import FlipCaptionDecoder, caption_inputs, read_captions
from flipscale.objectives.objective import Objective
from flipscale.objectives.own_models.tower_gradients import given_to, watched

Prediction = Literal["next_token", "parallel", "mixed"]
# The share of the captions of which all tokens are predicted at once; of `mixed`, CapPa's.
PARALLEL_SHARES: dict[str, float] = {"next_token": 0.0, "parallel": 1.0, "mixed": 0.75}


@dataclass
class CaptioningOutput(FlipOutput):
    """A `FlipOutput`, `caption_losses`, see `FlipCaptionOutput`, and `gradient_squares`, see `watched`."""

    caption_losses: torch.Tensor | None = None
    gradient_squares: torch.Tensor | None = None


class CaptioningFlipModel(FlipModel):
    """A `FlipModel` and a decoder on its image tower: the weights of a `FlipModel` and of a
    `FlipForConditionalGeneration` by the same names."""

    def __init__(self, config: FlipConfig):
        super().__init__(config)
        self.decoder = FlipCaptionDecoder._from_config(
            config.decoder_config, image_width=config.vision_config.hidden_size
        )
        self.post_init()
        self._keys_to_ignore_on_load_unexpected = set()

    def forward(self, *inputs: Any, in_parallel: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """
        Embed images and captions as `FlipModel.forward`, and predict the captions' tokens from those of the images.

        Args:
            in_parallel: see `FlipCaptionDecoder.forward`.
        """
        with given_to(self.image_projection) as means:
            output = super().forward(*inputs, **kwargs)
        if not isinstance(output, FlipOutput):
            return output
        assert output.vision_model_output is not None
        assert output.vision_model_output.last_hidden_state is not None
        tokens, squares = watched(output.vision_model_output.last_hidden_state, means[0])
        captions = caption_inputs(kwargs["input_ids"], kwargs.get("attention_mask"), self.config.decoder_config)
        _, losses = read_captions(self.decoder, tokens, *captions, in_parallel, use_cache=False)
        return CaptioningOutput(**output, caption_losses=losses, gradient_squares=squares)


@dataclass(frozen=True, kw_only=True)
class Captioning(Objective):
    """The mean over captions of the mean over their tokens of the cross-entropy of each token. There is no text tower.

    Args:
        prediction: `next_token`, each token from those before it; `parallel`, all tokens at once from the image alone;
            or `mixed`, three quarters of the captions at once and the others one by one (CapPa).
    """

    model_class: ClassVar[type[FlipPreTrainedModel]] = FlipForConditionalGeneration
    exported_class: ClassVar[type[FlipPreTrainedModel]] = FlipForConditionalGeneration

    prediction: Prediction = "next_token"

    def model_config(self, config: FlipConfig) -> FlipConfig:
        changed = with_decoder(config, self.prediction)
        changed.text_config = None
        return changed

    def dataset(self, *arguments: Any, **options: Any) -> PairDataset:
        return captioned(super().dataset, self.prediction, *arguments, **options)

    def compared(self, output: Any) -> tuple[torch.Tensor, ...]:
        return ()

    def mean_loss(self, output: Any) -> torch.Tensor:
        assert output.caption_losses is not None
        return output.caption_losses.mean()


@dataclass(frozen=True, kw_only=True)
class WithCaptions(Objective):
    """Another objective, and `weight` times `Captioning`."""

    model_class: ClassVar[type[FlipPreTrainedModel]] = CaptioningFlipModel
    exported_class: ClassVar[type[FlipPreTrainedModel]] = CaptioningFlipModel

    other: Objective
    weight: float
    prediction: Prediction

    @property
    def is_coupled(self) -> bool:
        return self.other.is_coupled

    def model_config(self, config: FlipConfig) -> FlipConfig:
        changed = with_decoder(self.other.model_config(config), self.prediction)
        positions, longest = (part.max_position_embeddings for part in (changed.decoder_config, changed.text_config))
        if positions < longest:
            raise UserError(
                f"model.decoder_config.max_position_embeddings is {positions}, and captions are cut at "
                f"model.text_config.max_position_embeddings, {longest} tokens; use as many at least, or cut earlier"
            )
        return changed

    def dataset(self, *arguments: Any, **options: Any) -> PairDataset:
        return captioned(super().dataset, self.prediction, *arguments, **options)

    def compared(self, output: CaptioningOutput) -> tuple[torch.Tensor, ...]:
        return self.other.compared(output)

    def coupled_loss(self, *compared: torch.Tensor, **parameters: torch.Tensor) -> torch.Tensor:
        return self.other.coupled_loss(*compared, **parameters)

    def mean_loss(self, output: CaptioningOutput) -> torch.Tensor:
        assert output.caption_losses is not None
        return self.other.mean_loss(output) + self.weight * output.caption_losses.mean()

    def metrics(self, output: CaptioningOutput) -> dict[str, torch.Tensor]:
        assert output.caption_losses is not None
        return {**self.other.metrics(output), "caption_loss": output.caption_losses.mean()}

    def gradient_squares(self, output: CaptioningOutput) -> dict[str, torch.Tensor]:
        assert output.gradient_squares is not None
        return dict(zip(("contrastive_grad_norm", "caption_grad_norm"), output.gradient_squares, strict=True))


def with_decoder(config: FlipConfig, prediction: Prediction) -> FlipConfig:
    """Return a copy of `config` with a decoder, by default as wide as the text tower."""
    changed = copy.deepcopy(config)
    decoder = changed.decoder_config or FlipDecoderConfig.beside(changed.text_config)
    if PARALLEL_SHARES[prediction] > 0.0:
        # A token of the decoder's own: not every tokenizer has one to spare.
        decoder.mask_token_id, decoder.vocab_size = decoder.vocab_size, decoder.vocab_size + 1
    changed.decoder_config, changed.is_encoder_decoder = decoder, True
    return changed


def captioned(dataset: Any, prediction: Prediction, *arguments: Any, **options: Any) -> PairDataset:
    """Return what `dataset` makes of its arguments, which also draws the captions that are predicted at once.

    Raises:
        ValueError: words of captions are masked.
    """
    found: PairDataset = dataset(*arguments, parallel_share=PARALLEL_SHARES[prediction], **options)
    if found.text_mask_ratio > 0.0:
        raise UserError(
            f"a stage's text_mask_ratio is {found.text_mask_ratio:g}, and captions are learned word by word; leave it "
            "out"
        )
    return found
