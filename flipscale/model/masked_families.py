"""The families `clip`, `siglip` and `towers`: dual encoders of transformers, trained with masks. See `masked.py`.

`towers` is transformers' VisionTextDualEncoderModel of a plain ViT and a text encoder.
"""

import copy
import math
from typing import Any, ClassVar

import torch
import transformers
from huggingface_hub.dataclasses import strict
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersEmbeddings
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTEmbeddings, DINOv3ViTRopePositionEmbedding
from transformers.models.mpnet.modeling_mpnet import MPNetLayer
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings
from transformers.models.vit.modeling_vit import ViTEmbeddings

from .configuration_flip import IMAGENET_MEAN, IMAGENET_STD, SIZES, TowerFields, check_ranges, tower_size
from .masked import (
    MaskedDualEncoder,
    MaskedFields,
    PackedEmbeddings,
    PackedImages,
    masked_config,
    masked_tower,
    tower_fields,
)
from .modeling_dual_encoder import ExtendedDualEncoderModel, add_parts
from .modeling_flip import cast_for_products

# OpenAI's mean and standard deviation of the pixels.
_OPENAI_MEAN, _OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5,) * 3
_SMALL = tower_size(384, 12, 6)
_B, _L = tower_size(768, 12, 12), tower_size(1024, 24, 16)
_SO400M = tower_size(1152, 27, 16, 4304)


def _size(name: str, **vision: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    image, text, width = {"s16": (_SMALL, _SMALL, 384), **SIZES}[name]
    # OpenAI's models have quick_gelu, open_clip's others have gelu.
    shared = {"projection_dim": width, "hidden_act": "gelu"}
    return {"patch_size": 16, **image, **shared, **vision}, {**text, **shared}


@strict
class MaskedCLIPConfig(MaskedFields, transformers.CLIPConfig):
    """The configuration of a CLIPModel for training. Sizes are open_clip's, `g14` is its bigG/14."""

    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": masked_config(transformers.CLIPVisionConfig, _OPENAI_MEAN, _OPENAI_STD),
        "text_config": transformers.CLIPTextConfig,
    }
    sizes: ClassVar[dict[str, Any]] = {
        "s16": _size("s16"),
        "b32": _size("b16", patch_size=32),
        **{name: _size(name) for name in ("b16", "l16", "l14", "h14", "g14")},
    }
    processor_class = transformers.CLIPProcessor
    packs_captions = True
    squashes = False

    logit_bias_init_value: float | int | None = None

    @classmethod
    def of_towers(cls, vision: dict[str, Any], text: dict[str, Any]) -> "MaskedCLIPConfig":
        dims = [tower.get("projection_dim", 512) for tower in (vision, text)]
        if dims[0] != dims[1]:
            raise ValueError(f"projection_dim differs: vision_config has {dims[0]}, text_config has {dims[1]}")
        return cls(vision_config=vision, text_config=text, projection_dim=dims[0])  # type: ignore[call-arg]


class MaskedCLIPModel(MaskedDualEncoder, transformers.CLIPModel):
    """A CLIPModel with the same names of weights. Its image tower also takes visible patches."""

    config_class = MaskedCLIPConfig
    tower_class = masked_tower(transformers.CLIPVisionModel, CLIPVisionEmbeddings)
    largest_scale = 100.0
    _no_split_modules = ["CLIPTextEmbeddings", "MaskedCLIPVisionEmbeddings", "CLIPEncoderLayer"]  # noqa: RUF012


MaskedCLIPConfig.trained_class, MaskedCLIPConfig.exported_class = MaskedCLIPModel, transformers.CLIPModel


@strict
class MaskedSiglipConfig(MaskedFields, transformers.SiglipConfig):
    """The configuration of a SiglipModel for training. Sizes are SigLIP's and SigLIP 2's."""

    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": masked_config(transformers.SiglipVisionConfig, _HALF, _HALF, num_prefix=0),
        "text_config": transformers.SiglipTextConfig,
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
    processor_class = transformers.SiglipProcessor
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


class MaskedSiglipModel(MaskedDualEncoder, transformers.SiglipModel):
    """A SiglipModel with the same names of weights. Its image tower also takes visible patches."""

    config_class = MaskedSiglipConfig
    tower_class = masked_tower(transformers.SiglipVisionModel, SiglipVisionEmbeddings)
    _no_split_modules = [  # noqa: RUF012
        *("SiglipTextEmbeddings", "MaskedSiglipVisionEmbeddings", "SiglipEncoderLayer"),
        "SiglipMultiheadAttentionPoolingHead",
    ]


MaskedSiglipConfig.trained_class, MaskedSiglipConfig.exported_class = MaskedSiglipModel, transformers.SiglipModel


# Text encoders whose output has a `pooler_output`, which VisionTextDualEncoderModel projects; and others.
POOLED = (
    *("bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "ernie", "megatron-bert", "mpnet"),
    *("data2vec-text", "roberta-prelayernorm", "rembert"),
)
UNPOOLED = ("modernbert", "distilbert", "electra", "deberta-v2", "eurobert", "gemma3_text")

# Fields of `text_config` in a recipe that are the whole model's.
_PROJECTED = ("projection_dim", "projection_hidden_size", "caption_tokens")


class PackedViTEmbeddings(PackedEmbeddings):
    """A mixin for embeddings of a ViT, which keep their positions in one parameter with the class token's first."""

    patch_embedding_name: ClassVar[str] = "patch_embeddings.projection"

    def forward(self, images: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        """Return the tokens; arguments that transformers' towers pass besides the images do not apply."""
        tokens = super().forward(images)
        if (registers := getattr(self, "register_tokens", None)) is not None:
            registers = registers.to(tokens.dtype).expand(len(tokens), -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
        return self.dropout(tokens)  # type: ignore[attr-defined]

    def class_token(self) -> Any:
        return self.cls_token  # type: ignore[attr-defined]

    def position_table(self) -> Any:
        return self.position_embeddings[0]  # type: ignore[attr-defined]


class PackedRegisters(PackedViTEmbeddings):
    """A mixin for embeddings of a DINOv2 with registers."""

    smooths: ClassVar[bool] = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.mask_token.requires_grad_(False)  # type: ignore[attr-defined]  # for DINOv2's own pre-training


class PackedRotated(PackedRegisters):
    """A mixin for embeddings of a DINOv3: its blocks rotate by the positions, so the tokens have none."""

    patch_embedding_name: ClassVar[str] = "patch_embeddings"

    def __init__(self, config: Any):
        super().__init__(config)
        self.dropout = torch.nn.Identity()

    def positions(self, side: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return zeros of width 1 for the class token and for `side` x `side` patches."""
        zeros = self.pixel_scale.new_zeros(1, 1)
        return zeros, zeros.expand(side * side, 1)


class PackedRotations(DINOv3ViTRopePositionEmbedding):
    """The cosines and sines by which DINOv3's blocks rotate queries and keys, for visible patches only."""

    def forward(self, images: PackedImages | torch.Tensor) -> Any:
        """Return both for the patches: `(patches, head width)`, or with an index `(batch, 1, kept, head width)`."""
        if isinstance(images, torch.Tensor):
            images = PackedImages(images, None, images.shape[-1], images.dtype)
        _, index, image_size, dtype = images
        side = self.config.patches_along(image_size)
        # As the centres of patches in transformers, without its cache: a dry run's tensors have no numbers.
        along = 2.0 * (torch.arange(0.5, side, device=self.inv_freq.device) / side) - 1.0
        centres = torch.cartesian_prod(along, along)
        angles = (2 * math.pi * centres[:, :, None] * self.inv_freq).flatten(1).tile(2)
        tables = [cast_for_products(table.to(dtype)) for table in (angles.cos(), angles.sin())]
        if index is None:
            return tables
        kept = index.flatten(0, -2).long()
        return [table[kept].unsqueeze(1) for table in tables]


class MaskedDINOv3ViTModel(masked_tower(transformers.DINOv3ViTModel, DINOv3ViTEmbeddings, PackedRotated)):  # type: ignore[misc]
    """A DINOv3ViTModel that takes visible patches. They keep the rotations of their places."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.rope_embeddings = PackedRotations(config)


_CLIP, _SIGLIP = (kind.sub_configs_defaults["vision_config"] for kind in (MaskedCLIPConfig, MaskedSiglipConfig))
# Image towers by `model_type`: the configuration and the model for training.
VISION_TOWERS: dict[str, tuple[Any, Any]] = {
    "vit": (
        masked_config(transformers.ViTConfig, _HALF, _HALF),
        masked_tower(transformers.ViTModel, ViTEmbeddings, PackedViTEmbeddings),
    ),
    "dinov2": (
        masked_config(transformers.Dinov2Config, IMAGENET_MEAN, IMAGENET_STD),
        masked_tower(transformers.Dinov2Model, Dinov2Embeddings, PackedViTEmbeddings),
    ),
    "dinov2_with_registers": (
        masked_config(transformers.Dinov2WithRegistersConfig, IMAGENET_MEAN, IMAGENET_STD),
        masked_tower(transformers.Dinov2WithRegistersModel, Dinov2WithRegistersEmbeddings, PackedRegisters),
    ),
    "dinov3_vit": (
        masked_config(transformers.DINOv3ViTConfig, IMAGENET_MEAN, IMAGENET_STD),
        MaskedDINOv3ViTModel,
    ),
    "clip_vision_model": (_CLIP.config_class, MaskedCLIPModel.tower_class),
    "siglip_vision_model": (_SIGLIP.config_class, MaskedSiglipModel.tower_class),
}


@strict
class MaskedTowersConfig(MaskedFields, transformers.VisionTextDualEncoderConfig):
    """The configuration of a VisionTextDualEncoderModel for training.

    Args:
        caption_tokens: tokens after which a caption is cut, by default 64 if there are as many positions.
        projection_hidden_size: width between the two layers of both projections; None for projections of one layer.
        squashes: as in `MaskedFields`.
    """

    own_fields = ("logit_bias_init_value", "caption_tokens", "squashes", "projection_hidden_size")
    sizes: ClassVar[dict[str, Any]] = {}
    processor_class = transformers.VisionTextDualEncoderProcessor

    logit_bias_init_value: float | int | None = None
    caption_tokens: int | None = None
    projection_hidden_size: int | None = None
    squashes: bool = False  # type: ignore[misc]

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.vision_config, dict):
            fields = {**self.vision_config}
            self.vision_config = VISION_TOWERS[fields.pop("model_type")][0](**fields)
        super().__post_init__(**kwargs)
        text: Any = self.text_config
        # RoBERTa and its kin number positions from the padding's id on, which is 1.
        positions = text.max_position_embeddings - (2 if text.pad_token_id == 1 else 0)
        self.caption_tokens = min(64, positions) if self.caption_tokens is None else self.caption_tokens
        if not 1 <= self.caption_tokens <= positions:
            raise ValueError(f"text_config: caption_tokens is {self.caption_tokens}; the text tower has {positions}")
        check_ranges(self)

    @classmethod
    def from_size(cls, size: str, vision_config: TowerFields = None, text_config: TowerFields = None) -> Any:
        if not vision_config or not text_config:
            raise ValueError("family towers has no sizes; set model.vision and model.text, or model.init_from")
        return cls.of_towers(vision_config, text_config)

    @classmethod
    def of_towers(cls, vision: dict[str, Any], text: dict[str, Any]) -> "MaskedTowersConfig":
        vision, text = {**vision}, {**text}
        own: dict[str, Any] = {name: text.pop(name) for name in _PROJECTED if name in text}
        own |= {name: vision.pop(name) for name in ("squashes",) if name in vision}
        return cls(vision_config=vision, text_config=text, **own)

    @classmethod
    def parts(cls, vision: dict[str, Any], text: dict[str, Any]) -> dict[str, list[str]]:
        image, words = str(vision.get("model_type", "vit")), str(text.get("model_type", "bert"))
        if image not in VISION_TOWERS or words not in (*POOLED, *UNPOOLED):
            return {}
        return {
            "vision_config": [*tower_fields(VISION_TOWERS[image][0]), "model_type", "squashes"],
            "text_config": [*tower_fields(transformers.CONFIG_MAPPING[words]), "model_type", *_PROJECTED],
        }

    @property
    def exported_class(self) -> Any:  # type: ignore[override]
        """Class of the exported folder: transformers' own, unless it lacks parts."""
        text: Any = self.text_config
        lacks = text.model_type in UNPOOLED or self.projection_hidden_size
        return ExtendedDualEncoderModel if lacks else transformers.VisionTextDualEncoderModel

    def exported(self) -> Any:
        config = super().exported()
        if self.projection_hidden_size:
            config.projection_hidden_size = self.projection_hidden_size
        return config

    @property
    def caption_config(self) -> Any:
        text = copy.copy(self.text_config)
        text.max_position_embeddings = self.caption_tokens  # type: ignore[union-attr]
        return text


class MPNetBlock(GradientCheckpointingLayer, MPNetLayer):
    """An MPNetLayer of the class by which blocks are found. transformers gives it to all other encoders' layers."""


class MaskedTowersModel(MaskedDualEncoder, transformers.VisionTextDualEncoderModel):
    """A VisionTextDualEncoderModel with the same names of weights. Its image tower also takes visible patches."""

    config_class = MaskedTowersConfig
    supports_gradient_checkpointing = True
    largest_scale = 100.0
    no_weight_decay = frozenset({"class_embedding", "cls_token", "register_tokens", "lambda1"})

    def __init__(self, config: MaskedTowersConfig):
        vision: Any = config.vision_config
        tower = VISION_TOWERS[vision.model_type][1]._from_config(vision)
        super().__init__(config, vision_model=tower, text_model=transformers.AutoModel.from_config(config.text_config))
        for module in self.text_model.modules():
            if isinstance(module, MPNetLayer):
                module.__class__ = MPNetBlock
        # Not every text tower names its blocks.
        kinds = (PackedEmbeddings, GradientCheckpointingLayer)
        blocks = {type(module).__name__ for module in self.modules() if isinstance(module, kinds)}
        self._no_split_modules = {*(self._no_split_modules or ()), *blocks}
        add_parts(self)

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Return the text tower's output with its embedding as `pooler_output`. Padding takes no part in attention."""
        if attention_mask is None:
            attention_mask = input_ids != self.config.text_config.pad_token_id
        return super().get_text_features(input_ids, attention_mask=attention_mask, **kwargs)


MaskedTowersConfig.trained_class = MaskedTowersModel


def stored_names(model: Any) -> dict[str, str]:
    """Return the name in a model folder of each weight of a model of transformers, by its name in the model.

    They are those of transformers 4.57, which newer releases read and write too.
    """
    weights = model.state_dict()
    own = {id(weight): name for name, weight in weights.items()}
    names = {own[id(weight)]: name for name, weight in revert_weight_conversion(model, weights).items()}
    is_of_two = isinstance(model, transformers.VisionTextDualEncoderModel)
    if not is_of_two or not hasattr(model.vision_model.embeddings, "patch_embedding"):
        return names
    # transformers 5 took a level out of the towers of CLIP and SigLIP.
    return {name: stored.replace("vision_model.", "vision_model.vision_model.", 1) for name, stored in names.items()}
