"""FLIP models that write captions: the image tower, and a decoder that looks at the tokens of the visible patches."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import EncoderDecoderCache
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutputWithPooling, Seq2SeqLMOutput
from transformers.utils import can_return_tuple

from .configuration_flip import FlipConfig
from .modeling_flip import FlipPreTrainedModel, FlipVisionModel
from .modeling_flip_decoder import (
    CACHE,
    FlipCaptionDecoder,
    FlipDecoderOutput,
    bare_captions,
    caption_inputs,
    read_captions,
)

# The arguments of `FlipVisionModel.forward` beside `pixel_values`.
_IMAGES = (*("image_mask_ratio", "patches", "patch_index", "interpolate_pos_encoding", "image_size", "branch_scales"),)


@dataclass
class FlipCaptionOutput(Seq2SeqLMOutput):
    """
    transformers' output of a model with an encoder and a decoder. `loss` is the mean of `caption_losses`.

    Args:
        caption_losses: of each caption, the mean of its tokens' negative log-likelihoods in nats: fp32 `(batch,)`.
    """

    caption_losses: torch.Tensor | None = None


def _output(
    encoded: BaseModelOutputWithPooling, decoded: FlipDecoderOutput, losses: torch.Tensor | None, return_logits: bool
) -> FlipCaptionOutput:
    return FlipCaptionOutput(
        loss=None if losses is None else losses.mean(),
        logits=decoded.logits if return_logits else None,
        decoder_hidden_states=decoded.hidden_states,
        decoder_attentions=decoded.attentions,
        cross_attentions=decoded.cross_attentions,
        encoder_last_hidden_state=encoded[0],
        encoder_hidden_states=encoded.get("hidden_states"),
        encoder_attentions=encoded.get("attentions"),
        caption_losses=losses,
        **{CACHE: decoded.cache},
    )


class _PositionsUsed(StoppingCriteria):
    """Ends captions when the decoder has no position for another token."""

    def __init__(self, positions: int):
        self.positions = positions

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((len(input_ids),), input_ids.shape[1] > self.positions, device=input_ids.device)


class FlipForConditionalGeneration(FlipPreTrainedModel, GenerationMixin):
    """The image tower and a decoder that writes captions. Loaded from the folder of a model that has text tower,
    projections and decoder, it has what it needs of them."""

    config: FlipConfig
    main_input_name = "pixel_values"
    _can_compile_fullgraph = True  # `generate` compiles the decoder for a static cache
    _keys_to_ignore_on_load_unexpected = [r"^text_", r"^image_projection\.", r"^logit_", r"^fusion\."]  # noqa: RUF012

    def __init__(self, config: FlipConfig):
        """
        Raises:
            ValueError: the configuration has no decoder.
        """
        if config.decoder_config is None:
            raise ValueError(
                "the config has no decoder_config, so the model writes no captions; load it as a FlipModel"
            )
        super().__init__(config)
        self.vision_model = FlipVisionModel._from_config(config.vision_config)
        self.decoder = FlipCaptionDecoder._from_config(
            config.decoder_config, image_width=config.vision_config.hidden_size
        )
        self.post_init()

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.vision_model

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.decoder.set_output_embeddings(new_embeddings)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return the image tower's output; `pooler_output` is the mean over all tokens, `(batch, hidden_size)`. The
        arguments are those of `FlipVisionModel.forward`."""
        return self.vision_model(pixel_values=pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutputWithPooling | None = None,
        labels: torch.Tensor | None = None,
        in_parallel: torch.Tensor | None = None,
        return_logits: bool = True,
        cache: EncoderDecoderCache | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> FlipCaptionOutput:
        r"""
        Predict the tokens of captions, which are given as a tokenizer makes them (`input_ids`), as targets (`labels`),
        or as what the decoder reads (`decoder_input_ids`).

        Args:
            input_ids, attention_mask: `(batch, tokens)`, captions, of which `caption_inputs` makes `decoder_input_ids`
                and `labels`.
            decoder_input_ids: `(batch, tokens)`, the first of each `bos_token_id`. `logits[:, i]` are of the token
                after the i-th. Left out, they are the labels, one place to the right.
            decoder_attention_mask, decoder_position_ids, in_parallel: see `FlipCaptionDecoder.forward`.
            encoder_outputs: the image tower's output, in place of images.
            labels: `(batch, tokens)`, the last of each `eos_token_id`, -100 where there is no target. With them or
                `input_ids` there is a loss.
            return_logits: False leaves out `logits`, which training does not need.
            kwargs: images as `FlipVisionModel.forward` takes them. The decoder sees the patches that are given, and no
                other. Several views of an image each have its caption.

        Raises:
            ValueError: no captions are given, or longer ones than the decoder has positions.
        """
        images = {name: kwargs.pop(name) for name in _IMAGES if name in kwargs}
        if encoder_outputs is None:
            encoder_outputs = self.vision_model(pixel_values=pixel_values, **images, **kwargs)
        if input_ids is not None and labels is None:
            reads, labels = caption_inputs(input_ids, attention_mask, self.config.decoder_config)
            decoder_input_ids = reads if decoder_input_ids is None else decoder_input_ids
        if use_cache is None:
            use_cache = self.config.decoder_config.use_cache and labels is None and not self.training
        given: dict[str, Any] = {"attention_mask": decoder_attention_mask, "position_ids": decoder_position_ids}
        given |= {"cache": cache if cache is not None else past_key_values, "use_cache": use_cache, **kwargs}
        captions = (decoder_input_ids, labels, in_parallel)
        decoded, losses = read_captions(self.decoder, encoder_outputs[0], *captions, **given)
        return _output(encoder_outputs, decoded, losses, return_logits)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write captions: ids `(images, tokens)`, the first of each `bos_token_id`, the last `eos_token_id`, then
        padding. A caption ends at the latest with the decoder's positions, which are also the default of `max_length`.

        Args:
            input_ids, attention_mask: texts that the captions go on from, as a tokenizer makes them, all of one number
                of tokens.
            kwargs: images in another way than `pixel_values`, as `forward` takes them, and what transformers'
                `generate` takes, such as `max_new_tokens` and `num_beams`.

        Raises:
            ValueError: the texts to go on from have different numbers of tokens.
        """
        images = {name: kwargs.pop(name) for name in _IMAGES if name in kwargs}
        if pixel_values is not None and not images:
            kwargs["pixel_values"] = pixel_values  # which an `assistant_model` encodes on its own
        elif kwargs.get("encoder_outputs") is None:
            kwargs["encoder_outputs"] = self.vision_model(pixel_values=pixel_values, **images)
        if input_ids is not None:
            kwargs["decoder_input_ids"] = self._prompt(input_ids, attention_mask)
        if kwargs.get(CACHE) is not None and kwargs.get("decoder_input_ids") is not None:
            # Beside a mask alone does transformers leave out the tokens that the cache holds.
            kwargs.setdefault("decoder_attention_mask", torch.ones_like(kwargs["decoder_input_ids"]))
        positions = self.config.decoder_config.max_position_embeddings
        if not kwargs.keys() & {"max_length", "max_new_tokens", "generation_config"}:
            kwargs["max_length"] = positions + 1
        limit = _PositionsUsed(positions)
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), limit])
        return super().generate(**kwargs)

    def _prompt(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        ids, own = bare_captions(input_ids, attention_mask, self.config.decoder_config)
        lengths = own.sum(dim=1)
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest != longest:
            raise ValueError(
                f"the texts to go on from have {shortest} to {longest} tokens; give those of one length at a time"
            )
        begin = ids.new_full((len(ids), 1), self.config.decoder_config.bos_token_id)
        return torch.cat([begin, ids[:, :longest]], dim=1)


__all__ = ["FlipForConditionalGeneration"]
