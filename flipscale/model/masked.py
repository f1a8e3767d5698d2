"""Masks for transformers' own dual encoders: their image tower takes the visible patches only, and computes as before.

A family of models is a configuration class, see `families.py`.
"""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_flip import FlipVisionConfig, TowerFields, check_tower
from .modeling_flip import (
    FlipOutput,
    FlipPatchEmbedding,
    FlipVisionEmbeddings,
    normalise_embeds,
    packed_mask,
    projected,
)
from .patches import patchify


class MaskedVisionFields:
    """A mixin for transformers' configuration of an image tower, with the members that flipscale reads.

    Subclasses have the fields `image_mean` and `image_std`, one number per channel, on the 0..1 scale.
    """

    num_prefix_tokens: ClassVar[int]
    patches_along: Any = FlipVisionConfig.patches_along
    num_patches: Any = FlipVisionConfig.num_patches

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        for name in ("image_size", "patch_size"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"vision_config: {name} is {getattr(self, name)}; it must be one number of pixels")
        check_tower(self)  # type: ignore[arg-type]
        self.patches_along()


def masked_config(kind: Any, mean: tuple[float, ...], std: tuple[float, ...], num_prefix: int = 1) -> Any:
    """Return transformers' configuration class `kind` of an image tower with `MaskedVisionFields`.

    Args:
        mean, std: default `image_mean` and `image_std`.
        num_prefix: number of tokens before those of the patches: 1 for a class token.
    """

    @strict
    class MaskedConfig(MaskedVisionFields, kind):
        num_prefix_tokens: ClassVar[int] = num_prefix
        image_mean: list[float | int] | tuple[float | int, ...] = mean
        image_std: list[float | int] | tuple[float | int, ...] = std

    return MaskedConfig


def tower_fields(kind: Any) -> list[str]:
    """Return the fields of a tower's configuration class, without those that transformers adds to all.

    DINOv3's random changes of positions in training are left out: each process and pass would draw others.
    """
    general = {field.name for field in fields(PreTrainedConfig)}
    return [name for field in fields(kind) if (name := field.name) not in general and not name.startswith("pos_embed_")]


class MaskedFields:
    """A mixin for transformers' configuration of a dual encoder, with the members that flipscale reads.

    Args:
        logit_scale_init_value, logit_bias_init_value: as in `FlipConfig`. Without one, no bias is learned.
    """

    decoder_config: ClassVar[None] = None
    answer_config: ClassVar[None] = None
    # Sizes of the two towers by name, as in `configuration_flip.SIZES`.
    sizes: ClassVar[dict[str, tuple[dict[str, Any], dict[str, Any]]]]
    # Class that is trained, transformers' class, and our fields that transformers' configuration lacks.
    trained_class: ClassVar[Any]
    exported_class: ClassVar[Any]
    own_fields: ClassVar[tuple[str, ...]] = ("logit_bias_init_value",)
    processor_class: ClassVar[Any]
    # Whether captions can share a row of the text tower, because none sees its padding.
    packs_captions: ClassVar[bool] = False
    # Whether images are resized to a square, else their short side is, and the centre is cut out.
    squashes: ClassVar[bool]
    # What the saved tokenizer returns for captions.
    caption_inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        check_tower(self.text_config)  # type: ignore[attr-defined]

    @classmethod
    def from_size(cls, size: str, vision_config: TowerFields = None, text_config: TowerFields = None) -> Any:
        """Return the configuration of a named size, with some fields of its towers replaced."""
        if size not in cls.sizes:
            raise ValueError(f"model size {size!r} is unknown; use one of {', '.join(cls.sizes)}")
        vision, text = cls.sizes[size]
        return cls.of_towers({**vision, **(vision_config or {})}, {**text, **(text_config or {})})

    @classmethod
    def of_towers(cls, vision: dict[str, Any], text: dict[str, Any]) -> Any:
        return cls(vision_config=vision, text_config=text)  # type: ignore[call-arg]

    @classmethod
    def parts(cls, vision: dict[str, Any], text: dict[str, Any]) -> dict[str, list[str]]:
        """Return the fields of each tower's configuration, by the fields that are set of both."""
        towers: dict[str, Any] = cls.sub_configs_defaults  # type: ignore[attr-defined]
        return {name: tower_fields(spec.config_class) for name, spec in towers.items()}

    @property
    def caption_config(self) -> Any:
        return self.text_config  # type: ignore[attr-defined]

    def exported(self) -> PreTrainedConfig:
        """Return transformers' own configuration of the same weights."""
        content = self.to_dict()  # type: ignore[attr-defined]
        for name in self.own_fields:
            content.pop(name, None)
        for name in ("image_mean", "image_std"):
            content["vision_config"].pop(name, None)
        kind: Any = self.exported_class
        return kind.config_class.from_dict(content)


class PackedImages(NamedTuple):
    """The arguments of the same names of `FlipVisionModel.forward`."""

    patches: torch.Tensor
    patch_index: torch.Tensor | None
    image_size: int | None
    weight_dtype: torch.dtype = torch.float32

    @property
    def dtype(self) -> torch.dtype:
        """Type of the patches. A ViT casts its images before the embeddings, which need the bytes."""
        return self.patches.dtype

    def to(self, dtype: torch.dtype) -> "PackedImages":
        """Return the same images, because the embeddings cast them. Rotary positions get `dtype`."""
        return self._replace(weight_dtype=dtype)


class PackedPatchEmbedding(nn.Conv2d):
    """A patch convolution, computed as a matrix product over the visible patches only."""

    forward: Any = FlipPatchEmbedding.forward


class PackedEmbeddings:
    """A mixin for transformers' embeddings of an image tower. They take visible patches. Any class token goes first."""

    # Path of the patch convolution, and whether transformers shrinks positions with a low-pass filter.
    patch_embedding_name: ClassVar[str] = "patch_embedding"
    smooths: ClassVar[bool] = False
    pixel_scale: torch.Tensor
    pixel_shift: torch.Tensor
    normalise: Any = FlipVisionEmbeddings.normalise

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        self.config = config
        sizes = (config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        path, _, name = self.patch_embedding_name.rpartition(".")
        holder = self.get_submodule(path)  # type: ignore[attr-defined]
        setattr(holder, name, PackedPatchEmbedding(*sizes, bias=getattr(holder, name).bias is not None))
        for name, value in self.fixed_tables().items():
            self.register_buffer(name, value, persistent=False)  # type: ignore[attr-defined]

    def fixed_tables(self) -> dict[str, torch.Tensor]:
        """Compute the buffers from the configuration. They are not saved."""
        config = self.config
        mean, std = (torch.tensor(value, dtype=torch.float32) for value in (config.image_mean, config.image_std))
        count = config.num_patches + config.num_prefix_tokens
        return {
            "position_ids": torch.arange(count).expand(1, -1),
            "pixel_scale": 1.0 / (255.0 * std),
            "pixel_shift": -mean / std,
        }

    def forward(self, images: PackedImages | torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """Return the tokens `(batch, prefix + kept, hidden_size)` of packed patches, or of normalised pixels `(batch,
        channels, image_size, image_size)`."""
        config = self.config
        if isinstance(images, torch.Tensor):
            images = PackedImages(patchify(images, config.patch_size), None, images.shape[-1])
        patches, index, image_size, _ = images
        if patches.ndim == 4 and index is not None:
            patches, index = patches.flatten(0, 1), index.flatten(0, 1)
        if patches.dtype == torch.uint8:
            patches = self.normalise(patches)
        embeds = self.get_submodule(self.patch_embedding_name)(patches)  # type: ignore[attr-defined]
        prefix, positions = self.positions(config.patches_along(image_size))
        embeds = embeds + (positions if index is None else positions[index.long()]).to(embeds.dtype)
        if not config.num_prefix_tokens:
            return embeds
        class_embeds = (self.class_token() + prefix).to(embeds.dtype)
        return torch.cat([class_embeds.expand(embeds.shape[0], 1, -1), embeds], dim=1)

    def positions(self, side: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the learned positions of any class token, `(prefix, width)`, and of `side` x `side` patches.

        Patches have `(side * side, width)`. Another size is interpolated as in transformers (bicubic).
        """
        config = self.config
        table = self.position_table()
        prefix, own = table[: config.num_prefix_tokens], table[config.num_prefix_tokens :]
        if side == config.patches_along():
            return prefix, own
        grid = own.float().unflatten(0, (config.patches_along(), -1)).permute(2, 0, 1)[None]
        options: dict[str, Any] = {"mode": "bicubic", "align_corners": False, "antialias": self.smooths}
        resized = nn.functional.interpolate(grid, size=(side, side), **options)
        return prefix, resized[0].flatten(1).t()

    def class_token(self) -> torch.Tensor:
        return self.class_embedding  # type: ignore[attr-defined, no-any-return]

    def position_table(self) -> torch.Tensor:
        """Return the positions of any class token and of the patches of a whole image, `(count, width)`."""
        # By a call of its module, because an engine may gather its weights only then.
        return self.position_embedding(self.position_ids)[0]  # type: ignore[attr-defined, no-any-return]


class _WithTables:
    """A mixin for models with `PackedEmbeddings`: it also initialises their buffers, which are not saved."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        for name, value in getattr(module, "fixed_tables", dict)().items():
            init.copy_(getattr(module, name), value)


class MaskedTower(_WithTables):
    """A mixin for transformers' image tower: it takes `pixel_values` or `patches`."""

    embeddings_class: ClassVar[Any]

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        self.embeddings = self.embeddings_class(config)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        patches: torch.Tensor | None = None,
        patch_index: torch.Tensor | None = None,
        image_size: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode whole images or their visible patches. The arguments are those of `FlipVisionModel.forward`."""
        images = pixel_values if patches is None else PackedImages(patches, patch_index, image_size)
        return super().forward(images, **kwargs)  # type: ignore[misc]


def masked_tower(tower: Any, embeddings: Any, packed: type[PackedEmbeddings] = PackedEmbeddings) -> Any:
    """Return transformers' class `tower` as a `MaskedTower`, with its class of `embeddings` mixed with `packed`."""
    own = type(f"Masked{embeddings.__name__}", (packed, embeddings), {})
    return type(f"Masked{tower.__name__}", (MaskedTower, tower), {"embeddings_class": own})


class MaskedDualEncoder(_WithTables):
    """A mixin for transformers' dual encoders, which trains as a `FlipModel` does."""

    # No weight decay for what has one dimension, as in open_clip.
    loss_parameters: ClassVar[dict[str, bool]] = {"logit_scale": False, "logit_bias": False}
    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"class_embedding"})
    # Largest inverse temperature; None for no limit.
    largest_scale: ClassVar[float | None] = None
    # Class of the image tower; None if the constructor gets the tower.
    tower_class: ClassVar[Any] = None
    config: Any
    logit_scale: Any
    logit_bias: Any

    def __init__(self, config: Any, **towers: Any):
        super().__init__(config, **towers)  # type: ignore[call-arg]
        if self.tower_class is not None:
            self.vision_model = self.tower_class._from_config(config.vision_config)
        # The parameters of the loss are the configuration's. A bias that is not learned stays as it is.
        for name in self.loss_parameters:
            value = getattr(self.config, f"{name}_init_value")
            if value is not None:
                # Shape (1,): a 0-d parameter cannot be sharded.
                setattr(self, name, nn.Parameter(torch.full((1,), float(value))))
            elif isinstance(getattr(self, name, None), nn.Parameter):
                getattr(self, name).requires_grad_(False)
            else:
                setattr(self, name, None)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            for name in self.loss_parameters:
                parameter, value = getattr(self, name, None), getattr(self.config, f"{name}_init_value")
                if parameter is not None:
                    init.constant_(parameter, 0.0 if value is None else value)

    def get_image_features(self, pixel_values: torch.Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return the image tower's output with its embedding as `pooler_output`, `(batch, dim)`, not normalised."""
        return super().get_image_features(pixel_values, **kwargs)  # type: ignore[misc]

    def text_features(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        caption_ends: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the embeddings of captions, `(captions, dim)`, not normalised. Arguments are those of `forward`."""
        if caption_ends is None or position_ids is None:
            return self.get_text_features(input_ids).pooler_output  # type: ignore[attr-defined]
        text_model: Any = self.text_model  # type: ignore[attr-defined]
        mask = packed_mask(position_ids, True, text_model.config._attn_implementation)
        tokens = text_model(input_ids, attention_mask=mask, position_ids=position_ids).last_hidden_state
        return self.text_projection(tokens.flatten(0, 1).index_select(0, caption_ends))  # type: ignore[attr-defined]

    def loss_values(self) -> dict[str, torch.Tensor]:
        """Return the values of the learned loss parameters, fp32 `(1,)`, as in `FlipOutput`."""
        scale = self.logit_scale.float()
        if self.largest_scale is not None:
            scale = _bounded(scale, math.log(self.largest_scale))
        values = {"logit_scale": scale.exp()}
        if self.logit_bias is not None and self.config.logit_bias_init_value is not None:
            # A copy, because ZeRO-3 takes a parameter that is returned for one of the caller's.
            values["logit_bias"] = self.logit_bias.to(torch.float32, copy=True)
        return values

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_logits: bool = True,
        position_ids: torch.Tensor | None = None,
        caption_ends: torch.Tensor | None = None,
        on_texts: Callable[[torch.Tensor], None] | None = None,
        image_features: torch.Tensor | None = None,
        text_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> FlipOutput:
        """Embed images and captions and compare them.

        Args:
            input_ids: `(batch, tokens)`, padded on the right.
            attention_mask: not used. CLIP's tokens see no later ones, SigLIP's see padding, `towers` has a padding id.
            position_ids, caption_ends: with several captions in a row, see `flipscale.data.captions.pack_captions`.
            on_texts, image_features, text_features: see `FlipModel.forward`.
            kwargs: images, see `FlipVisionModel.forward`.
        """
        if text_features is None:
            text_embeds = normalise_embeds(self.text_features(input_ids, position_ids, caption_ends))
        else:
            text_embeds = self._projected("text_projection", text_features)
        if on_texts is not None:
            on_texts(text_embeds)
        if image_features is None:
            image_output = self.get_image_features(pixel_values, **kwargs)
            image_embeds = normalise_embeds(cast(torch.Tensor, image_output.pooler_output))
        else:
            image_embeds = self._projected("visual_projection", image_features)
        values: dict[str, Any] = self.loss_values()
        logits = None
        if return_logits:
            logits = values["logit_scale"] * image_embeds @ text_embeds.t() + values.get("logit_bias", 0.0)
        return FlipOutput(
            logits_per_image=logits,
            logits_per_text=None if logits is None else logits.t(),
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            **values,
        )

    def _projected(self, name: str, features: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of stored features. SigLIP has no projection after its towers."""
        projection = getattr(self, name, None)
        return normalise_embeds(features if projection is None else projected(projection, features).pooler_output)


def _bounded(log_scale: torch.Tensor, limit: float) -> torch.Tensor:
    """Return `log_scale`, at most `limit`. Beyond the limit, only gradients that lead back are kept."""
    value = log_scale + (log_scale.clamp(max=limit) - log_scale).detach()
    if value.requires_grad:
        is_beyond = log_scale.detach() >= limit
        value.register_hook(lambda gradient: torch.where(is_beyond, gradient.clamp(min=0.0), gradient))
    return value
