"""The family `clip`: transformers' CLIPModel, trained with masks."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from .configuration_flip import SIZES
from .masked import MaskedDualEncoder, MaskedFields, MaskedTower, MaskedVisionFields, PackedEmbeddings

# OpenAI's mean and standard deviation of the pixels.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@strict
class MaskedCLIPVisionConfig(MaskedVisionFields, CLIPVisionConfig):
    num_prefix_tokens: ClassVar[int] = 1
    image_mean: list[float] | tuple[float, ...] = _MEAN
    image_std: list[float] | tuple[float, ...] = _STD


# Fields of models that are not OpenAI's, as in open_clip. OpenAI's have quick_gelu.
_OURS = {"hidden_act": "gelu"}


def _size(name: str, **vision: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    image, text, width = SIZES[name]
    shared = {"projection_dim": width, **_OURS}
    return {"patch_size": 16, **image, **shared, **vision}, {**text, **shared}


_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}


@strict
class MaskedCLIPConfig(MaskedFields, CLIPConfig):
    """The configuration of a CLIPModel for training. Sizes are open_clip's, `g14` is its bigG/14."""

    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": MaskedCLIPVisionConfig,
        "text_config": CLIPTextConfig,
    }
    own_fields: ClassVar[dict[str, tuple[str, ...]]] = {
        "": ("logit_bias_init_value",),
        "vision_config": ("image_mean", "image_std"),
    }
    sizes: ClassVar[dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
        "s16": (
            {**_SMALL, **_OURS, "patch_size": 16, "projection_dim": 384},
            {**_SMALL, **_OURS, "projection_dim": 384},
        ),
        "b32": _size("b16", patch_size=32),
        "b16": _size("b16"),
        "l16": _size("l16"),
        "l14": _size("l14"),
        "h14": _size("h14"),
        "g14": _size("g14"),
    }
    processor_class: ClassVar[Any] = CLIPProcessor
    packs_captions: ClassVar[bool] = True
    squashes: ClassVar[bool] = False

    logit_bias_init_value: float | int | None = None

    @classmethod
    def of_towers(cls, vision: dict[str, Any], text: dict[str, Any]) -> "MaskedCLIPConfig":
        dims = [tower.get("projection_dim", 512) for tower in (vision, text)]
        if dims[0] != dims[1]:
            raise ValueError(f"projection_dim differs: vision_config has {dims[0]}, text_config has {dims[1]}")
        return cls(vision_config=vision, text_config=text, projection_dim=dims[0])  # type: ignore[call-arg]


class MaskedCLIPVisionEmbeddings(PackedEmbeddings, CLIPVisionEmbeddings):
    pass


class MaskedCLIPVisionModel(MaskedTower, CLIPVisionModel):
    def __init__(self, config: MaskedCLIPVisionConfig):
        super().__init__(config)
        self.embeddings = MaskedCLIPVisionEmbeddings(config)


class MaskedCLIPModel(MaskedDualEncoder, CLIPModel):
    """A CLIPModel with the same names of weights. Its image tower also takes visible patches."""

    config_class = MaskedCLIPConfig
    largest_scale: ClassVar[float | None] = 100.0
    _no_split_modules = ["CLIPTextEmbeddings", "MaskedCLIPVisionEmbeddings", "CLIPEncoderLayer"]  # noqa: RUF012

    def __init__(self, config: MaskedCLIPConfig):
        super().__init__(config)
        self.vision_model = MaskedCLIPVisionModel._from_config(config.vision_config)
        self.set_loss_parameters()


MaskedCLIPConfig.trained_class, MaskedCLIPConfig.exported_class = MaskedCLIPModel, CLIPModel
