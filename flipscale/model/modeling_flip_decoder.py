"""The decoder of FLIP models that write captions, what it reads of captions, and their loss."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_flip import FlipDecoderConfig
from .modeling_flip import (
    FlipAttention,
    FlipEncoderLayer,
    FlipMLP,
    FlipPreTrainedModel,
    FlipTextEmbeddings,
    cast_for_products,
)

# What transformers calls the keys and values of earlier tokens: `cache` from 5.24 on, `past_key_values` before.
CACHE = "cache" if "cache" in Seq2SeqLMOutput.__dataclass_fields__ else "past_key_values"
# The label of a place that has no target.
NO_TARGET = -100


@dataclass
class FlipDecoderOutput(ModelOutput):
    """The output of the decoder: `logits` `(batch, tokens, vocab_size)`, and what transformers records."""

    logits: torch.Tensor | None = None
    cache: EncoderDecoderCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of each token, in nats: fp32 `(batch, tokens)`, 0 where there is no target.

    Args:
        logits: `(batch, tokens, vocab_size)`.
        labels: `(batch, tokens)`, of which `NO_TARGET` is left out.
    """
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=NO_TARGET, reduction="none"
    )
    return losses.view(labels.shape)


def caption_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean of the `token_losses` of each caption, fp32 `(batch,)`: a long caption counts as a short one."""
    return token_losses(logits, labels).sum(dim=1) / labels.ne(NO_TARGET).sum(dim=1).clamp(min=1)


def bare_captions(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: FlipDecoderConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return captions without tokens for begin and end, whether their tokenizer adds such or not: int64
    `(batch, tokens)`, and a bool mask of the caption's own, the first of each row."""
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
    """Return what the decoder reads of captions and its targets, both int64 `(batch, tokens)`.

    The targets are the caption's tokens and `eos_token_id`; the decoder reads `bos_token_id` and the tokens. A caption
    that fills its row has been cut, as a rule, and has no `eos_token_id`: it does not end there.

    Args:
        input_ids, attention_mask: `(batch, tokens)`, as `bare_captions`.
    """
    ids, own = bare_captions(input_ids, attention_mask, config)
    reaches = torch.cat([torch.ones_like(own[:, :1]), own[:, :-1]], dim=1)
    end = NO_TARGET if config.eos_token_id is None else config.eos_token_id
    labels = torch.where(own, ids, torch.where(reaches, end, NO_TARGET))
    return shifted_right(labels, config), labels


def shifted_right(labels: torch.Tensor, config: FlipDecoderConfig) -> torch.Tensor:
    """Return what the decoder reads to predict `labels` `(batch, tokens)`."""
    begin = torch.full_like(labels[:, :1], config.bos_token_id)
    earlier = labels[:, :-1]
    return torch.cat([begin, torch.where(earlier == NO_TARGET, config.pad_token_id, earlier)], dim=1)


class FlipDecoderAttention(FlipAttention):
    """Attention of the tokens of a caption to each other or, as cross-attention, to those of the image."""

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
        """Return the output `(batch, tokens, hidden_size)`, and the attention weights where the implementation gives
        them.

        Args:
            image_states: `(batch, image tokens, hidden_size)`, what cross-attention looks at, which is not causal.
            cache: of the keys and values. Cross-attention writes its own once and then reads them.
        """
        hidden_states = cast_for_products(hidden_states)
        query = self._heads(self.q_proj(hidden_states))
        if self.is_causal:
            key, value = self._heads(self.k_proj(hidden_states)), self._heads(self.v_proj(hidden_states))
            if cache is not None:
                key, value = cache.self_attention_cache.update(key, value, self.layer_idx)
        elif cache is not None and cache.is_updated.get(self.layer_idx):
            layer: Any = cache.cross_attention_cache.layers[self.layer_idx]
            key, value = layer.keys, layer.values
        else:
            assert image_states is not None
            image_states = cast_for_products(image_states)
            key, value = self._heads(self.k_proj(image_states)), self._heads(self.v_proj(image_states))
            if cache is not None:
                key, value = cache.cross_attention_cache.update(key, value, self.layer_idx)
                cache.is_updated[self.layer_idx] = True
        output, weights = self._attend(query, key, value, attention_mask, **kwargs)
        return self.out_proj(output.reshape(hidden_states.shape)), weights

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FlipDecoderLayer(GradientCheckpointingLayer):
    """One pre-norm block: attention to the caption so far, to the image, and the MLP."""

    def __init__(self, config: FlipDecoderConfig, layer_idx: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = FlipDecoderAttention(config, layer_idx, is_causal=True)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn = FlipDecoderAttention(config, layer_idx, is_causal=False)
        self.layer_norm3 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
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
        hidden_states = (
            hidden_states + self.self_attn(self.layer_norm1(hidden_states), attention_mask, cache=cache, **kwargs)[0]
        )
        seen = self.cross_attn(self.layer_norm2(hidden_states), None, image_states, cache=cache, **kwargs)[0]
        hidden_states = hidden_states + seen
        return hidden_states + self.mlp(self.layer_norm3(hidden_states))


class FlipCaptionDecoder(FlipPreTrainedModel):
    """The decoder: it predicts each token of a caption from those before it and from the tokens of the image."""

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
        self.image_layers = nn.ModuleList(
            [FlipEncoderLayer(cast(Any, config)) for _ in range(config.num_encoder_layers)]
        )
        self.embeddings = FlipTextEmbeddings(cast(Any, config))
        self.layers = nn.ModuleList([FlipDecoderLayer(config, number) for number in range(config.num_hidden_layers)])
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.token_embedding = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = cast(nn.Linear, new_embeddings)

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
    ) -> FlipDecoderOutput:
        """Return the logits of the token after each token.

        Args:
            input_ids: `(batch, tokens)`, the first of them `bos_token_id`; those that `cache` has are left out.
            image_tokens: `(batch, image tokens, image_width)`, of the image tower.
            attention_mask: `(batch, tokens)`, 0 for padding on the left. Padding on the right needs no mask: no token
                looks at what follows it.
            position_ids: `(batch, tokens)`; left out, they are counted from 0.
            in_parallel: bool `(batch,)`, the captions of which all tokens are predicted at once: instead of its tokens
                the decoder gets `mask_token_id` in every place, and every place looks at every other.
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
                **{CACHE: cache},
            )
        else:
            mask = self._mask_of_some(in_parallel, hidden_states)
        image_states = None
        if cache is None or not cache.is_updated.get(0):
            # A sharded decoder computes in the precision of its weights.
            image_states = self.image_projection(image_tokens.to(self.image_projection.weight.dtype))
            for layer in self.image_layers:
                image_states = layer(image_states, **kwargs)
        for layer in self.layers:
            hidden_states = layer(hidden_states, image_states, mask, cache=cache, **kwargs)
        return FlipDecoderOutput(logits=self.lm_head(self.final_layer_norm(hidden_states)), cache=cache)

    def _mask_of_some(self, in_parallel: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the mask `(batch, 1, tokens, tokens)` that is causal but for the captions `in_parallel`: bool, or what
        is added to the scores."""
        tokens = hidden_states.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden_states.device).tril()
        looks = causal[None, None] | in_parallel[:, None, None, None]
        if self.config._attn_implementation == "sdpa":
            return looks
        return torch.zeros_like(looks, dtype=hidden_states.dtype).masked_fill(
            ~looks, torch.finfo(hidden_states.dtype).min
        )


def read_captions(
    decoder: FlipCaptionDecoder,
    image_tokens: torch.Tensor,
    input_ids: torch.Tensor | None,
    labels: torch.Tensor | None,
    in_parallel: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[FlipDecoderOutput, torch.Tensor | None]:
    """Return the decoder's output for the captions of images, and their `caption_losses` where there are labels.

    Args:
        image_tokens: of each image or, of `views` views in a row of each, of each view, which all have its caption.
        input_ids, labels: see `FlipForConditionalGeneration.forward`.
        in_parallel, kwargs: see `FlipCaptionDecoder.forward`.

    Raises:
        ValueError: there are no captions.
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


__all__ = ["FlipCaptionDecoder"]
