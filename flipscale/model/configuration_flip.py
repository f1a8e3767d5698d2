"""The configuration of FLIP models. It describes the weights, never how they are trained."""

import math
from typing import Any, ClassVar, get_origin

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# The number of the present form of the configuration and the weights. It grows when older code would read a newer
# folder wrongly: a new field that changes what the model computes, or weights of another meaning. A file without the
# number is of form 1.
MODEL_FORMAT = 1

# The least and the greatest value of the numbers of a configuration. The greatest are far above every published
# model's: what is beyond is no model, and is refused before memory is asked for.
RANGES: dict[str, tuple[int, int]] = {
    "hidden_size": (1, 65_536),
    "intermediate_size": (1, 1_048_576),
    "num_hidden_layers": (0, 1_000),
    "num_attention_heads": (1, 4_096),
    "projection_dim": (1, 65_536),
    "num_channels": (1, 1_024),
    "image_size": (1, 16_384),
    "patch_size": (1, 16_384),
    "vocab_size": (1, 100_000_000),
    "max_position_embeddings": (1, 1_000_000),
    "attention_dropout": (0, 1),
    "layer_norm_eps": (0, 1),
    "initializer_range": (0, 1),
    "logit_scale_init_value": (-100, 100),
    "logit_bias_init_value": (-1_000, 1_000),
}


class FlipPreTrainedConfig(PreTrainedConfig):
    """The base of the three configurations. It keeps fields that it does not know, as transformers' own configurations
    do: quantisers, PEFT and hubs add theirs. It refuses a file of another model type or of a newer `model_format`."""

    def __post_init__(self, **kwargs: Any) -> None:
        # What is written is always of the present form, so the number that was read is not kept.
        kwargs.pop("model_format", None)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration that a file's content describes.

        Raises:
            ValueError: the content is of another model type or of a newer `model_format`.
        """
        cls._check_readable(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_own_fields(cls, content: dict[str, Any]) -> Any:
        """Return the configuration that a file's content describes, of the fields of this class alone: those that
        transformers adds may name code, kernels and other files to load.

        Raises:
            ValueError: the content is of another model type or of a newer `model_format`, or a field cannot be so.
        """
        cls._check_readable(content)
        return cls._built(cls._own(content))

    @classmethod
    def _own(cls, content: dict[str, Any]) -> dict[str, Any]:
        fields = (name for name, kind in cls.__annotations__.items() if get_origin(kind) is not ClassVar)
        return {name: content[name] for name in fields if name in content}

    @classmethod
    def _built(cls, fields: dict[str, Any]) -> Any:
        try:
            return cls(**fields)
        except StrictDataclassError as error:  # a field of another type
            raise ValueError(" ".join(str(error).split())) from None

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "model_format": MODEL_FORMAT}

    @classmethod
    def _check_readable(cls, content: dict[str, Any]) -> None:
        if not isinstance(content, dict):
            raise ValueError(f"the config of a {cls.__name__} is {content!r:.40}; it must be an object with its fields")
        model_type = content.get("model_type") or cls.model_type
        if model_type != cls.model_type:
            raise ValueError(
                f"the config has model_type {model_type!r}, {cls.__name__} reads {cls.model_type!r}; upgrade "
                "flipscale, or load it with the class it was made for"
            )
        model_format = content.get("model_format", 1)
        if not isinstance(model_format, int) or model_format > MODEL_FORMAT:
            raise ValueError(
                f"the config has model_format {model_format}, this {cls.__name__} reads up to {MODEL_FORMAT}; upgrade "
                "flipscale to the version that wrote the model"
            )


def _check_ranges(config: PreTrainedConfig) -> None:
    """Raise if a number of a configuration is out of its range.

    Raises:
        ValueError: it is; the message names it.
    """
    for name, (least, greatest) in RANGES.items():
        value = getattr(config, name, None)
        if value is not None and not least <= value <= greatest:
            raise ValueError(
                f"{_place(config)}{name} is {value}; it must be at least {least:,} and at most {greatest:,}"
            )


def patches_along(image_size: int, patch_size: int) -> int:
    """Return how many patches of `patch_size` pixels lie along each side of an image of `image_size` pixels.

    Raises:
        ValueError: the patch does not divide the image.
    """
    count, rest = divmod(image_size, patch_size)
    if rest or count < 1:
        fitting = " or ".join(str(patch_size * number) for number in (count, count + 1) if number > 0)
        raise ValueError(f"image_size {image_size} is not divisible by patch_size {patch_size}; use {fitting}")
    return count


def _check_tower(config: PreTrainedConfig) -> None:
    _check_ranges(config)
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{_place(config)}hidden_size {config.hidden_size} is not divisible by num_attention_heads "
            f"{config.num_attention_heads}"
        )
    _refuse_activation(config.hidden_act)


def _place(config: PreTrainedConfig) -> str:
    return f"{config.base_config_key}: " if config.base_config_key else ""


def _refuse_activation(name: str) -> None:
    from transformers.activations import ACT2FN  # seconds to import; a configuration alone need not

    if name not in ACT2FN:
        raise ValueError(f"hidden_act {name!r} is unknown; use one of {', '.join(sorted(ACT2FN))}")


@strict
class FlipVisionConfig(FlipPreTrainedConfig):
    r"""
    The configuration of the image tower: a ViT with a class token without position, fixed 2-D sine-cosine positions,
    no norm before the blocks, and the mean over all tokens (the class token included) after the last block. The
    defaults are those of B/16.

    Args:
        projection_dim: the width of the joint embedding, used by `FlipVisionModelWithProjection` and `FlipModel`.
        image_mean, image_std: one number per channel, or one for all, on the 0..1 scale. The model applies them to
            uint8 `patches`.
        layer_norm_eps: 1e-6, as the original JAX code has it.
    """

    model_type = "flip_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    projection_dim: int = 512
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float | int = 1e-6
    attention_dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    image_mean: list[float] | tuple[float, ...] | float | int = IMAGENET_MEAN
    image_std: list[float] | tuple[float, ...] | float | int = IMAGENET_STD

    def __post_init__(self, **kwargs: Any) -> None:
        _check_tower(self)
        self.patches_along()
        for name, is_possible in (("image_mean", math.isfinite), ("image_std", lambda std: 0 < std < math.inf)):
            given = getattr(self, name)
            values = [given] if isinstance(given, int | float) else list(given)
            if len(values) not in (1, self.num_channels) or not all(map(is_possible, values)):
                raise ValueError(
                    f"{name} is {given}; it must be one number, or one for each of {self.num_channels} channels, "
                    f"{'above 0' if name == 'image_std' else 'on the 0..1 scale'}"
                )
        super().__post_init__(**kwargs)

    def patches_along(self, image_size: int | None = None) -> int:
        """Return how many patches lie along each side of an image of `image_size` pixels, by default the model's own.

        Raises:
            ValueError: as `patches_along`.
        """
        return patches_along(self.image_size if image_size is None else image_size, self.patch_size)

    @property
    def num_patches(self) -> int:
        """The number of patches of a whole image."""
        return self.patches_along() ** 2

    @property
    def num_prefix_tokens(self) -> int:
        """The number of tokens that the image tower puts before those of the patches: the class token."""
        return 1


@strict
class FlipTextConfig(FlipPreTrainedConfig):
    r"""
    The configuration of the text tower: a bidirectional pre-norm transformer with learned positions. The defaults are
    those of the original's B/16.

    Args:
        attend_to_padding: True is the original's way: every caption is padded to `max_position_embeddings` and the
            padding takes part in attention. False masks the padding, so its length does not change the embedding.
        pooling: "first" is the original's: the first word piece, as there is no class token. "mean" averages all
            tokens, or the caption's own when `attend_to_padding` is False.
        vocab_size: 30,523 is BERT's 30,522 and one row that no input uses, as in the original's checkpoints.
    """

    model_type = "flip_text_model"
    base_config_key = "text_config"

    vocab_size: int = 30523
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 32
    projection_dim: int = 512
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float | int = 1e-6
    attention_dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    attend_to_padding: bool = True
    pooling: str = "first"
    pad_token_id: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.pooling not in ("first", "mean"):
            raise ValueError(f"text_config: pooling is {self.pooling!r}; use 'first' or 'mean'")
        _check_tower(self)
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"text_config: pad_token_id is {self.pad_token_id}; it must be below vocab_size, from 0")
        super().__post_init__(**kwargs)


@strict
class FlipConfig(FlipPreTrainedConfig):
    r"""
    The configuration of both towers and of the loss parameters. Mask ratios are arguments of `forward`, not fields
    here: a released model must not mask by itself.

    Args:
        projection_dim: the width of the joint embedding, set on both towers. None takes the towers' own, which must be
            equal.
        logit_scale_init_value: ln(1/0.07), before the exponential is taken.
        logit_bias_init_value: the initial value of `logit_bias`, which is added to every logit for the sigmoid loss.
            None is for a model without it.

    Example:

    ```python
    >>> from flipscale.model import FlipConfig, FlipModel

    >>> model = FlipModel(FlipConfig.from_size("l16"))
    ```"""

    model_type = "flip"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": FlipTextConfig,
        "vision_config": FlipVisionConfig,
    }

    # Given as configurations, as dicts or not at all; configurations once this object is made.
    text_config: Any = None
    vision_config: Any = None
    projection_dim: int | None = None
    logit_scale_init_value: float | int = 2.6592600369327783
    logit_bias_init_value: float | int | None = None
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _check_ranges(self)
        towers = [self.vision_config, self.text_config]
        if self.projection_dim is None:
            dims = [tower.projection_dim for tower in towers]
            if dims[0] != dims[1]:
                raise ValueError(
                    f"projection_dim differs: vision_config has {dims[0]}, text_config has {dims[1]}; "
                    "set projection_dim of FlipConfig for both"
                )
            self.projection_dim = dims[0]
        for tower in towers:
            tower.projection_dim = self.projection_dim

    @classmethod
    def _check_readable(cls, content: dict[str, Any]) -> None:
        super()._check_readable(content)
        for name, tower in (("vision_config", FlipVisionConfig), ("text_config", FlipTextConfig)):
            tower._check_readable(content.get(name) or {})

    @classmethod
    def _own(cls, content: dict[str, Any]) -> dict[str, Any]:
        towers = (("vision_config", FlipVisionConfig), ("text_config", FlipTextConfig))
        return {**super()._own(content), **{name: tower._own(content.get(name) or {}) for name, tower in towers}}

    @classmethod
    def from_size(
        cls, size: str, vision_config: dict[str, Any] | None = None, text_config: dict[str, Any] | None = None
    ) -> "FlipConfig":
        """Return the configuration of a named size, with single fields of its towers replaced.

        Args:
            size: one of `SIZES`: b16, l16, h14 (paper, Table 9), l14 (paper, Table 2), g14 (LAION's G/14).

        Raises:
            ValueError: the size is unknown, a field cannot be so, or the towers differ in `projection_dim`.
        """
        if size not in SIZES:
            raise ValueError(f"model size {size!r} is unknown; use one of {', '.join(SIZES)}")
        vision, text, projection_dim = SIZES[size]
        towers = {
            "vision_config": {**vision, "projection_dim": projection_dim, **(vision_config or {})},
            "text_config": {**text, "projection_dim": projection_dim, **(text_config or {})},
        }
        return cls._built(towers)


def _tower(width: int, layers: int, heads: int, mlp: int | None = None, **fields: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp or 4 * width,
        **fields,
    }


# (image tower, text tower, projection_dim). Widths, layers and heads: paper, Table 9. The paper has no G: its G/14 is
# the shape that LAION trained with patch dropout.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "b16": (_tower(768, 12, 12), _tower(512, 12, 8), 512),
    "l16": (_tower(1024, 24, 16), _tower(768, 12, 12), 768),
    "l14": (_tower(1024, 24, 16, patch_size=14), _tower(768, 12, 12), 768),
    "h14": (_tower(1280, 32, 16, patch_size=14), _tower(1024, 24, 16), 1024),
    "g14": (_tower(1664, 48, 16, mlp=8192, patch_size=14), _tower(1280, 32, 20), 1280),
}

__all__ = ["FlipConfig", "FlipTextConfig", "FlipVisionConfig"]
