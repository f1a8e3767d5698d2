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

from .masked import MaskedDualEncoder, MaskedFields, MaskedTower, MaskedVisionFields, PackedEmbeddings


@strict
class MaskedSiglipVisionConfig(MaskedVisionFields, SiglipVisionConfig):
    num_prefix_tokens: ClassVar[int] = 0
    image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)


def _tower(width: int, layers: int, heads: int, mlp: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
    }


_B, _L = _tower(768, 12, 12, 3072), _tower(1024, 24, 16, 4096)
_SO400M = _tower(1152, 27, 16, 4304)


@strict
class MaskedSiglipConfig(MaskedFields, SiglipConfig):
    """The configuration of a SiglipModel for training. Sizes are SigLIP's and SigLIP 2's."""

    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": MaskedSiglipVisionConfig,
        "text_config": SiglipTextConfig,
    }
    own_fields: ClassVar[dict[str, tuple[str, ...]]] = {
        "": ("logit_scale_init_value", "logit_bias_init_value"),
        "vision_config": ("image_mean", "image_std"),
    }
    sizes: ClassVar[dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
        "s16": (_tower(384, 12, 6, 1536), _tower(384, 12, 6, 1536)),
        "b16": (_B, _B),
        "l16": (_L, _L),
        "so400m14": ({**_SO400M, "patch_size": 14}, _SO400M),
        "so400m16": (_SO400M, _SO400M),
        "g16": (_tower(1536, 40, 16, 6144), {**_SO400M, "projection_size": 1536}),
    }
    processor_class: ClassVar[Any] = SiglipProcessor
    squashes: ClassVar[bool] = True
    # Without a mask, because SigLIP attends to the padding.
    caption_inputs: ClassVar[tuple[str, ...]] = ("input_ids",)

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


class MaskedSiglipVisionEmbeddings(PackedEmbeddings, SiglipVisionEmbeddings):
    pass


class MaskedSiglipVisionModel(MaskedTower, SiglipVisionModel):
    def __init__(self, config: MaskedSiglipVisionConfig):
        super().__init__(config)
        self.embeddings = MaskedSiglipVisionEmbeddings(config)


class MaskedSiglipModel(MaskedDualEncoder, SiglipModel):
    """A SiglipModel with the same names of weights. Its image tower also takes visible patches."""

    config_class = MaskedSiglipConfig
    _no_split_modules = [  # noqa: RUF012
        *("SiglipTextEmbeddings", "MaskedSiglipVisionEmbeddings", "SiglipEncoderLayer"),
        "SiglipMultiheadAttentionPoolingHead",
    ]

    def __init__(self, config: MaskedSiglipConfig):
        super().__init__(config)
        self.vision_model = MaskedSiglipVisionModel._from_config(config.vision_config)
        self.set_loss_parameters()


MaskedSiglipConfig.trained_class, MaskedSiglipConfig.exported_class = MaskedSiglipModel, SiglipModel
