"""The configuration of FLIP models. It describes the weights, never how they are trained."""

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import SubConfigSpec

from .configuration_parts import FlipPreTrainedConfig, check_ranges, check_tower, patches_along

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@strict
class FlipVisionConfig(FlipPreTrainedConfig):
    r"""
    The configuration of the image tower: a ViT with a class token without position, fixed 2-D sine-cosine positions,
    no norm before the blocks, and the mean over all tokens (the class token included) after the last block. The
    defaults are those of B/16.

    Args:
        projection_dim: the width of the joint embedding, used by `FlipVisionModelWithProjection` and `FlipModel`.
        position_size: the side in pixels of the images whose patches have the positions 0, 1, 2, ... along it. The
            patches of larger or smaller ones lie over the same extent: so a tower that was trained at this size reads
            images of `image_size`. None is for `image_size` itself.
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
    position_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_tower(self)
        self.patches_along()
        if self.position_size is not None and self.position_size % self.patch_size:
            raise ValueError(
                f"position_size {self.position_size} is not divisible by patch_size {self.patch_size}; use the "
                "image_size of the model that the weights come from"
            )
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
    def position_side(self) -> int:
        """How many patches lie along the side of an image of `position_size` pixels."""
        return self.patches_along(self.position_size)

    @property
    def form(self) -> int:
        return 1 if self.position_size is None else 2

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
        check_tower(self)
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"text_config: pad_token_id is {self.pad_token_id}; it must be below vocab_size, from 0")
        super().__post_init__(**kwargs)


# What a decoder has of the text tower that it stands beside, unless it is told otherwise.
_OF_THE_TEXT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings"),
    *("hidden_act", "layer_norm_eps", "attention_dropout", "pad_token_id"),
)


@strict
class FlipDecoderConfig(FlipPreTrainedConfig):
    r"""
    The configuration of the decoder that writes captions: a causal pre-norm transformer with learned positions, which
    looks at the tokens of the image tower. The defaults are as wide as the text tower of B/16, with BERT's tokens.

    Args:
        num_encoder_layers: layers without a causal mask that the tokens of the image go through before the decoder sees
            them, in its width.
        max_position_embeddings: the most tokens of a caption; the token before the first counts, the last does not.
        bos_token_id, eos_token_id: the tokens before the first and after the last word: BERT's [CLS] and [SEP]. No last
            one, None, is for captions that go on to the last position.
        mask_token_id: the token that stands in every place of a caption that is predicted at once, in all places
            (CapPa, arXiv 2306.07915). None is for a decoder that never does.
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
    def beside(cls, text: FlipTextConfig, **fields: Any) -> "FlipDecoderConfig":
        """Return a decoder of the width and the tokens of a text tower, with some fields replaced.

        Raises:
            ValueError: a field cannot be so.
        """
        shared = (name for name in cls.__annotations__ if name in _OF_THE_TEXT)
        return cls._built({**{name: getattr(text, name) for name in shared}, **fields})

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
    The configuration of the transformer that answers questions from the tokens of both towers. The defaults are the
    paper's, and METER's list of answers to VQAv2.

    Args:
        num_answers: of the list that an answer is one of.
        sees_image: False is for a model that answers from the question alone, to compare with.
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
    The configuration of both towers and of the loss parameters. Mask ratios are arguments of `forward`, not fields
    here: a released model must not mask by itself.

    Args:
        text_config: None beside a `decoder_config` is for a model that writes captions and has no text tower.
        decoder_config: of a model that writes captions, `FlipForConditionalGeneration`.
        answer_config: of a model that answers questions, `FlipForQuestionAnswering`.
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
        "text_config": SubConfigSpec(FlipTextConfig, optional=True),
        "vision_config": FlipVisionConfig,
        "decoder_config": SubConfigSpec(FlipDecoderConfig, optional=True),
        "answer_config": SubConfigSpec(FlipAnswerConfig, optional=True),
    }

    # Given as configurations, as dicts or not at all; configurations once this object is made.
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
        # With a decoder, `generate` is transformers' for an encoder and a decoder.
        self.is_encoder_decoder = self.decoder_config is not None
        super().__post_init__(**kwargs)
        check_ranges(self)
        towers = [tower for tower in (self.vision_config, self.text_config) if tower is not None]
        if self.projection_dim is None:
            dims = [tower.projection_dim for tower in towers]
            if dims[0] != dims[-1]:
                raise ValueError(
                    f"projection_dim differs: vision_config has {dims[0]}, text_config has {dims[-1]}; "
                    "set projection_dim of FlipConfig for both"
                )
            self.projection_dim = dims[0]
        for tower in towers:
            tower.projection_dim = self.projection_dim

    @property
    def caption_config(self) -> FlipTextConfig | FlipDecoderConfig:
        """What says how captions are given: the text tower's configuration, or the decoder's where there is no text
        tower. Both have `vocab_size`, `max_position_embeddings` and `pad_token_id`."""
        return self.decoder_config if self.text_config is None else self.text_config

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Return what transformers is to generate text by: the decoder's configuration where there is a decoder."""
        if self.decoder_config is not None and not encoder:
            return self.decoder_config
        return super().get_text_config(decoder, encoder)

    def to_diff_dict(self) -> dict[str, Any]:
        found = super().to_diff_dict()
        # The file of a model of two towers is what it was before there were others.
        added = ("decoder_config", "answer_config")
        return {name: value for name, value in found.items() if value is not None or name not in added}

    @classmethod
    def _check_readable(cls, content: dict[str, Any]) -> None:
        super()._check_readable(content)
        for name, part in PARTS:
            part._check_readable(content.get(name) or {})

    @classmethod
    def _own(cls, content: dict[str, Any]) -> dict[str, Any]:
        found = super()._own(content)
        return {**found, **{name: part._own(content[name]) for name, part in PARTS if content.get(name)}}

    def with_parts(self, decoder: dict[str, Any], answers: dict[str, Any]) -> "FlipConfig":
        """Return this configuration with the decoder beside its text tower, and what answers questions, that have these
        fields; without those that have none."""
        self.decoder_config = FlipDecoderConfig.beside(self.text_config, **decoder) if decoder else None
        self.answer_config = FlipAnswerConfig(**answers) if answers else None
        return self

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


PARTS: tuple[tuple[str, type[FlipPreTrainedConfig]], ...] = (
    ("vision_config", FlipVisionConfig),
    ("text_config", FlipTextConfig),
    ("decoder_config", FlipDecoderConfig),
    ("answer_config", FlipAnswerConfig),
)


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

__all__ = ["FlipAnswerConfig", "FlipConfig", "FlipDecoderConfig", "FlipTextConfig", "FlipVisionConfig"]
