"""FLIP models that write captions: the image tower, and a decoder with cross-attention to the visible patches."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithCrossAttentions, Seq2SeqLMOutput
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_flip import FlipConfig, FlipDecoderConfig
from .modeling_flip import (
    BlockLayerNorm,
    FlipAttention,
    FlipEncoderLayer,
    FlipMLP,
    FlipPreTrainedModel,
    FlipTextEmbeddings,
    FlipVisionModel,
    cast_for_products,
)

# Arguments of `FlipVisionModel.forward` besides `pixel_values`.
_IMAGES = ("image_mask_ratio", "patches", "patch_index", "interpolate_pos_encoding", "image_size", "branch_scales")
# Label of a position without target.
NO_TARGET = -100


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of each token, in nats: fp32 `(batch, tokens)`, 0 where there is no target.

    Args:
        logits: `(batch, tokens, vocab_size)`.
        labels: `(batch, tokens)`; positions with `NO_TARGET` do not count.
    """
    options: dict[str, Any] = {"ignore_index": NO_TARGET, "reduction": "none"}
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), **options).view(labels.shape)


def caption_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean of each caption's `token_losses`, fp32 `(batch,)`, so that all captions have equal weight."""
    return token_losses(logits, labels).sum(dim=1) / labels.ne(NO_TARGET).sum(dim=1).clamp(min=1)


def bare_captions(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: FlipDecoderConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return captions without begin and end tokens, int64 `(batch, tokens)`, and a bool mask of their own tokens.

    A caption's own tokens are the first of its row, whether or not the tokenizer adds begin and end tokens.
    """
    ids = input_ids.long()
    own = ids.ne(config.pad_token_id) if attention_mask is None else attention_mask.bool()
    begins = (ids[:, :1] == config.bos_token_id) & own[:, :1]
    nothing = torch.zeros_like(own[:, :1])
    ids = torch.where(begins, torch.cat([ids[:, 1:], ids[:, :1]], dim=1), ids)
    own = torch.where(begins, torch.cat([own[:, 1:], nothing], dim=1), own)
    is_last = own & ~torch.cat([own[:, 1:], nothing], dim=1)
    return ids, own & ~(is_last & (ids == config.eos_token_id))


def caption_inputs(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: FlipDecoderConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the decoder's inputs and targets for captions from a tokenizer, all int64 `(batch, tokens)`.

    Inputs are `bos_token_id` and the caption's tokens. Targets are the tokens and `eos_token_id`. A caption that fills
    its row has no `eos_token_id` target, because most such captions have been cut; tokenizers that add an end keep it.
    """
    ids, own = bare_captions(input_ids, attention_mask, config)
    taken = input_ids.ne(config.pad_token_id) if attention_mask is None else attention_mask.bool()
    reaches = torch.cat([torch.ones_like(own[:, :1]), own[:, :-1]], dim=1)
    end = NO_TARGET if config.eos_token_id is None else config.eos_token_id
    labels = torch.where(own, ids, torch.where(reaches & ~taken.all(dim=1, keepdim=True), end, NO_TARGET))
    return shifted_right(labels, config), labels


def shifted_right(labels: torch.Tensor, config: FlipDecoderConfig) -> torch.Tensor:
    """Return the decoder's inputs that predict `labels` `(batch, tokens)`: `bos_token_id`, then the labels."""
    begin = torch.full_like(labels[:, :1], config.bos_token_id)
    earlier = labels[:, :-1]
    return torch.cat([begin, torch.where(earlier == NO_TARGET, config.pad_token_id, earlier)], dim=1)


class FlipDecoderAttention(FlipAttention):
    """Attention between the tokens of a caption or, as cross-attention, from the caption to the image's tokens."""

    def __init__(self, config: FlipDecoderConfig, layer_idx: int, is_causal: bool):
        super().__init__(cast(Any, config))
        self.layer_idx, self.is_causal = layer_idx, is_causal

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_states: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output `(batch, tokens, hidden_size)`, and the attention weights if the implementation has them.

        Args:
            image_states: `(batch, image tokens, hidden_size)`, keys and values of cross-attention.
            cache: keys and values of earlier tokens. Cross-attention writes its own once and then reads them.
        """
        hidden_states = cast_for_products(hidden_states)
        if self.is_causal:
            query, key, value = self._projected(hidden_states)
            if cache is not None:
                key, value = cache.self_attention_cache.update(key, value, self.layer_idx)
        else:
            query, (key, value) = self._heads(self.q_proj(hidden_states)), self._of_image(image_states, cache)
        output, weights = self._attend(query, key, value, attention_mask, **kwargs)
        return self.out_proj(output.reshape(hidden_states.shape)), weights

    def _of_image(
        self, image_states: torch.Tensor | None, cache: EncoderDecoderCache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of cross-attention."""
        if cache is not None and cache.is_updated.get(self.layer_idx):
            layer: Any = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        assert image_states is not None
        image_states = cast_for_products(image_states)
        key, value = self._heads(self.k_proj(image_states)), self._heads(self.v_proj(image_states))
        if cache is not None:
            key, value = cache.cross_attention_cache.update(key, value, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        return key, value


class FlipDecoderLayer(GradientCheckpointingLayer):
    """One pre-norm block: attention to the caption so far, to the image, and the MLP."""

    def __init__(self, config: FlipDecoderConfig, layer_idx: int):
        super().__init__()
        self.layer_norm1 = BlockLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = FlipDecoderAttention(config, layer_idx, is_causal=True)
        self.layer_norm2 = BlockLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn = FlipDecoderAttention(config, layer_idx, is_causal=False)
        self.layer_norm3 = BlockLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FlipMLP(cast(Any, config))

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the tokens `(batch, tokens, width)` after the block."""
        read = self.self_attn(self.layer_norm1(hidden_states), attention_mask, cache=cache, **kwargs)[0]
        hidden_states = hidden_states + read
        seen = self.cross_attn(self.layer_norm2(hidden_states), None, image_states, cache=cache, **kwargs)[0]
        hidden_states = hidden_states + seen
        return hidden_states + self.mlp(self.layer_norm3(hidden_states))


class FlipCaptionDecoder(FlipPreTrainedModel):
    """The decoder: it predicts each token of a caption from earlier tokens and from the tokens of the image."""

    config: FlipDecoderConfig
    input_modalities = ("text",)
    base_model_prefix = "decoder"
    _input_embed_layer = "token_embedding"
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": FlipDecoderLayer,
        "attentions": OutputRecorder(FlipDecoderAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(FlipDecoderAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: FlipDecoderConfig, image_width: int):
        super().__init__(config)
        self.image_projection = nn.Linear(image_width, config.hidden_size)
        image_layers = (FlipEncoderLayer(cast(Any, config)) for _ in range(config.num_encoder_layers))
        self.image_layers = nn.ModuleList(image_layers)
        self.embeddings = FlipTextEmbeddings(cast(Any, config))
        self.layers = nn.ModuleList([FlipDecoderLayer(config, number) for number in range(config.num_hidden_layers)])
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FlipCaptionDecoder):
            init.xavier_uniform_(module.image_projection.weight)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor,
        image_tokens: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        in_parallel: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        """Return the logits of the token after each token.

        Args:
            input_ids: `(batch, tokens)`, beginning with `bos_token_id`, without tokens that are in `cache`.
            image_tokens: `(batch, image tokens, image_width)`, output of the image tower.
            attention_mask: `(batch, tokens)`, 0 for padding on the left. Padding on the right needs no mask, because
                attention is causal.
            position_ids: `(batch, tokens)`; by default counted from 0.
            in_parallel: bool `(batch,)`, True for captions whose tokens are all predicted at once: the decoder's input
                is `mask_token_id` at every position, and attention is not causal.
        """
        if use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None] + past
        if in_parallel is not None:
            input_ids = torch.where(in_parallel[:, None], cast(int, self.config.mask_token_id), input_ids)
        hidden_states = self.embeddings(input_ids, position_ids)
        if in_parallel is None:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
            )
        else:
            mask = self._partly_causal_mask(in_parallel, hidden_states)
        image_states = None
        if cache is None or not cache.is_updated.get(0):
            # The decoder may be sharded and then computes in the precision of its weights.
            image_states = self.image_projection(image_tokens.to(self.image_projection.weight.dtype))
            for layer in self.image_layers:
                image_states = layer(image_states, **kwargs)
        for layer in self.layers:
            hidden_states = layer(hidden_states, image_states, mask, cache=cache, **kwargs)
        logits = self.lm_head(self.final_layer_norm(hidden_states))
        return CausalLMOutputWithCrossAttentions(logits=logits, cache=cast(Any, cache))

    def _partly_causal_mask(self, in_parallel: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return a mask `(batch, 1, tokens, tokens)` that is causal except for the captions `in_parallel`.

        It is bool for sdpa, and otherwise added to the scores.
        """
        tokens = hidden_states.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden_states.device).tril()
        visible = causal[None, None] | in_parallel[:, None, None, None]
        if self.config._attn_implementation == "sdpa":
            return visible
        dtype = hidden_states.dtype
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def read_captions(
    decoder: FlipCaptionDecoder,
    image_tokens: torch.Tensor,
    input_ids: torch.Tensor | None,
    labels: torch.Tensor | None,
    in_parallel: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[CausalLMOutputWithCrossAttentions, torch.Tensor | None]:
    """Return the decoder's output for the captions of images, and with labels their `caption_losses`.

    Args:
        image_tokens: tokens of each image, or of each of its views, which are neighbouring rows and share the caption.
        input_ids, labels: see `FlipForConditionalGeneration.forward`.
        in_parallel, kwargs: see `FlipCaptionDecoder.forward`.
    """
    if input_ids is None:
        if labels is None:
            raise ValueError("no captions are given; pass input_ids, labels or decoder_input_ids")
        input_ids = shifted_right(labels, decoder.config)
    views = len(image_tokens) // len(input_ids)
    if views > 1:
        input_ids = input_ids.repeat_interleave(views, dim=0)
        labels = None if labels is None else labels.repeat_interleave(views, dim=0)
        in_parallel = None if in_parallel is None else in_parallel.repeat_interleave(views, dim=0)
    decoded = decoder(input_ids, image_tokens, in_parallel=in_parallel, **kwargs)
    return decoded, None if labels is None else caption_losses(decoded.logits, labels)


@dataclass
class FlipCaptionOutput(Seq2SeqLMOutput):
    """
    transformers' output of an encoder-decoder model. `loss` is the mean of `caption_losses`.

    Args:
        caption_losses: fp32 `(batch,)`, the mean negative log-likelihood of each caption's tokens, in nats.
    """

    caption_losses: torch.Tensor | None = None


class _NoPositionLeft(StoppingCriteria):
    """Stops a caption when the decoder has no position for another token."""

    def __init__(self, positions: int):
        self.positions = positions

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((len(input_ids),), input_ids.shape[1] > self.positions, device=input_ids.device)


class FlipForConditionalGeneration(FlipPreTrainedModel, GenerationMixin):
    """The image tower and a decoder that writes captions.

    It also loads from a folder with a text tower and projections, and ignores those weights.
    """

    config: FlipConfig
    main_input_name = "pixel_values"
    embedding_part = "decoder"
    _can_compile_fullgraph = True  # `generate` compiles the decoder for a static cache
    _keys_to_ignore_on_load_unexpected = [r"^text_", r"^image_projection\.", r"^logit_", r"^fusion\."]  # noqa: RUF012

    def __init__(self, config: FlipConfig):
        if config.decoder_config is None:
            raise ValueError("the config has no decoder_config, which captions need; load the model as a FlipModel")
        super().__init__(config)
        self.vision_model = FlipVisionModel._from_config(config.vision_config)
        width = config.vision_config.hidden_size
        self.decoder = FlipCaptionDecoder._from_config(config.decoder_config, image_width=width)
        self.post_init()

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.vision_model

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.decoder.set_output_embeddings(new_embeddings)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return the image tower's output; `pooler_output` is the mean over all tokens, `(batch, hidden_size)`.

        The arguments are those of `FlipVisionModel.forward`.
        """
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
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> FlipCaptionOutput:
        r"""
        Predict the tokens of captions. A caption is a tokenizer's output (`input_ids`), targets (`labels`), or inputs
        of the decoder (`decoder_input_ids`).

        Args:
            input_ids, attention_mask: `(batch, tokens)`, captions, of which `caption_inputs` makes inputs and labels.
            decoder_input_ids: `(batch, tokens)`, beginning with `bos_token_id`. `logits[:, i]` predict the token after
                the i-th. By default the labels, shifted right by one.
            decoder_attention_mask, decoder_position_ids, in_parallel: see `FlipCaptionDecoder.forward`.
            encoder_outputs: output of the image tower, instead of images.
            labels: `(batch, tokens)`, each ending with `eos_token_id`; -100 at positions without target. The output has
                a loss if labels or `input_ids` are given.
            return_logits: False leaves out `logits`, which training does not need.
            kwargs: images, as in `FlipVisionModel.forward`. The decoder sees only given patches. Views share a caption.

        Raises:
            ValueError: no captions are given, or a caption is longer than the decoder's positions.
        """
        images = {name: kwargs.pop(name) for name in _IMAGES if name in kwargs}
        if encoder_outputs is None:
            encoder_outputs = self.vision_model(pixel_values=pixel_values, **images, **kwargs)
        if input_ids is not None and labels is None:
            shifted, labels = caption_inputs(input_ids, attention_mask, self.config.decoder_config)
            decoder_input_ids = shifted if decoder_input_ids is None else decoder_input_ids
        if use_cache is None:
            use_cache = self.config.decoder_config.use_cache and labels is None and not self.training
        options: dict[str, Any] = {"attention_mask": decoder_attention_mask, "position_ids": decoder_position_ids}
        options |= {"cache": cache, "use_cache": use_cache, **kwargs}
        captions = (decoder_input_ids, labels, in_parallel)
        decoded, losses = read_captions(self.decoder, encoder_outputs[0], *captions, **options)
        return FlipCaptionOutput(
            loss=None if losses is None else losses.mean(),
            logits=decoded.logits if return_logits else None,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            encoder_attentions=encoder_outputs.get("attentions"),
            caption_losses=losses,
            cache=cast(Any, decoded.cache),
        )

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write captions: ids `(images, tokens)`, from `bos_token_id` to `eos_token_id`, then padding.

        By default a caption ends at the decoder's last position, and never later.

        Args:
            input_ids, attention_mask: prompts from a tokenizer, all with the same number of tokens.
            kwargs: images in other forms than `pixel_values`, see `forward`; and arguments of transformers' `generate`,
                such as `max_new_tokens` and `num_beams`.

        Raises:
            ValueError: the prompts have different numbers of tokens.
        """
        images = {name: kwargs.pop(name) for name in _IMAGES if name in kwargs}
        if pixel_values is not None and not images:
            kwargs["pixel_values"] = pixel_values  # an `assistant_model` encodes them on its own
        elif kwargs.get("encoder_outputs") is None:
            kwargs["encoder_outputs"] = self.vision_model(pixel_values=pixel_values, **images)
        if input_ids is not None:
            kwargs["decoder_input_ids"] = self._prompt(input_ids, attention_mask)
        if kwargs.get("cache") is not None and kwargs.get("decoder_input_ids") is not None:
            # transformers drops the tokens that are in the cache only if there is a mask.
            kwargs.setdefault("decoder_attention_mask", torch.ones_like(kwargs["decoder_input_ids"]))
        positions = self.config.decoder_config.max_position_embeddings
        if not kwargs.keys() & {"max_length", "max_new_tokens", "generation_config"}:
            kwargs["max_length"] = positions + 1
        limit = _NoPositionLeft(positions)
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), limit])
        return super().generate(**kwargs)

    def _prompt(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        ids, own = bare_captions(input_ids, attention_mask, self.config.decoder_config)
        lengths = own.sum(dim=1)
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest != longest:
            raise ValueError(f"the prompts in input_ids have {shortest} to {longest} tokens; give equal lengths")
        begin = ids.new_full((len(ids), 1), self.config.decoder_config.bos_token_id)
        return torch.cat([begin, ids[:, :longest]], dim=1)
