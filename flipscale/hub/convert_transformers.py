"""Convert open_clip's ViT models to folders of transformers' CLIPModel or SiglipModel, from which a run can start."""

import re
import string
import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, normalizers
from torch import nn
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from flipscale.engines.pretrained_towers import TOLERANCE, block_fields, renamed
from flipscale.evaluation.foreign_models import load_open_clip
from flipscale.hub.card import write_derived_card
from flipscale.hub.convert_onnx import TEXTS
from flipscale.hub.export import build_processor, export_model
from flipscale.io.atomic import new_folder
from flipscale.io.errors import UserError
from flipscale.model.families import config_class
from flipscale.model.modeling_flip import normalise_embeds

# open_clip's names of weights, and transformers'. A name in parentheses is one matrix of queries, keys and values.
_BLOCKS = [
    (r"\.(?:ln_|norm)(\d)\.", r".layer_norm\1."),
    (r"\.attn\.(?:in_proj_|qkv\.)", ".self_attn.(qkv)."),
    (r"\.attn\.(?:out_)?proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]
_NAMES = [
    (r"^visual\.transformer\.resblocks\.|^visual\.trunk\.blocks\.", "vision_model.encoder.layers."),
    (r"^(?:text\.)?transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^visual\.conv1\.|^visual\.trunk\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.(?:positional_embedding|trunk\.pos_embed)$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.(?:ln_post|trunk\.norm)\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.trunk\.attn_pool\.latent$", "vision_model.head.probe"),
    (r"^visual\.trunk\.attn_pool\.proj\.", "vision_model.head.attention.out_proj."),
    (r"^visual\.trunk\.attn_pool\.norm\.", "vision_model.head.layernorm."),
    (r"^visual\.trunk\.attn_pool\.mlp\.", "vision_model.head.mlp."),
    (r"^(?:text\.)?token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^(?:text\.)?positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^(?:text\.)?ln_final\.", "text_model.final_layer_norm."),
    (r"^(?:text\.)?text_projection$", "text_projection.weight"),
    (r"^text\.text_projection\.", "text_model.head."),
]


def convert_from_open_clip(name: str, dst: Path | str) -> dict[str, float]:
    """Convert a model that open_clip knows to the model folder `dst`, with its processor. Raise UserError if open_clip
    cannot load the model, its towers or its tokenizer have no counterpart, or `dst` exists.

    Args:
        name: `NAME,PRETRAINED`, `hf-hub:ORG/NAME` or `local-dir:FOLDER`.

    Returns:
        Largest difference of the embeddings of images and of texts.
    """
    dst = Path(dst)
    if dst.exists():
        raise UserError(f"{dst} exists; name another folder or remove it")
    theirs, preprocess, tokenizer = load_open_clip(name)
    theirs = theirs.float().eval()
    family = "siglip" if hasattr(theirs.visual, "trunk") else "clip"
    kind = config_class(family)
    try:
        config = kind.of_towers(_vision_fields(theirs.visual, preprocess), _text_fields(theirs))
    except (AttributeError, ValueError, IndexError) as error:
        raise UserError(f"open_clip:{name} is not a ViT with the towers of a {family} model ({error})") from None
    ours = kind.exported_class(config.exported()).eval()
    weights = _renamed(theirs.state_dict())
    if family == "clip":
        weights.pop("logit_bias", None)  # a CLIPModel has none, and it changes no embedding
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    if odd := sorted(shapes.keys() ^ weights.keys()):
        raise UserError(f"open_clip:{name} is no {type(ours).__name__}: {odd[0]} is in one of them only")
    ours.load_state_dict({key: value.reshape(shapes[key]) for key, value in weights.items()})
    processor = build_processor(config, _tokenizer(tokenizer))
    differences = _compare(theirs, tokenizer, ours, processor)
    for part, difference in differences.items():
        if not difference <= TOLERANCE:
            raise UserError(
                f"open_clip:{name} as a {type(ours).__name__} embeds {part} with a difference of {difference:.1g}, at "
                f"most {TOLERANCE:g} is rounding: its towers or tokenizer have parts that transformers' lack"
            )
    resizes = " and ".join(theirs.visual.preprocess_cfg[field] for field in ("resize_mode", "interpolation"))
    if resizes != (own := "squash and bicubic" if config.squashes else "shortest and bicubic"):
        warnings.warn(
            f"open_clip:{name} resizes pictures by {resizes}; the folder's processor by {own}, so their embeddings "
            "differ. Fix: resize them as open_clip does",
            stacklevel=2,
        )
    facts = {"kind": type(ours).__name__, "path": dst, "family": family}
    with new_folder(dst) as folder:
        export_model(ours, processor, folder)
        write_derived_card(folder, f"open_clip:{name}", dst.name, "transformers", model=name, **facts)
    return differences


def _vision_fields(tower: Any, preprocess: Any) -> dict[str, Any]:
    is_timm = hasattr(tower, "trunk")
    blocks = tower.trunk.blocks if is_timm else tower.transformer.resblocks
    patches = tower.trunk.patch_embed.proj if is_timm else tower.conv1
    size = tower.image_size if isinstance(tower.image_size, int) else tower.image_size[0]
    normalise = preprocess.transforms[-1]
    fields = {
        **_block_fields(blocks, is_timm),
        "image_size": size,
        "patch_size": patches.kernel_size[0],
        "image_mean": [float(value) for value in normalise.mean],
        "image_std": [float(value) for value in normalise.std],
    }
    return fields if is_timm else {**fields, "projection_dim": tower.proj.shape[1]}


def _text_fields(model: Any) -> dict[str, Any]:
    # A model with two separate towers has `text`; CLIP's first class has the text tower's parts itself.
    tower = getattr(model, "text", model)
    fields = {
        **_block_fields(tower.transformer.resblocks, is_timm=False),
        "max_position_embeddings": len(tower.positional_embedding),
        "vocab_size": tower.token_embedding.num_embeddings,
        "bos_token_id": None,
    }
    projection = tower.text_projection
    if isinstance(projection, nn.Linear):
        return {**fields, "eos_token_id": None, "projection_size": projection.out_features}
    # transformers takes an `eos_token_id` of 2 to mean the largest id of a caption, at which open_clip pools.
    return {**fields, "eos_token_id": 2, "projection_dim": projection.shape[1]}


def _block_fields(blocks: Any, is_timm: bool) -> dict[str, Any]:
    first = blocks[0]
    parts = (first.norm1, first.mlp.fc1, first.mlp.act) if is_timm else (first.ln_1, first.mlp.c_fc, first.mlp.gelu)
    return block_fields(blocks, *parts)


def _renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return open_clip's weights under transformers' names. Names of neither model stay as they are."""
    pooled = {name: value for name, value in weights.items() if re.search(r"attn_pool\.(q|kv)\.", name)}
    heads = {}
    for kind in ("weight", "bias") if pooled else ():
        query, others = (pooled[f"visual.trunk.attn_pool.{part}.{kind}"] for part in ("q", "kv"))
        heads[f"vision_model.head.attention.in_proj_{kind}"] = torch.cat([query, others])
    plain = {
        name: value.t() if name in ("visual.proj", "text_projection", "text.text_projection") else value
        for name, value in weights.items()
        if name not in pooled
    }
    return {**heads, **renamed(plain, [*_NAMES, *_BLOCKS], ("q_proj", "k_proj", "v_proj"))}


def _tokenizer(theirs: Any) -> PreTrainedTokenizerBase:
    """Return transformers' tokenizer with the same ids for a text."""
    if hasattr(theirs, "bpe_ranks"):
        names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
        vocabulary = {names.get(piece, piece): index for piece, index in theirs.encoder.items()}
        return CLIPTokenizer(vocab=vocabulary, merges=list(theirs.bpe_ranks))
    if not hasattr(theirs, "tokenizer") or getattr(theirs, "tokenizer_mode", False) or theirs.strip_sep_token:
        raise UserError(f"open_clip's {type(theirs).__name__} has no counterpart in transformers; use another model")
    tokenizer = theirs.tokenizer
    steps = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    if theirs.clean_fn.__name__ == "_clean_canonicalize":
        signs = re.escape(string.punctuation.replace("_", "")).replace("/", r"\/")
        steps = [
            normalizers.Replace("_", " "),
            normalizers.Replace(Regex(f"[{signs}]"), ""),
            normalizers.Lowercase(),
            *steps,
        ]
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])
    return tokenizer


@torch.no_grad()
def _compare(theirs: Any, tokenizer: Any, ours: Any, processor: Any) -> dict[str, float]:
    """Return the largest difference of the embeddings of two images of noise, and of some texts."""
    vision, length = ours.config.vision_config, ours.config.text_config.max_position_embeddings
    pixels = torch.randn(2, 3, vision.image_size, vision.image_size, generator=torch.Generator().manual_seed(0))
    tokens = processor.tokenizer(TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    pairs = {
        "images": (theirs.encode_image(pixels), ours.get_image_features(pixels)),
        "texts": (theirs.encode_text(tokenizer(TEXTS)), ours.get_text_features(tokens["input_ids"])),
    }
    return {
        part: (normalise_embeds(expected) - normalise_embeds(found.pooler_output)).abs().max().item()
        for part, (expected, found) in pairs.items()
    }
