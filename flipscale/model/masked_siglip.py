"""The family `siglip`: transformers' SiglipModel, trained with masks."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import (
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from .configuration_flip import tower_size
from .masked import MaskedDualEncoder, MaskedFields, masked_config, masked_tower

_B, _L = tower_size(768, 12, 12), tower_size(1024, 24, 16)
_SO400M = tower_size(1152, 27, 16, 4304)


@strict
class MaskedSiglipConfig(MaskedFields, SiglipConfig):
    """The configuration of a SiglipModel for training. Sizes are SigLIP's and SigLIP 2's."""

    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": masked_config(SiglipVisionConfig, (0.5,) * 3, (0.5,) * 3, num_prefix=0),
        "text_config": SiglipTextConfig,
    }
    own_fields: ClassVar[dict[str, Any]] = {
        "": ("logit_scale_init_value", "logit_bias_init_value"),
        "vision_config": ("image_mean", "image_std"),
    }
    sizes: ClassVar[dict[str, Any]] = {
        "s16": (tower_size(384, 12, 6), tower_size(384, 12, 6)),
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
        vision: Any = self.vision_config
        width: int = vision.hidden_size
        return width


class MaskedSiglipModel(MaskedDualEncoder, SiglipModel):
    """A SiglipModel with the same names of weights. Its image tower also takes visible patches."""

    config_class = MaskedSiglipConfig
    tower_class = masked_tower(SiglipVisionModel, SiglipVisionEmbeddings)
    _no_split_modules = [  # noqa: RUF012
        *("SiglipTextEmbeddings", "MaskedSiglipVisionEmbeddings", "SiglipEncoderLayer"),
        "SiglipMultiheadAttentionPoolingHead",
    ]


MaskedSiglipConfig.trained_class, MaskedSiglipConfig.exported_class = MaskedSiglipModel, SiglipModel
