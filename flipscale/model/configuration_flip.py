"""The configuration of FLIP models. It describes the weights, never how they are trained."""

from typing import Any, ClassVar, get_origin

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Fields of a tower, in place of those of a named size.
TowerFields = dict[str, Any] | None

# Newest format of the configuration and the weights. It grows when older code would misread a newer folder: a new field
# changes the computation, or weights change their meaning. A file without the number has format 1. Format 2 adds the
# `position_size` of an image tower, format 3 the `projection_hidden_size` of a tower, format 4 its `embedded_by`.
MODEL_FORMAT = 4

# Smallest and largest value of each number. The largest are far above every published model, so that a broken
# configuration is refused before memory is allocated.
RANGES: dict[str, tuple[int, int]] = {
    "hidden_size": (1, 65_536),
    "intermediate_size": (1, 1_048_576),
    "num_hidden_layers": (0, 1_000),
    "num_encoder_layers": (0, 1_000),
    "num_attention_heads": (1, 4_096),
    "projection_dim": (1, 65_536),
    "projection_hidden_size": (1, 1_048_576),
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
    """The base of all configurations.

    It keeps unknown fields, as transformers' configurations do, because quantisers, PEFT and hubs add fields. It
    refuses a file of another model type or of a newer `model_format`.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        # Not kept, because `to_dict` computes it anew.
        kwargs.pop("model_format", None)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration in a file's content, unless of another model type or a newer `model_format`."""
        cls._check_readable(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_own_fields(cls, content: dict[str, Any]) -> Any:
        """Return the configuration in a file's content, reading only the fields of this class.

        Fields that transformers adds are left out: they may name code, kernels and other files to load.
        """
        cls._check_readable(content)
        return cls._checked(cls._own(content))

    @classmethod
    def _own(cls, content: dict[str, Any]) -> dict[str, Any]:
        fields = (name for name, kind in cls.__annotations__.items() if get_origin(kind) is not ClassVar)
        return {name: content[name] for name in fields if name in content}

    @classmethod
    def _checked(cls, fields: dict[str, Any]) -> Any:
        try:
            return cls(**fields)
        except StrictDataclassError as error:  # a field has another type
            raise ValueError(" ".join(str(error).split())) from None

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "model_format": self.required_format}

    @property
    def required_format(self) -> int:
        """Oldest format that expresses this configuration, so that older code can read as many files as possible."""
        return 1

    @classmethod
    def _check_readable(cls, content: dict[str, Any]) -> None:
        if not isinstance(content, dict):
            raise ValueError(f"the config of a {cls.__name__} is {content!r:.40}; expected an object with fields")
        model_type = content.get("model_type") or cls.model_type
        if model_type != cls.model_type:
            raise ValueError(
                f"the config has model_type {model_type!r}, {cls.__name__} reads {cls.model_type!r}; upgrade "
                "flipscale, or load it with its own class"
            )
        model_format = content.get("model_format", 1)
        if not isinstance(model_format, int) or model_format > MODEL_FORMAT:
            raise ValueError(
                f"the config has model_format {model_format}, this {cls.__name__} reads up to {MODEL_FORMAT}; upgrade "
                "flipscale to the version that wrote the model"
            )


def check_ranges(config: PreTrainedConfig) -> None:
    for name, (least, greatest) in RANGES.items():
        value = getattr(config, name, None)
        if value is not None and not least <= value <= greatest:
            raise ValueError(f"{_prefix(config)}{name} is {value}; it must be between {least:,} and {greatest:,}")


def patches_along(image_size: int, patch_size: int) -> int:
    """Return the number of patches along each side of an image; sizes are in pixels."""
    count, rest = divmod(image_size, patch_size)
    if rest or count < 1:
        fitting = " or ".join(str(patch_size * number) for number in (count, count + 1) if number > 0)
        raise ValueError(f"image_size {image_size} is not divisible by patch_size {patch_size}; use {fitting}")
    return count


def check_tower(config: PreTrainedConfig) -> None:
    """Raise a ValueError for numbers out of range, heads that do not divide the width, or an unknown activation."""
    check_ranges(config)
    if (about := getattr(config, "embedded_by", None)) and about.keys() != {"model", "weights_digest"}:
        raise ValueError(f"{_prefix(config)}embedded_by is {about}; it must have a model and its weights_digest")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{_prefix(config)}hidden_size {config.hidden_size} is not divisible by num_attention_heads "
            f"{config.num_attention_heads}"
        )
    for name, least in (("image_mean", 0.0), ("image_std", 1e-9)):
        value, channels = getattr(config, name, 1.0), getattr(config, "num_channels", 3)
        numbers = value if isinstance(value, list | tuple) else [value]
        if len(numbers) not in (1, channels) or not all(least <= number <= 1.0 for number in numbers):
            raise ValueError(
                f"{_prefix(config)}{name} is {value}; it must be one number, or one for each of {channels} channels, "
                f"{'above 0 and at most 1' if least else 'from 0 to 1'}. Divide those of pixels up to 255 by 255"
            )
    from transformers.activations import ACT2FN  # takes seconds to import

    if getattr(config, "hidden_act", "gelu") not in ACT2FN:  # some text encoders of others have another name for it
        raise ValueError(f"hidden_act {config.hidden_act!r} is unknown; use one of {', '.join(sorted(ACT2FN))}")


def _prefix(config: PreTrainedConfig) -> str:
    return f"{config.base_config_key}: " if config.base_config_key else ""


@strict
class FlipVisionConfig(FlipPreTrainedConfig):
    r"""
    The configuration of the image tower; the defaults are B/16.

    The tower is a ViT with fixed 2-D sine-cosine positions, a class token without position, and no norm before the
    blocks. After the last block it takes the mean over all tokens, including the class token.

    Args:
        projection_dim: width of the joint embedding, used by `FlipVisionModelWithProjection` and `FlipModel`.
        projection_hidden_size: width between the two layers of the projection; None for a projection of one layer.
        position_size: side in pixels of the images at which the tower was trained. Their patches have the positions 0,
            1, 2, ... along a side; larger or smaller images are spread over the same extent. None means `image_size`.
        image_mean, image_std: one number per channel, or one for all, on the 0..1 scale. The model applies them to
            uint8 `patches`.
        layer_norm_eps: 1e-6, as in the original JAX code.
        embedded_by: `model`, such as `hf:facebook/dinov3-vitb16-pretrain-lvd1689m`, and its `weights_digest`. A
            `FlipModel` projects this model's features, `hidden_size` wide, and has no tower of its own for them.
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
    image_mean: list[float | int] | tuple[float | int, ...] | float | int = IMAGENET_MEAN
    image_std: list[float | int] | tuple[float | int, ...] | float | int = IMAGENET_STD
    position_size: int | None = None
    projection_hidden_size: int | None = None
    embedded_by: dict[str, str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_tower(self)
        if self.hidden_size % 4 and not self.embedded_by:
            raise ValueError(
                f"vision_config: hidden_size {self.hidden_size} is not divisible by 4, as 2-D positions need"
            )
        self.patches_along()
        if self.position_size is not None and self.position_size % self.patch_size:
            raise ValueError(
                f"position_size {self.position_size} is not divisible by patch_size {self.patch_size}; use the "
                "image_size of the model whose weights are loaded"
            )
        super().__post_init__(**kwargs)

    def patches_along(self, image_size: int | None = None) -> int:
        """Return the number of patches along each side of an image; by default of the model's `image_size`."""
        return patches_along(self.image_size if image_size is None else image_size, self.patch_size)

    @property
    def position_side(self) -> int:
        """Number of patches along the side of an image of `position_size` pixels."""
        return self.patches_along(self.position_size)

    @property
    def required_format(self) -> int:
        return 4 if self.embedded_by else 3 if self.projection_hidden_size else 2 if self.position_size else 1

    @property
    def num_patches(self) -> int:
        return self.patches_along() ** 2

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches' tokens: the class token."""
        return 1


@strict
class FlipTextConfig(FlipPreTrainedConfig):
    r"""
    The configuration of the text tower; the defaults are the original's B/16.

    The tower is a bidirectional pre-norm transformer with learned positions.

    Args:
        attend_to_padding: True as in the original: every caption is padded to `max_position_embeddings`, and attention
            includes the padding. False masks the padding, so its length does not change the embedding.
        pooling: "first" takes the first word piece as in the original, because there is no class token. "mean" averages
            all tokens, or without padding if `attend_to_padding` is False.
        projection_hidden_size, embedded_by: as in `FlipVisionConfig`.
        vocab_size: 30,523 are BERT's 30,522 and one unused row, as in the original's checkpoints.
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
    projection_hidden_size: int | None = None
    embedded_by: dict[str, str] | None = None

    @property
    def required_format(self) -> int:
        return 4 if self.embedded_by else 3 if self.projection_hidden_size else 1

    def __post_init__(self, **kwargs: Any) -> None:
        if self.pooling not in ("first", "mean"):
            raise ValueError(f"text_config: pooling is {self.pooling!r}; use 'first' or 'mean'")
        check_tower(self)
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"text_config: pad_token_id is {self.pad_token_id}; it must be below vocab_size, from 0")
        super().__post_init__(**kwargs)


# Fields that a decoder takes by default from the text tower.
_SHARED_WITH_TEXT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings"),
    *("hidden_act", "layer_norm_eps", "attention_dropout", "pad_token_id"),
)


@strict
class FlipDecoderConfig(FlipPreTrainedConfig):
    r"""
    The configuration of the decoder that writes captions; the defaults are B/16's text tower's and BERT's tokens.

    The decoder is a causal pre-norm transformer with learned positions and cross-attention to the image tower's tokens.

    Args:
        num_encoder_layers: number of layers without a causal mask, of the decoder's width, that the image's tokens pass
            before cross-attention.
        max_position_embeddings: largest number of tokens of a caption, with `bos_token_id` and without the last token.
        bos_token_id, eos_token_id: tokens before the first and after the last word: BERT's [CLS] and [SEP]. With
            `eos_token_id` None, captions go on to the last position.
        mask_token_id: the decoder's input at every position of a caption that is predicted in parallel (CapPa, arXiv
            2306.07915). None for a decoder without parallel prediction.
    """

    model_type = "flip_decoder"
    base_config_key = "decoder_config"

    vocab_size: int = 30523
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 6
    num_encoder_layers: int = 0
    num_attention_heads: int = 8
    max_position_embeddings: int = 32
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float | int = 1e-6
    attention_dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    use_cache: bool = True
    pad_token_id: int = 0
    bos_token_id: int = 101
    eos_token_id: int | None = 102
    mask_token_id: int | None = None

    @classmethod
    def for_text(cls, text: FlipTextConfig, **fields: Any) -> "FlipDecoderConfig":
        """Return the configuration of a decoder with a text tower's width and tokens; `fields` replace others."""
        shared = (name for name in cls.__annotations__ if name in _SHARED_WITH_TEXT)
        return cls._checked({**{name: getattr(text, name) for name in shared}, **fields})

    def __post_init__(self, **kwargs: Any) -> None:
        check_tower(self)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(f"decoder_config: {name} is {value}; it must be below vocab_size, from 0")
        super().__post_init__(**kwargs)


@strict
class FlipAnswerConfig(FlipPreTrainedConfig):
    r"""
    The configuration of the transformer that answers questions from the tokens of both towers.

    The defaults are the paper's, with METER's list of answers to VQAv2.

    Args:
        sees_image: False for a baseline that answers from the question alone.
    """

    model_type = "flip_answer"
    base_config_key = "answer_config"

    num_answers: int = 3129
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 4
    num_attention_heads: int = 12
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float | int = 1e-6
    attention_dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    sees_image: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        check_tower(self)
        super().__post_init__(**kwargs)


@strict
class FlipConfig(FlipPreTrainedConfig):
    r"""
    The configuration of both towers and of the loss parameters.

    Mask ratios are arguments of `forward`, not fields here: a released model must not mask by itself.

    Args:
        text_config: text tower; None for a captioner, which has a decoder instead.
        decoder_config: decoder of a `FlipForConditionalGeneration`, which writes captions.
        answer_config: transformer of a `FlipForQuestionAnswering`, which answers questions.
        projection_dim: width of the joint embedding, set on both towers. None takes that of the towers, if equal.
        logit_scale_init_value: initial `logit_scale`, before the exponential: ln(1/0.07).
        logit_bias_init_value: initial `logit_bias`, which the sigmoid loss adds to every logit; None for none.

    Example:

    ```python
    >>> from flipscale.model import FlipConfig, FlipModel

    >>> model = FlipModel(FlipConfig.from_size("l16"))
    ```"""

    model_type = "flip"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(FlipTextConfig, optional=True),
        "vision_config": FlipVisionConfig,
        "decoder_config": SubConfigSpec(FlipDecoderConfig, optional=True),
        "answer_config": SubConfigSpec(FlipAnswerConfig, optional=True),
    }

    # Arguments may be dicts or None; the attributes are configurations.
    text_config: Any = None
    vision_config: Any = None
    decoder_config: Any = None
    answer_config: Any = None
    projection_dim: int | None = None
    logit_scale_init_value: float | int = 2.6592600369327783
    logit_bias_init_value: float | int | None = None
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None and self.decoder_config is None:
            self.text_config = FlipTextConfig()
        # transformers' `generate` looks at this.
        self.is_encoder_decoder = self.decoder_config is not None
        super().__post_init__(**kwargs)
        check_ranges(self)
        towers = [tower for tower in (self.vision_config, self.text_config) if tower is not None]
        if self.projection_dim is None:
            dims = [tower.projection_dim for tower in towers]
            if dims[0] != dims[-1]:
                raise ValueError(
                    f"projection_dim differs: vision_config has {dims[0]}, text_config has {dims[-1]}; give "
                    "both one value"
                )
            self.projection_dim = dims[0]
        for tower in towers:
            tower.projection_dim = self.projection_dim

    @property
    def caption_config(self) -> FlipTextConfig | FlipDecoderConfig:
        """Configuration that describes captions: the text tower's, or without one the decoder's.

        Both have `vocab_size`, `max_position_embeddings` and `pad_token_id`.
        """
        return self.decoder_config if self.text_config is None else self.text_config

    @property
    def packs_captions(self) -> bool:
        """Whether captions can share a row of the text tower, because none sees its padding."""
        return self.text_config is not None and not self.text_config.attend_to_padding

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Return the configuration for transformers' `generate`: the decoder's, if there is a decoder."""
        if self.decoder_config is not None and not encoder:
            return self.decoder_config
        return super().get_text_config(decoder, encoder)

    def to_diff_dict(self) -> dict[str, Any]:
        # Left out if None, so that the file of a model with two towers is the same as in older versions.
        optional = ("decoder_config", "answer_config")
        content = super().to_diff_dict()
        return {name: value for name, value in content.items() if value is not None or name not in optional}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # transformers sets keywords on the finished configuration, where the towers would keep the old width.
        if "projection_dim" in kwargs:
            config_dict = {**config_dict, "projection_dim": kwargs["projection_dim"]}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def _check_readable(cls, content: dict[str, Any]) -> None:
        super()._check_readable(content)
        for name, part in PARTS:
            part._check_readable(content.get(name) or {})

    @classmethod
    def _own(cls, content: dict[str, Any]) -> dict[str, Any]:
        return {
            **super()._own(content),
            **{name: part._own(content[name]) for name, part in PARTS if content.get(name)},
        }

    def with_parts(self, decoder: dict[str, Any], answers: dict[str, Any]) -> "FlipConfig":
        """Set the decoder and the answering transformer from their fields, None if there are no fields; return self."""
        self.decoder_config = FlipDecoderConfig.for_text(self.text_config, **decoder) if decoder else None
        self.answer_config = FlipAnswerConfig(**answers) if answers else None
        return self

    @classmethod
    def parts(cls, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> dict[str, list[str]]:
        """Return the fields of each part's configuration, without those that transformers adds to all."""
        return {name: list(part.__annotations__) for name, part in PARTS}

    @classmethod
    def from_size(cls, size: str, vision_config: TowerFields = None, text_config: TowerFields = None) -> "FlipConfig":
        """Return the configuration of a named size, a key of `SIZES`, with some fields of its towers replaced."""
        if size not in SIZES:
            raise ValueError(f"model size {size!r} is unknown; use one of {', '.join(SIZES)}")
        vision, text, projection_dim = SIZES[size]
        towers = {
            "vision_config": {**vision, "projection_dim": projection_dim, **(vision_config or {})},
            "text_config": {**text, "projection_dim": projection_dim, **(text_config or {})},
        }
        return cls._checked(towers)


PARTS: tuple[tuple[str, type[FlipPreTrainedConfig]], ...] = (
    ("vision_config", FlipVisionConfig),
    ("text_config", FlipTextConfig),
    ("decoder_config", FlipDecoderConfig),
    ("answer_config", FlipAnswerConfig),
)


def embedded_towers(config: Any) -> dict[str, dict[str, str]]:
    """Return `embedded_by` of each tower that is another library's model, by `vision_model` and `text_model`."""
    towers = {name: getattr(config, f"{name}_config", None) for name in ("vision", "text")}
    found = {f"{name}_model": getattr(tower, "embedded_by", None) for name, tower in towers.items()}
    return {name: about for name, about in found.items() if about is not None}


def tower_size(width: int, layers: int, heads: int, mlp: int | None = None, **fields: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp or 4 * width,
        **fields,
    }


# (image tower, text tower, projection_dim). Widths, layers and heads: paper, Table 9; of l14, Table 2. The paper has no
# G: this G/14 is LAION's, trained with patch dropout.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "b16": (tower_size(768, 12, 12), tower_size(512, 12, 8), 512),
    "l16": (tower_size(1024, 24, 16), tower_size(768, 12, 12), 768),
    "l14": (tower_size(1024, 24, 16, patch_size=14), tower_size(768, 12, 12), 768),
    "h14": (tower_size(1280, 32, 16, patch_size=14), tower_size(1024, 24, 16), 1024),
    "g14": (tower_size(1664, 48, 16, mlp=8192, patch_size=14), tower_size(1280, 32, 20), 1280),
}
