"""What the configurations of FLIP models have in common: how they are read, and what their numbers may be."""

from typing import Any, ClassVar, get_origin

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

# The number of the newest form of the configuration and the weights. It grows when older code would read a newer
# folder wrongly: a new field that changes what the model computes, or weights of another meaning. A file without the
# number is of form 1. Form 2 has the `position_size` of an image tower.
MODEL_FORMAT = 2

# The least and the greatest value of the numbers of a configuration. The greatest are far above every published
# model's: what is beyond is no model, and is refused before memory is asked for.
RANGES: dict[str, tuple[int, int]] = {
    "hidden_size": (1, 65_536),
    "intermediate_size": (1, 1_048_576),
    "num_hidden_layers": (0, 1_000),
    "num_encoder_layers": (0, 1_000),
    "num_attention_heads": (1, 4_096),
    "projection_dim": (1, 65_536),
    "num_answers": (1, 10_000_000),
    "num_channels": (1, 1_024),
    "image_size": (1, 16_384),
    "position_size": (1, 16_384),
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
    """The base of all configurations. It keeps fields that it does not know, as transformers' own configurations
    do: quantisers, PEFT and hubs add theirs. It refuses a file of another model type or of a newer `model_format`."""

    def __post_init__(self, **kwargs: Any) -> None:
        # What is written says its own form, so the number that was read is not kept.
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
        return {**super().to_dict(), "model_format": self.form}

    @property
    def form(self) -> int:
        """The oldest form that says all of this configuration, so that older code reads what it can."""
        return 1

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


def check_ranges(config: PreTrainedConfig) -> None:
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


def check_tower(config: PreTrainedConfig) -> None:
    """Raise if the blocks of a transformer cannot be as a configuration says.

    Raises:
        ValueError: a number is out of its range, the heads do not divide the width, or the activation is unknown.
    """
    check_ranges(config)
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


__all__ = ["FlipPreTrainedConfig"]
