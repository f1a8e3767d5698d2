"""The families `clip` and `siglip`: transformers' CLIPModel and SiglipModel, trained with masks."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from .configuration_flip import SIZES, tower_size
from .masked import MaskedDualEncoder, MaskedFields, masked_config, masked_tower

# OpenAI's mean and standard deviation of the pixels.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_SMALL = tower_size(384, 12, 6)
_B, _L = tower_size(768, 12, 12), tower_size(1024, 24, 16)
_SO400M = tower_size(1152, 27, 16, 4304)


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


@strict
class MaskedSiglipConfig(MaskedFields, SiglipConfig):
    """The configuration of a SiglipModel for training. Sizes are SigLIP's and SigLIP 2's."""

    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": masked_config(SiglipVisionConfig, (0.5,) * 3, (0.5,) * 3, num_prefix=0),
        "text_config": SiglipTextConfig,
    }
    own_fields = ("logit_scale_init_value", "logit_bias_init_value")
    sizes: ClassVar[dict[str, Any]] = {
        "s16": (_SMALL, _SMALL),
        "b16": (_B, _B),
        "l16": (_L, _L),
        "so400m14": ({**_SO400M, "patch_size": 14}, _SO400M),
        "so400m16": (_SO400M, _SO400M),
        "g16": (tower_size(1536, 40, 16), {**_SO400M, "projection_size": 1536}),
    }
    processor_class = SiglipProcessor
    squashes = True
    # Without a mask, because SigLIP attends to the padding.
    caption_inputs = ("input_ids",)

    logit_scale_init_value: float | int = 2.6592600369327783
    logit_bias_init_value: float | int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        vision: Any = self.vision_config
        text: Any = self.text_config
        if not vision.vision_use_head:
            raise ValueError("vision_config: vision_use_head is false, so there is no image embedding; use true")
        dims = vision.hidden_size, text.projection_size
        if dims[0] != dims[1]:
            raise ValueError(f"vision_config.hidden_size {dims[0]} and text_config.projection_size {dims[1]} differ")

    @property
    def projection_dim(self) -> int:
        """Width of the joint embedding: the image tower's."""
        return self.vision_config.hidden_size  # type: ignore[union-attr, return-value]


class MaskedSiglipModel(MaskedDualEncoder, SiglipModel):
    """A SiglipModel with the same names of weights. Its image tower also takes visible patches."""

    config_class = MaskedSiglipConfig
    tower_class = masked_tower(SiglipVisionModel, SiglipVisionEmbeddings)
    _no_split_modules = [  # noqa: RUF012
        *("SiglipTextEmbeddings", "MaskedSiglipVisionEmbeddings", "SiglipEncoderLayer"),
        "SiglipMultiheadAttentionPoolingHead",
    ]


MaskedSiglipConfig.trained_class, MaskedSiglipConfig.exported_class = MaskedSiglipModel, SiglipModel
