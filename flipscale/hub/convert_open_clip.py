"""Convert a model of the family `flip` or `clip` to a folder that open_clip loads, with the same embeddings.

A CLIPModel's towers are open_clip's. Of family `flip`, open_clip lacks four features. Changed weights replace each:

- Bias of the patch convolution: added to the positions.
- Mean over all tokens, class token included: one more block (`_averaging_block`).
- ReLU: GELU of the input times 2**32, with the output divided by 2**32.
- Mask of padding: a tower of twice the width. Every channel is there twice, so the norms stay the same. The two halves
  of padding differ, and queries use the difference to skip it (`_skip_padding`). An average also needs the wide tower
  if its embedding has no spare channel.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from flipscale.hub.card import write_derived_card
from flipscale.hub.export import by_channel
from flipscale.hub.loading import load_dual_encoder
from flipscale.io.atomic import new_folder
from flipscale.io.errors import UserError
from flipscale.model import FlipConfig, FlipModel, FlipVisionConfig
from flipscale.model.modeling_flip import FlipEncoderLayer

# Factor of the average before it is added to the first token, so that the token's old value vanishes in the rounding of
# the last norm. A power of two causes no rounding; its square fits fp32 and bf16 (not fp16).
_AVERAGE_SCALE = 2.0**40
# GELU(s x) / s equals ReLU(x) up to 0.2 / s.
_RELU_SCALE = 2.0**32
# Added to one half of the channels of padding and subtracted from the other: far above the values of tokens.
_PADDING_MARK = 1024.0
# Attention score of padding, so low that its weight is 0 for all trained scores.
_PADDING_SCORE = -512.0

# Arguments of open_clip's GELU for each of our `hidden_act`.
_ACTIVATIONS = {"gelu_pytorch_tanh": {"approximate": "tanh"}, "gelu": {}, "quick_gelu": {}, "relu": {}}


def convert_to_open_clip(src: str, dst: Path | str) -> Any:
    """Convert the model of the folder or Hub name `src` to the folder `dst`, and return the model.

    The folder has `open_clip_config.json`, `open_clip_model.safetensors`, tokenizer and card, as open_clip loads it.
    Raise UserError if `src` has no model or no tokenizer, open_clip cannot express the model, or `dst` exists.
    """
    dst = Path(dst)
    with new_folder(dst) as folder:
        model, tokenizer = load_dual_encoder(src)
        if model.config.model_type not in ("flip", "clip"):
            raise UserError(
                f"model {src!r} is a {model.config.exported_class.__name__}; name a model of the family flip or clip"
            )
        config = open_clip_config(model.config)
        # open_clip looks this name up on the Hub; in a local folder, any name means the folder itself.
        config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = dst.name
        tokenizer.save_pretrained(folder)
        save_file(open_clip_state_dict(model.float()), folder / "open_clip_model.safetensors", {"format": "pt"})
        (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_derived_card(folder, src, dst.name, "open_clip", path=dst, family=model.config.model_type)
    return model


def open_clip_config(config: Any) -> dict[str, Any]:
    """Return open_clip's `model_cfg` and `preprocess_cfg` for a model of `config`. Raise UserError if open_clip cannot
    express it; the message names every reason."""
    vision, text = config.vision_config, config.text_config
    is_ours = isinstance(config, FlipConfig)
    # transformers takes an `eos_token_id` of 2 to mean the largest id of a caption.
    pooling = {"pool_type": "argmax"} if text.eos_token_id == 2 else {"pool_type": "eos", "eos_id": text.eos_token_id}
    acts = {"image": vision.hidden_act, "text": text.hidden_act}
    wrong = [
        f"the {name} tower's hidden_act {act} (only {', '.join(_ACTIVATIONS)})"
        for name, act in acts.items()
        if act not in _ACTIVATIONS
    ]
    others = set(acts.values()) - {"quick_gelu", "relu"}
    if others and "quick_gelu" in acts.values():
        wrong.append(f"quick_gelu in one tower and {', '.join(others)} in the other")
    if vision.num_channels != 3:
        wrong.append(f"images of {vision.num_channels} channels")
    if any(getattr(tower, "projection_hidden_size", None) is not None for tower in (vision, text)):
        wrong.append("projections of two layers")
    if wrong:
        raise UserError(f"open_clip cannot express {'; nor '.join(wrong)}")
    return {
        "model_cfg": {
            "embed_dim": config.projection_dim,
            "quick_gelu": "quick_gelu" in acts.values(),
            "init_logit_bias": config.logit_bias_init_value,
            "vision_cfg": {
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "head_width": _copies(vision) * vision.hidden_size // vision.num_attention_heads,
                "no_ln_pre": is_ours,
                "pool_type": "tok",
                **_tower_config(vision),
            },
            "text_cfg": {
                "context_length": text.max_position_embeddings,
                "vocab_size": text.vocab_size,
                "heads": text.num_attention_heads,
                "no_causal_mask": is_ours,
                **({"pool_type": "first"} if is_ours else pooling),
                **_tower_config(text),
            },
        },
        "preprocess_cfg": {
            "mean": by_channel(vision.image_mean, 3),
            "std": by_channel(vision.image_std, 3),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


@torch.no_grad()
def open_clip_state_dict(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights of `model` under open_clip's names."""
    is_ours = isinstance(model, FlipModel)
    image, text, config = model.vision_model.embeddings, model.text_model.embeddings, model.config.text_config
    copies, text_copies = _copies(model.config.vision_config), _copies(config)
    tokens = text.token_embedding.weight.repeat(1, text_copies)
    if _skips_padding(config):
        mark = torch.tensor([1.0, -1.0]).repeat_interleave(config.hidden_size)
        tokens[config.pad_token_id] += _PADDING_MARK * mark
    if is_ours:
        # The class token comes first and has no position embedding.
        positions = nn.functional.pad(image.position_embedding[0] + image.patch_embedding.bias, (0, 0, 1, 0))
        before, projection = {}, model.image_projection
    else:
        positions, projection = image.position_embedding.weight, model.visual_projection
        before = {f"ln_pre.{name}": value for name, value in model.vision_model.pre_layrnorm.named_parameters()}
    visual = {
        "conv1.weight": image.patch_embedding.weight.repeat(copies, 1, 1, 1),
        "class_embedding": image.class_embedding.repeat(copies),
        "positional_embedding": positions.repeat(1, copies),
        **before,
        **_tower(model.vision_model, projection, norm="ln_post", projection="proj"),
    }
    theirs = {
        **{name: value[0] for name, value in model.loss_values().items()},
        # open_clip applies the exponential itself.
        "logit_scale": model.logit_scale[0].clamp(0.0, math.log(100.0)),
        "token_embedding.weight": tokens,
        "positional_embedding": text.position_embedding.weight.repeat(1, text_copies),
        **_tower(model.text_model, model.text_projection, norm="ln_final", projection="text_projection"),
        **{f"visual.{name}": value for name, value in visual.items()},
    }
    return {name: value.detach().contiguous() for name, value in theirs.items()}


def _averages(config: Any) -> bool:
    """Return whether the tower's embedding is the mean over its tokens."""
    return isinstance(config, FlipVisionConfig) or getattr(config, "pooling", None) == "mean"


def _skips_padding(config: Any) -> bool:
    """Return whether the tower's tokens ignore padding."""
    return not getattr(config, "attend_to_padding", True)


def _copies(config: Any) -> int:
    """Return the number of copies of each of our channels in open_clip's tower."""
    return 2 if _skips_padding(config) or (_averages(config) and config.projection_dim >= config.hidden_size) else 1


def _tower_config(config: Any) -> dict[str, Any]:
    width, mlp = _copies(config) * config.hidden_size, config.intermediate_size
    ratio = mlp / width
    return {
        "width": width,
        # open_clip's towers need at least one layer; a layer of zeros changes nothing.
        "layers": max(config.num_hidden_layers + _averages(config), 1),
        # open_clip truncates width * mlp_ratio, which rounding may put just below the integer.
        "mlp_ratio": ratio if int(width * ratio) == mlp else (mlp + 0.5) / width,
        "norm_kwargs": {"eps": config.layer_norm_eps},
        "act_kwargs": _ACTIVATIONS[config.hidden_act],
    }


def _tower(tower: Any, matrix: nn.Linear, norm: str, projection: str) -> dict[str, torch.Tensor]:
    """Return the weights of the tower's blocks, its last norm and its projection, `matrix`."""
    config, copies = tower.config, _copies(tower.config)
    blocks = [_block(layer, config) for layer in tower.encoder.layers]
    last = tower.post_layernorm if hasattr(tower, "post_layernorm") else tower.final_layer_norm
    weight, bias = last.weight.repeat(copies), last.bias.repeat(copies)
    outer = matrix.weight
    if _averages(config):
        # The block applies the projection if the width leaves a channel for the negative sum; else the last step does.
        width = config.hidden_size
        fits = len(outer) < copies * width
        inner, outer = (outer, torch.eye(len(outer))) if fits else (torch.eye(width), outer)
        blocks.append(_averaging_block(tower, inner))
        weight, bias = torch.ones_like(weight), torch.zeros_like(bias)
    elif not blocks:
        blocks.append(_block(_layer_of_zeros(config), config))
    named = {f"transformer.resblocks.{n}.{name}": v for n, block in enumerate(blocks) for name, v in block.items()}
    # Zeros for the second half, or for channels that the average does not use.
    projected = nn.functional.pad(outer.t(), (0, 0, 0, len(weight) - outer.shape[1]))
    return {**named, f"{norm}.weight": weight, f"{norm}.bias": bias, projection: projected}


def _layer_of_zeros(config: Any) -> FlipEncoderLayer:
    """Return a layer that changes nothing."""
    layer = FlipEncoderLayer(config)
    for parameter in layer.parameters():
        parameter.zero_()
    return layer


def _averaging_block(tower: Any, inner: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a block that adds a scaled mean of the tower's normalised tokens, multiplied by `inner`, to all tokens.

    The scale is so large that the token's own value vanishes. Attention scores of zero give the mean. The next norm
    subtracts the mean over channels, which is zero because one more channel has the negative sum of the others. It
    divides by the standard deviation, which does not matter because embeddings are normalised.
    """
    layer, config, dim = _layer_of_zeros(tower.config), tower.config, len(inner)
    layer.layer_norm1.load_state_dict(tower.final_layer_norm.state_dict())
    layer.self_attn.v_proj.weight.fill_diagonal_(1.0)
    block = _block(layer, config)
    summed = torch.cat([inner, -inner.sum(dim=0, keepdim=True)]) * _AVERAGE_SCALE
    block["attn.out_proj.weight"][: dim + 1] = _wide_heads(summed.t(), config).t()
    return block


def _block(layer: Any, config: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a block in the width of open_clip's tower."""
    attention, copies = layer.self_attn, _copies(config)
    gain = _RELU_SCALE if config.hidden_act == "relu" else 1.0
    # A wide matrix reads the first copy of its inputs.
    others = (0, (copies - 1) * config.hidden_size)
    weights, biases = [], []
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        # Scores are divided by the root of a head's width.
        scale = math.sqrt(copies) if linear is attention.q_proj else 1.0
        weights.append(nn.functional.pad(_wide_heads(scale * linear.weight, config), others))
        biases.append(_wide_heads(scale * linear.bias[:, None], config)[:, 0])
    if _skips_padding(config):
        _skip_padding(layer, config, weights, biases)
    block = {
        "attn.in_proj_weight": torch.cat(weights),
        "attn.in_proj_bias": torch.cat(biases),
        "attn.out_proj.weight": _wide_heads(attention.out_proj.weight.t(), config).t().repeat(copies, 1),
        "attn.out_proj.bias": attention.out_proj.bias.repeat(copies),
        "mlp.c_fc.weight": nn.functional.pad(gain * layer.mlp.fc1.weight, others),
        "mlp.c_fc.bias": gain * layer.mlp.fc1.bias,
        "mlp.c_proj.weight": (layer.mlp.fc2.weight / gain).repeat(copies, 1),
        "mlp.c_proj.bias": layer.mlp.fc2.bias.repeat(copies),
    }
    for name, norm in (("ln_1", layer.layer_norm1), ("ln_2", layer.layer_norm2)):
        block |= {f"{name}.{kind}": getattr(norm, kind).repeat(copies) for kind in ("weight", "bias")}
    return block


def _wide_heads(rows: torch.Tensor, config: Any) -> torch.Tensor:
    """Return rows `(width, ...)`, one for each channel of all heads, with rows of zeros for wider heads."""
    per_head = rows.reshape(config.num_attention_heads, -1, rows.shape[1])
    return nn.functional.pad(per_head, (0, 0, 0, (_copies(config) - 1) * per_head.shape[1])).flatten(0, 1)


def _skip_padding(layer: Any, config: Any, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> None:
    """Give every head a channel in which padding has a key and every token a query, so that padding scores far below.

    The key is the difference of a normalised channel's two copies. It is zero for tokens. For padding, the norm turns
    the mark and its negative into 1 and -1, times the norm's weight.
    """
    width, head_width = config.hidden_size, config.hidden_size // config.num_attention_heads
    norm = layer.layer_norm1.weight
    channel = int(norm.abs().argmax())
    rows = torch.arange(config.num_attention_heads) * 2 * head_width + head_width
    weights[1][rows, channel] = 1.0 / norm[channel]
    weights[1][rows, channel + width] = -1.0 / norm[channel]
    biases[0][rows] = _PADDING_SCORE / 2 * math.sqrt(2 * head_width)
