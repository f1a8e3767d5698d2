"""Convert a FLIP model to a folder that open_clip loads, with the same embeddings.

open_clip can express FLIP's towers except for two things. Its patch convolution has no bias, so ours is added to the
positions. It cannot average all tokens including the class token, so one more block does that (`_averaging_layer`).
"""

import json
import math
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn

from flipscale.files.aside import new_folder
from flipscale.hub.derived_card import derived_card
from flipscale.hub.loading import load_flip
from flipscale.hub.model_folder import by_channel
from flipscale.model import FlipConfig, FlipModel, FlipTextConfig, FlipTextModel, FlipVisionConfig, FlipVisionModel
from flipscale.model.modeling_flip import FlipEncoderLayer

# The average is scaled up by this before it is added to the first token, so that the token's old value is lost in the
# rounding of the last norm. A power of two causes no rounding; its square is within fp32 and bf16 (not fp16).
_AVERAGE_SCALE = 2.0**40

_CARD = """A FLIP model in the form of [open_clip](https://github.com/mlfoundations/open_clip), with the embeddings of
the model folder that it was made from.

```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{path}")
tokenizer = open_clip.get_tokenizer("local-dir:{path}")
```

For `hf-hub:ORG/NAME`, write that name as `text_cfg.hf_tokenizer_name` in `open_clip_config.json` before uploading.

The tower's last block stands in for the mean over all tokens, which open_clip does not have: its scores are zero and
its numbers large. So this form is for inference, in fp32 or bf16 (fp16 overflows), not for training on.
"""

# For each of our `hidden_act`, the arguments that give open_clip's GELU the same values.
_ACTIVATIONS = {"gelu_pytorch_tanh": {"approximate": "tanh"}, "gelu": {}, "quick_gelu": {}}


def convert_to_open_clip(src: str, dst: Path | str) -> FlipModel:
    """Convert the model of the folder or Hub name `src` to the folder `dst`, and return the model.

    The folder has `open_clip_config.json`, `open_clip_model.safetensors`, the tokenizer and a card. open_clip loads it
    by the name `local-dir:DST`.

    Raises:
        ValueError: `src` has no model or no tokenizer, open_clip cannot express the model, or `dst` exists.
    """
    dst = Path(dst)
    with new_folder(dst) as folder:
        model, tokenizer = load_flip(src)
        config = open_clip_config(model.config)
        # On the Hub, open_clip looks this name up; in a local folder, any name means the folder itself.
        config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = dst.name
        tokenizer.save_pretrained(folder)
        save_file(open_clip_state_dict(model.float()), folder / "open_clip_model.safetensors", {"format": "pt"})
        (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(
            derived_card(src, dst.name, "open_clip", _CARD.format(path=dst)), encoding="utf-8"
        )
    return model


def open_clip_config(config: FlipConfig) -> dict[str, Any]:
    """Return open_clip's `model_cfg` and `preprocess_cfg` for a model of `config`.

    Raises:
        ValueError: open_clip cannot express it. The message names every reason.
    """
    _refuse_what_does_not_fit(config)
    vision, text = config.vision_config, config.text_config
    return {
        "model_cfg": {
            "embed_dim": config.projection_dim,
            "quick_gelu": vision.hidden_act == "quick_gelu",
            "init_logit_bias": config.logit_bias_init_value,
            "vision_cfg": {
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "head_width": vision.hidden_size // vision.num_attention_heads,
                "no_ln_pre": True,
                "pool_type": "tok",
                **_tower_config(vision),
            },
            "text_cfg": {
                "context_length": text.max_position_embeddings,
                "vocab_size": text.vocab_size,
                "heads": text.num_attention_heads,
                "no_causal_mask": True,
                "pool_type": "first",
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
def open_clip_state_dict(model: FlipModel) -> dict[str, torch.Tensor]:
    """Return the weights of `model` by open_clip's names."""
    image, text = model.vision_model.embeddings, model.text_model.embeddings
    # The class token comes first and has no position embedding.
    positions = nn.functional.pad(image.position_embedding[0] + image.patch_embedding.bias, (0, 0, 1, 0))
    visual = {
        "conv1.weight": image.patch_embedding.weight,
        "class_embedding": image.class_embedding,
        "positional_embedding": positions,
        **_tower(model.vision_model, model.image_projection, norm="ln_post", projection="proj"),
    }
    theirs = {
        **{name: value[0] for name, value in model.loss_values().items()},
        # open_clip takes the exponential itself.
        "logit_scale": model.logit_scale[0].clamp(0.0, math.log(100.0)),
        "token_embedding.weight": text.token_embedding.weight,
        "positional_embedding": text.position_embedding.weight,
        **_tower(model.text_model, model.text_projection, norm="ln_final", projection="text_projection"),
        **{f"visual.{name}": value for name, value in visual.items()},
    }
    return {name: value.detach().contiguous() for name, value in theirs.items()}


def _averages(config: FlipVisionConfig | FlipTextConfig) -> bool:
    """Return whether the tower's embedding is the mean over its tokens."""
    return getattr(config, "pooling", "mean") == "mean"


def _num_layers(config: FlipVisionConfig | FlipTextConfig) -> int:
    return config.num_hidden_layers + _averages(config)


def _refuse_what_does_not_fit(config: FlipConfig) -> None:
    vision, text = config.vision_config, config.text_config
    wrong = []
    for name, tower in (("image", vision), ("text", text)):
        if tower.hidden_act not in _ACTIVATIONS:
            wrong.append(f"the {name} tower's hidden_act {tower.hidden_act} (it has {', '.join(_ACTIVATIONS)})")
        if _averages(tower) and tower.projection_dim >= tower.hidden_size:
            wrong.append(
                f"the mean over the {name} tower's tokens at projection_dim {tower.projection_dim} (it must be below "
                f"its hidden_size {tower.hidden_size})"
            )
        if not _num_layers(tower):
            wrong.append(f"no layers in the {name} tower")
    if (vision.hidden_act == "quick_gelu") != (text.hidden_act == "quick_gelu"):
        wrong.append("quick_gelu in one tower alone")
    if vision.num_channels != 3:
        wrong.append(f"images of {vision.num_channels} channels")
    if not text.attend_to_padding:
        wrong.append("attend_to_padding false: its text tower either attends to padding or is causal")
    if wrong:
        raise ValueError(f"open_clip cannot express {'; nor '.join(wrong)}")


def _tower_config(config: FlipVisionConfig | FlipTextConfig) -> dict[str, Any]:
    width, mlp = config.hidden_size, config.intermediate_size
    ratio = mlp / width
    return {
        "width": width,
        "layers": _num_layers(config),
        # open_clip truncates width * mlp_ratio, and rounding may put that just below the integer.
        "mlp_ratio": ratio if int(width * ratio) == mlp else (mlp + 0.5) / width,
        "norm_kwargs": {"eps": config.layer_norm_eps},
        "act_kwargs": _ACTIVATIONS[config.hidden_act],
    }


def _tower(
    tower: FlipVisionModel | FlipTextModel, matrix: nn.Linear, norm: str, projection: str
) -> dict[str, torch.Tensor]:
    layers, last_norm, projected = list(tower.encoder.layers), tower.final_layer_norm, matrix.weight.t()
    if _averages(tower.config):
        layers.append(_averaging_layer(tower, matrix.weight))
        last_norm, projected = nn.LayerNorm(len(projected)), torch.eye(*projected.shape)
    blocks = {
        f"transformer.resblocks.{n}.{name}": v
        for n, layer in enumerate(layers)
        for name, v in _block(cast(FlipEncoderLayer, layer))
    }
    return {**blocks, f"{norm}.weight": last_norm.weight, f"{norm}.bias": last_norm.bias, projection: projected}


def _averaging_layer(tower: FlipVisionModel | FlipTextModel, matrix: torch.Tensor) -> FlipEncoderLayer:
    """Return a layer that adds a scaled mean of the tower's normalised tokens, projected by `matrix`, to all tokens.

    The scale is so large that the token's own value vanishes. Attention scores of zero give the mean. The norm that
    follows subtracts the mean over channels and divides by their standard deviation. The former is zero, because one
    more channel has the negative sum of the others; the latter does not matter, because embeddings are normalised.
    """
    layer = FlipEncoderLayer(tower.config)
    for parameter in layer.parameters():
        parameter.zero_()
    layer.layer_norm1.load_state_dict(tower.final_layer_norm.state_dict())
    attention, dim = layer.self_attn, len(matrix)
    attention.v_proj.weight.fill_diagonal_(1.0)
    attention.out_proj.weight[:dim] = matrix * _AVERAGE_SCALE
    attention.out_proj.weight[dim] = -matrix.sum(dim=0) * _AVERAGE_SCALE
    return layer


def _block(layer: FlipEncoderLayer) -> list[tuple[str, torch.Tensor]]:
    attention = layer.self_attn
    inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
    linears = {
        "ln_1": layer.layer_norm1,
        "attn.out_proj": attention.out_proj,
        "ln_2": layer.layer_norm2,
        "mlp.c_fc": layer.mlp.fc1,
        "mlp.c_proj": layer.mlp.fc2,
    }
    return [
        ("attn.in_proj_weight", torch.cat([linear.weight for linear in inputs])),
        ("attn.in_proj_bias", torch.cat([linear.bias for linear in inputs])),
        *((f"{name}.{kind}", getattr(module, kind)) for name, module in linears.items() for kind in ("weight", "bias")),
    ]
