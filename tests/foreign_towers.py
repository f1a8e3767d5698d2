"""Small towers of other programs with random weights, and the table of those that family `towers` takes.

`PYTHONPATH=.:tests python tests/foreign_towers.py docs/training.md` writes the table to the page again.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from conftest import TOWER, write_tokenizer
from timm.models import save_for_hf
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel, CLIPImageProcessorPil, VisionTextDualEncoderModel

from flipscale.engines.pretrained_towers import start_tower_fields, tower_weights
from flipscale.io.errors import UserError
from flipscale.model.masked_families import POOLED, UNPOOLED, MaskedTowersConfig
from flipscale.recipe.model import Towers

PIXELS: dict[str, Any] = {"image_size": 32, "patch_size": 8}
TEXT = {**TOWER, "vocab_size": 16, "pad_token_id": 0, "bos_token_id": 12, "eos_token_id": 13}
SMALL_TIMM = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
START, END = "<!-- towers: begin -->\n", "<!-- towers: end -->\n"


def shaken(model: nn.Module) -> Any:
    """Return a model whose weights are all random; biases begin as zeros and norms as ones."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def save_timm(architecture: str, folder: Path, **options: Any) -> None:
    save_for_hf(
        shaken(timm.create_model(architecture, **{"num_classes": 0, **options})), folder, safe_serialization=True
    )


def save_vision(kind: str, folder: Path, **options: Any) -> None:
    """Save transformers' model of a `model_type`, with an image processor of its own mean and standard deviation."""
    head = options.pop("head", None)
    config = CONFIG_MAPPING[kind](**options)
    shaken(getattr(transformers, head)(config) if head else MODEL_MAPPING[type(config)](config)).save_pretrained(folder)
    square = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square, image_mean=[0.1, 0.2, 0.3]).save_pretrained(
        folder
    )


def save_text(kind: str, folder: Path, **options: Any) -> None:
    """Save a text encoder with a tokenizer whose padding is the encoder's: 1 for RoBERTa and its kin."""
    pad = 1 if "roberta" in kind or kind in ("camembert", "mpnet", "data2vec-text") else 0
    config = CONFIG_MAPPING[kind](**{**TEXT, "max_position_embeddings": 20, "pad_token_id": pad, **options})
    shaken(MODEL_MAPPING[type(config)](config)).save_pretrained(folder)
    write_tokenizer(folder, cls_token="<s>", sep_token="</s>")
    if pad:
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        swapped = {0: 1, 1: 0}
        for token in content["added_tokens"]:
            token["id"] = swapped.get(token["id"], token["id"])
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {word: swapped.get(index, index) for word, index in vocabulary.items()}
        file.write_text(json.dumps(content))


_VIT = {**TOWER, **PIXELS}
_DINO = {name: value for name, value in _VIT.items() if name != "intermediate_size"}
_BOTH = {"text_config": {**TEXT, "max_position_embeddings": 12}, "vision_config": _VIT}
# Image towers by their names in the table.
VISION: dict[str, Callable[[Path], None]] = {
    "timm, class token": lambda folder: save_timm("vit_tiny_patch16_224", folder, **SMALL_TIMM),
    "timm, layer scale (DINOv2)": lambda folder: save_timm("vit_small_patch14_dinov2", folder, **SMALL_TIMM),
    "timm, registers": lambda folder: save_timm("vit_small_patch14_reg4_dinov2", folder, **SMALL_TIMM),
    "timm, no position of the class token": lambda folder: save_timm("deit3_small_patch16_224", folder, **SMALL_TIMM),
    "`ViTModel`": lambda folder: save_vision("vit", folder, **_VIT),
    "`ViTForImageClassification`": lambda folder: save_vision("vit", folder, head="ViTForImageClassification", **_VIT),
    "`ViTMAEModel`": lambda folder: save_vision("vit_mae", folder, head="ViTMAEForPreTraining", **_VIT),
    "`Dinov2Model`": lambda folder: save_vision("dinov2", folder, **_DINO),
    "`Dinov2WithRegistersModel`": lambda folder: save_vision("dinov2_with_registers", folder, **_DINO),
    "`DINOv3ViTModel`": lambda folder: save_vision("dinov3_vit", folder, **_VIT, num_register_tokens=2),
    "`CLIPVisionModel`": lambda folder: save_vision("clip_vision_model", folder, **_VIT),
    "`CLIPModel`": lambda folder: save_vision("clip", folder, **_BOTH),
    "`SiglipVisionModel`": lambda folder: save_vision("siglip_vision_model", folder, **_VIT),
    "`SiglipModel`": lambda folder: save_vision("siglip", folder, **_BOTH),
    "timm, average pooling": lambda folder: save_timm("vit_tiny_patch16_224", folder, **SMALL_TIMM, global_pool="avg"),
    "timm, norm before the blocks (CLIP)": lambda folder: save_timm("vit_base_patch32_clip_224", folder, **SMALL_TIMM),
    "timm, EVA02": lambda folder: save_timm("eva02_tiny_patch14_224", folder, img_size=28, depth=2),
    "timm, ResNet": lambda folder: save_timm("resnet10t", folder),
    "`Dinov2Model` with SwiGLU": lambda folder: save_vision("dinov2", folder, **_DINO, use_swiglu_ffn=True),
    "`Siglip2VisionModel` (NaFlex)": lambda folder: save_vision("siglip2_vision_model", folder, **TOWER, patch_size=8),
    "`ResNetModel`": lambda folder: save_vision("resnet", folder, embedding_size=8, hidden_sizes=[8], depths=[1]),
}
_STAGES = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]}
# Image towers that are only embedded.
SINGLE_IMAGES: dict[str, Callable[[Path], None]] = {
    "dinov3": lambda folder: save_vision("dinov3_vit", folder, **_VIT),
    "dinov3_convnext": lambda folder: save_vision("dinov3_convnext", folder, **_STAGES),
    "tipsv2": lambda folder: save_vision("tipsv2_vision_model", folder, **_DINO),
    "convnext": lambda folder: save_vision("convnext", folder, **_STAGES),
    "timm_convnext": lambda folder: save_timm("convnext_atto", folder, depths=(1, 1, 1, 1), dims=(8, 16, 16, 24)),
}
# Text towers.
OTHER_TEXTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2},
    "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
    "modernbert": {"cls_token_id": 12, "sep_token_id": 13},
    "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64},
    "gemma3_text": {"head_dim": 16, "num_key_value_heads": 2, "use_bidirectional_attention": True},
    "llama": {},
}


def opened(vision: Path, text: Path) -> Any:
    """Return the model of family `towers` of two folders. Projections are zeros."""
    towers = Towers(str(vision), str(text))
    fields = start_tower_fields(towers)
    config = MaskedTowersConfig.of_towers(fields["vision_config"], {**fields["text_config"], "caption_tokens": 8})
    model = config.trained_class(config).eval()
    model.load_state_dict(tower_weights(towers, config), strict=False)
    return model


def image_difference(kind: str, folder: Path, text: Path) -> tuple[str, float]:
    """Return the class of an image tower in family `towers`, and the largest difference to its library's features."""
    model = opened(folder, text)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model.vision_model(pixel_values=pixels).pooler_output
        expected = own_images(kind, folder, pixels)
    exported = model.config.exported_class(model.config.exported())
    return f"`{type(exported.vision_model).__name__}`", (found - expected).abs().max().item()


def text_difference(folder: Path, vision: Path) -> tuple[str, float]:
    """Return the class of a text tower, and the largest difference to its own features of padded captions."""
    model = opened(vision, folder)
    own = AutoModel.from_pretrained(folder).eval()
    pad = own.config.pad_token_id
    ids = torch.tensor([[12, 4, 5, 6, 13], [12, 4, 13, pad, pad]])
    with torch.no_grad():
        found = model.text_model(ids, attention_mask=ids != pad).pooler_output
        output = own(ids, attention_mask=(ids != pad).long())
        kept = (ids != pad)[:, :, None]
        mean = (output.last_hidden_state * kept).sum(1) / kept.sum(1)
        expected = mean if output.get("pooler_output") is None else output.pooler_output
        model.text_projection.weight.normal_()
        padded = [model.get_text_features(rows).pooler_output[-1] for rows in (ids, ids[1:, :3])]
    difference = max((found - expected).abs().max().item(), (padded[0] - padded[1]).abs().max().item())
    unpooled = model.config.exported_class is not VisionTextDualEncoderModel
    needs = ", mean of the tokens; the folder needs `trust_remote_code`" if unpooled else ""
    return f"`{type(own).__name__}`{needs}", difference


def own_images(kind: str, folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    """Return the features of images that a tower's own library computes."""
    if kind.startswith("timm"):
        return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()(pixels)
    if "MAE" in kind:
        output = transformers.ViTMAEModel.from_pretrained(folder, mask_ratio=0.0).eval()(pixels)
        return output.last_hidden_state[:, 0]
    own = {"`CLIPModel`": "CLIPVisionModel", "`SiglipModel`": "SiglipVisionModel"}.get(kind, kind.strip("`"))
    model = getattr(transformers, own).from_pretrained(folder).eval()
    if "Classification" in kind:
        return model.vit(pixels).last_hidden_state[:, 0]
    return model(pixels).pooler_output


def table(folder: Path) -> str:
    """Return the table of the page: every tower of this file, tried."""
    save_text("bert", folder / "bert")
    save_vision("vit", folder / "vit", **_VIT)
    rows = ["| image tower | trained and exported as |", "|---|---|"]
    for number, (name, save) in enumerate(VISION.items()):
        place = folder / f"image{number}"
        save(place)
        rows.append(f"| {name} | {tried(image_difference, name, place, folder / 'bert')} |")
    rows += ["", "| text tower, by its `model_type` | trained and exported as |", "|---|---|"]
    for kind in dict.fromkeys((*POOLED, *UNPOOLED, *OTHER_TEXTS)):
        place = folder / f"text-{kind}"
        save_text(kind, place, **OTHER_TEXTS.get(kind, {}))
        rows.append(f"| {kind} | {tried(text_difference, place, folder / 'vit')} |")
    return "\n".join(rows) + "\n"


def tried(measure: Callable[..., tuple[str, float]], *arguments: object) -> str:
    """Return a cell of the table: the class, or the reason of a refusal."""
    try:
        kind, difference = measure(*arguments)
    except UserError as error:
        reason = str(error).split(", ", 1)[1].split("; ")[0]
        return f"refused, as a model {reason}"
    assert difference < 1e-5, (kind, difference)
    return kind


if __name__ == "__main__":
    page = Path(sys.argv[1])
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    with tempfile.TemporaryDirectory() as made:
        page.write_text(before + START + table(Path(made)) + END + rest.partition(END)[2], encoding="utf-8")
