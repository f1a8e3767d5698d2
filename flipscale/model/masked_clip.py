"""The family `clip`: transformers' CLIPModel, trained with masks."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from .configuration_flip import SIZES, tower_size
from .masked import MaskedDualEncoder, MaskedFields, masked_config, masked_tower

# OpenAI's mean and standard deviation of the pixels.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_SMALL = tower_size(384, 12, 6)


def _size(name: str, **vision: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    image, text, width = {"s16": (_SMALL, _SMALL, 384), **SIZES}[name]
    # OpenAI's models have quick_gelu, open_clip's others have gelu.
    shared = {"projection_dim": width, "hidden_act": "gelu"}
    return {"patch_size": 16, **image, **shared, **vision}, {**text, **shared}


@strict
class MaskedCLIPConfig(MaskedFields, CLIPConfig):
    """The configuration of a CLIPModel for training. Sizes are open_clip's, `g14` is its bigG/14."""

    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": masked_config(CLIPVisionConfig, _MEAN, _STD),
        "text_config": CLIPTextConfig,
    }
    own_fields: ClassVar[dict[str, Any]] = {
        "": ("logit_bias_init_value",),
        "vision_config": ("image_mean", "image_std"),
    }
    sizes: ClassVar[dict[str, Any]] = {
        "s16": _size("s16"),
        "b32": _size("b16", patch_size=32),
        **{name: _size(name) for name in ("b16", "l16", "l14", "h14", "g14")},
    }
    processor_class = CLIPProcessor
    packs_captions = True
    squashes = False

    logit_bias_init_value: float | int | None = None

    @classmethod
    def of_towers(cls, vision: dict[str, Any], text: dict[str, Any]) -> "MaskedCLIPConfig":
        dims = [tower.get("projection_dim", 512) for tower in (vision, text)]
        if dims[0] != dims[1]:
            raise ValueError(f"projection_dim differs: vision_config has {dims[0]}, text_config has {dims[1]}")
        return cls(vision_config=vision, text_config=text, projection_dim=dims[0])  # type: ignore[call-arg]


class MaskedCLIPModel(MaskedDualEncoder, CLIPModel):
    """A CLIPModel with the same names of weights. Its image tower also takes visible patches."""

    config_class = MaskedCLIPConfig
    tower_class = masked_tower(CLIPVisionModel, CLIPVisionEmbeddings)
    largest_scale = 100.0
    _no_split_modules = ["CLIPTextEmbeddings", "MaskedCLIPVisionEmbeddings", "CLIPEncoderLayer"]  # noqa: RUF012


MaskedCLIPConfig.trained_class, MaskedCLIPConfig.exported_class = MaskedCLIPModel, CLIPModel
