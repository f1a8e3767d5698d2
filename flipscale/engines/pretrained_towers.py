"""Two towers of other programs as the start of a run: their configurations, and their weights."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedModel

from flipscale.io.errors import UserError, needed
from flipscale.io.model_folder import (
    check_folder,
    fetch_folder,
    open_weight_file,
    pixel_fields,
    read_object,
    read_shapes,
)
from flipscale.io.streams import without_bars
from flipscale.model.configuration_flip import RANGES
from flipscale.model.masked import tower_fields
from flipscale.model.masked_families import POOLED, UNPOOLED, VISION_TOWERS, MaskedTowersConfig, stored_names
from flipscale.recipe.model import Towers, dropout_rates

_log = logging.getLogger(__name__)

# Embeddings of a timm model and of transformers' with its weights differ by rounding only, at most by this.
TOLERANCE = 1e-4

# Why image towers of other types do not fit.
_NO_PLAIN_VIT = {
    "Eva": "whose positions may be rotary (RoPE)",
    "siglip2": "whose NaFlex patches have no fixed grid",
    "siglip2_vision_model": "whose NaFlex patches have no fixed grid",
    "NaFlexVit": "whose NaFlex patches have no fixed grid",
}
# Folders of both towers, in which the image tower's configuration is a section.
_DUAL = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}

_TEXTS = (*POOLED, *UNPOOLED)

# timm's names of weights, and those in a folder of transformers. "(qkv)" is one matrix of queries, keys and values.
_TIMM = [
    (r"^(cls_token)$", r"embeddings.\1"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.qkv\.", ".attention.attention.(qkv)."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
]
# timm's names of numbers in `model_args`, and ours with their ranges. Others have the range of a width.
_TIMM_FIELDS = {"depth": "num_hidden_layers", "depths": "num_hidden_layers", "layers": "num_hidden_layers"}
_TIMM_VIT = [
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
]


def start_tower_fields(towers: Towers) -> dict[str, dict[str, Any]]:
    """Return the fields of `vision_config` and `text_config` of two towers, without their dropout.

    Raises:
        UserError: a tower does not fit the family `towers`.
        OSError: the Hub cannot be reached.
    """
    return {"vision_config": _vision_fields(towers.vision), "text_config": _text_fields(towers.text)}


def stored_fields(folder: Path, content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return these fields of a folder of the family `towers`. `content` is its config.json. Raise UserError if a tower
    does not fit."""
    vision, text = ({"model_type": None, **(content.get(name) or {})} for name in ("vision_config", "text_config"))
    for tower, fields, fitting in (("vision", vision, VISION_TOWERS), ("text", text, _TEXTS)):
        if fields["model_type"] not in fitting:
            raise _refusal(f"init_from's {tower}", str(folder), fields["model_type"], "which does not fit", fitting)
    own = {"projection_dim": content.get("projection_dim", 512)}
    own |= {name: content[name] for name in ("projection_hidden_size",) if name in content}
    if (folder / "modules.json").is_file():  # flipscale wrote it, and its tokenizer cuts captions
        own["caption_tokens"] = read_object(folder / "tokenizer_config.json")["model_max_length"]
    return {
        "vision_config": {**_own_fields(vision["model_type"], vision), **pixel_fields(folder)},
        "text_config": {**_own_fields(text["model_type"], text), **own},
    }


def tower_weights(start: Towers | str, config: MaskedTowersConfig) -> dict[str, torch.Tensor]:
    """Return the weights of two towers, or of a folder of the family `towers`, by their names in the model.

    Weights that the folders lack are left out.
    """
    exported = config.exported()
    if isinstance(start, str):
        return _read(config.exported_class, fetch_folder(start), exported)
    vision, text = (fetch_folder(name) for name in start)
    check_folder(vision)
    if "architecture" in read_object(vision / "config.json"):
        images = _timm_weights(start.vision, vision, exported.vision_config)
    else:
        images = _read(MODEL_MAPPING[type(exported.vision_config)], vision, exported.vision_config)
    if getattr(exported.vision_config, "pooler_act", None) == "linear":
        width = exported.vision_config.hidden_size
        images = {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width), **images}
    if exported.text_config.model_type in UNPOOLED:
        _log.warning(
            "model.text %r has no pooled output: a caption is the mean of its tokens, and the exported folder needs "
            "trust_remote_code",
            start.text,
        )
    texts = _read(MODEL_MAPPING[type(exported.text_config)], text, exported.text_config)
    pairs = (("vision_model", images), ("text_model", texts))
    return {f"{tower}.{name}": weight for tower, weights in pairs for name, weight in weights.items()}


def _read(kind: Any, folder: Path, config: Any) -> dict[str, torch.Tensor]:
    check_folder(folder)
    options: dict[str, Any] = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with without_bars():
        model, report = kind.from_pretrained(folder, config=config, dtype=torch.float32, **options)
    for name, found, expected in report["mismatched_keys"]:
        raise UserError(f"{name} has the shape {[*found]} there, {[*expected]} in this recipe's model")
    return {name: weight for name, weight in model.state_dict().items() if name not in report["missing_keys"]}


def _vision_fields(name: str) -> dict[str, Any]:
    folder = fetch_folder(name)
    content = read_object(folder / "config.json")
    if "architecture" in content:
        return _timm_fields(name, folder, content)
    kind = str(content.get("model_type"))
    content = content.get("vision_config", {}) if kind in _DUAL else content
    own = {"vit_mae": "vit"}.get(kind, _DUAL.get(kind, kind))
    if own not in VISION_TOWERS:
        raise _refusal(
            "vision", name, kind, _NO_PLAIN_VIT.get(kind, "which is not a plain ViT"), [*VISION_TOWERS, "timm"]
        )
    fields = _own_fields(own, content)
    for field, value in (("use_swiglu_ffn", False), ("num_channels", 3), ("pooler_output_size", fields["hidden_size"])):
        if (found := fields.get(field, value)) != value:
            raise _refusal("vision", name, kind, f"whose {field} is {found}, not {value}", [*VISION_TOWERS, "timm"])
    stored = {weight for file in check_folder(folder) for weight in read_shapes(file)}
    if own == "vit" and not any(weight.endswith("pooler.dense.weight") for weight in stored):
        # Without a pooler, the class token is the image's.
        fields |= {"pooler_act": "linear", "pooler_output_size": fields["hidden_size"]}
    return {**fields, **pixel_fields(folder)}


def _text_fields(name: str) -> dict[str, Any]:
    folder = fetch_folder(name)
    content = read_object(folder / "config.json")
    kind = str(content.get("model_type"))
    if content.get("is_encoder_decoder") or content.get("add_cross_attention"):
        raise _refusal("text", name, kind, "which has cross attention", _TEXTS)
    reads_both_ways = kind in _TEXTS and not content.get("is_decoder")
    if not reads_both_ways or (kind == "gemma3_text" and not content.get("use_bidirectional_attention")):
        raise _refusal("text", name, kind, "which is not an encoder that reads both ways", _TEXTS)
    return _own_fields(kind, content)


def _refusal(tower: str, name: str, kind: object, reason: str, fitting: Any) -> UserError:
    fix = f"use one of {', '.join(fitting)}, or embed it by `flipscale prepare embed`: hf:{name} in family flip"
    return UserError(f"model.{tower} {name!r} is of the type {kind!r}, {reason}; {fix}")


def _own_fields(kind: str, content: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a tower's configuration, without dropout, and without fields that may name code."""
    known = {name for name in tower_fields(CONFIG_MAPPING[kind]) if not name.startswith("_")}
    try:
        plain = CONFIG_MAPPING[kind].from_dict({name: value for name, value in content.items() if name in known})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(f"a config.json is no {kind}'s: {' '.join(str(error).split())}") from None
    fields = {name: value for name, value in json.loads(plain.to_json_string(use_diff=False)).items() if name in known}
    off = dict.fromkeys(dropout_rates(fields), 0.0)
    masks = {"use_mask_token": False} if "use_mask_token" in fields else {}
    return {**fields, **off, **masks, "model_type": kind}


def _timm_model(name: str, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> Any:
    """Return timm's model of a folder, with the weights that are given, else with random ones."""
    timm = needed("timm", f"model.vision {name!r} is a timm model, and timm is not installed", "timm")
    try:
        model = timm.create_model(f"local-dir:{folder}", num_classes=0).eval()
        if weights is not None:  # timm's own loader scales positions and patches, and leaves missing weights random
            model.load_state_dict(weights)
        return model
    except Exception as error:  # timm's factories raise any
        why = f"its config.json and its weights ({' '.join(str(error).split()):.300})"
        raise UserError(f"model.vision {name!r} cannot be built by {why}; save it again by timm") from error


def _timm_fields(name: str, folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the class of transformers that a timm ViT fits."""
    for field, value in dict(content.get("model_args") or {}).items():
        most = RANGES[_TIMM_FIELDS.get(field, "hidden_size")][1]
        parts = value if isinstance(value, list) else [value]
        if any(isinstance(part, int | float) and part > most for part in parts):
            raise UserError(f"model.vision {name!r}: {field} is {value!r:.40}; it must be at most {most:,}")
    with torch.device("meta"):
        model = _timm_model(name, folder)
    kind, own = type(model).__name__, VISION_TOWERS.keys()
    if kind != "VisionTransformer":
        raise _refusal("vision", name, kind, _NO_PLAIN_VIT.get(kind, "which is not a plain ViT"), own)
    block, pixels, stated = model.blocks[0], model.pretrained_cfg, content.get("pretrained_cfg") or {}
    for field in ("architecture", "hf_hub_id", "url", "file"):
        if (other := stated.get(field)) not in (None, "", name, content["architecture"]):
            raise UserError(
                f"model.vision {name!r}: pretrained_cfg.{field} is {other!r:.80}; expected none beside weights of "
                f"{content['architecture']}. Fix: save the model again by timm.models.save_for_hf"
            )
    parts = [type(part).__name__ for part in (block, block.attn, block.mlp)]
    for is_plain, reason in (
        (model.global_pool == "token", f"whose global_pool is {model.global_pool!r}, not 'token'"),
        (isinstance(model.fc_norm, nn.Identity), "which has a norm after its pooling"),
        (isinstance(model.norm_pre, nn.Identity), "which has a norm before its blocks"),
        (parts == ["Block", "Attention", "Mlp"], f"whose blocks are of {', '.join(parts)}"),
        (model.patch_embed.proj.in_channels == 3, "which does not take RGB images"),
    ):
        if not is_plain:
            raise _refusal("vision", name, kind, reason, own)
    fields = {
        "model_type": "dinov2_with_registers" if model.num_reg_tokens else "dinov2",
        **block_fields(model.blocks, model.norm, block.mlp.fc1, block.mlp.act),
        "qkv_bias": block.attn.qkv.bias is not None,
        "image_size": model.patch_embed.img_size[0],
        "patch_size": model.patch_embed.patch_size[0],
        "image_mean": pixels.get("mean"),
        "image_std": pixels.get("std"),
        "squashes": pixels.get("crop_mode") == "squash",
    }
    if hasattr(block.ls1, "gamma"):
        ratio = fields.pop("intermediate_size") / model.embed_dim
        return {**fields, "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio}
    pooler = {"pooler_act": "linear", "pooler_output_size": model.embed_dim}
    return {**fields, "model_type": "vit", **pooler}


def block_fields(blocks: Any, norm: Any, linear: Any, activation: nn.Module) -> dict[str, Any]:
    """Return the fields of a tower of blocks, by a norm, the MLP's first layer and its activation."""
    kind = type(activation).__name__
    names = {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh", "GELU": "gelu"}
    if kind not in names:
        raise UserError(f"the activation of a tower's blocks is {kind}; it must be one of {', '.join(names)}")
    is_tanh = getattr(activation, "approximate", None) == "tanh"
    return {
        "hidden_size": norm.normalized_shape[0],
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "intermediate_size": linear.out_features,
        "layer_norm_eps": norm.eps,
        "hidden_act": "gelu_pytorch_tanh" if is_tanh else names[kind],
    }


def _timm_weights(name: str, folder: Path, config: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a timm ViT under the names of transformers' class, which must embed alike."""
    stored = open_weight_file(folder).items()
    theirs = _timm_model(name, folder, {key: file.get_tensor(key) for key, file in stored if key[:5] != "head."})
    names = [*_TIMM, *(_TIMM_VIT if config.model_type == "vit" else [])]
    weights = renamed(theirs.state_dict(), names, ("query", "key", "value"))
    positions = weights.get("embeddings.position_embeddings")
    if theirs.no_embed_class and positions is not None:
        weights["embeddings.position_embeddings"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    kind: Any = MODEL_MAPPING[type(config)]
    ours: PreTrainedModel = kind(config).eval()
    own = {stored: inner for inner, stored in stored_names(ours).items()}
    needed = {stored for stored in own if not re.search(r"^pooler|mask_token$", stored)}
    if odd := sorted(needed ^ weights.keys()):
        raise UserError(f"model.vision {name!r} is no {type(ours).__name__}: {odd[0]} is in one of them only")
    return _compared(name, theirs, ours, {own[key]: value.float() for key, value in weights.items()})


def renamed(
    weights: dict[str, torch.Tensor], names: list[tuple[str, str]], parts: tuple[str, str, str]
) -> dict[str, torch.Tensor]:
    """Return weights under new names, by patterns that are applied one after another.

    A new name with "(qkv)" is of one matrix of queries, keys and values, which becomes three, named by `parts`.
    """
    found: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        thirds = zip(parts, weight.chunk(3), strict=True) if "(qkv)" in name else [("", weight)]
        found |= {name.replace("(qkv)", part): third for part, third in thirds}
    return found


def _compared(
    name: str, theirs: Any, ours: PreTrainedModel, weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the weights if both models embed two images of noise alike."""
    config: Any = ours.config
    try:
        ours.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(f"model.vision {name!r} is no {type(ours).__name__} ({str(error).splitlines()[-1]})") from None
    size = (2, config.num_channels, config.image_size, config.image_size)
    pixels = torch.randn(size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = theirs(pixels), ours(pixels).last_hidden_state[:, 0]
    difference = (expected - found).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise UserError(
            f"model.vision {name!r} as a {type(ours).__name__} embeds images with a difference of {difference:.1g}, at "
            f"most {TOLERANCE:g} is rounding: it has parts that transformers' class lacks"
        )
    return weights
