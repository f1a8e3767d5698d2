"""The recipe's section `model`."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from flipscale.io.errors import UserError
from flipscale.io.options import ShareBelowOne

if TYPE_CHECKING:
    from flipscale.model.configuration_flip import FlipConfig


class Towers(NamedTuple):
    """Names of the folders of two towers: paths or Hub names. In family `flip`, a tower that is None is drawn."""

    vision: str
    text: str

    def __str__(self) -> str:
        return f"model.vision {self.vision!r} and model.text {self.text!r}"


def dropout_rates(tower: Mapping[str, Any]) -> dict[str, float]:
    """Return the fields of a tower's configuration that hold a rate of dropout, by name."""
    return {name: rate for name, rate in tower.items() if "drop" in name and isinstance(rate, int | float)}


@dataclass(frozen=True)
class ModelRecipe:
    """The model.

    Args:
        family: The architecture. `flip` is the paper's. `clip` and `siglip` are transformers' CLIPModel and
            SiglipModel, and their exported folders need no code of flipscale. They take all masks of images, but no
            text masks, drop path, decoders or heads. `towers` is the same for their VisionTextDualEncoderModel of
            any two towers, `vision` and `text`.
        size: The size of the two towers. Family `flip` has b16, l16, l14, h14 and g14. `clip` also has s16 and b32.
            `siglip` has s16, b16, l16, so400m14, so400m16 and g16.
        vision_config: Changed fields of the image tower, such as `{image_size: 112}`.
        text_config: Changed fields of the text tower, such as `{num_hidden_layers: 6}`. `vocab_size` defaults to that
            of the start weights, else to the size of a tokenizer in a folder, else to 30,523.
        decoder_config: Changed fields of the caption decoder, which is as wide as the text tower. `bos_token_id` and
            `eos_token_id` default to those of a tokenizer in a folder, else to BERT's [CLS] and [SEP].
        answer_config: Changed fields of the transformer that answers questions (loss.kind answer).
        gradient_checkpointing: Recompute activations: less memory, more time. Does not change what is learned.
        compile: Compile the blocks, which delays the first steps at each mask ratio. By default on GPUs, except with
            ZeRO-3 and in family `towers`. Does not change what is learned.
        init_from: The start weights: a run, a model folder or a Hub name.
        text_positions: Rule for text positions that the start weights lack, if `text_config` sets a larger
            `max_position_embeddings`. `stretched` interpolates all positions linearly. `longclip` keeps the first 20
            and stretches the rest, as LongCLIP does (77 become 248).
        text_rows: `matched` is for another `data.tokenizer` than the start weights'. Each piece keeps its row of the
            embedding table; rows of new pieces are drawn. By default, both vocabularies must be the same.
        vision: The image tower of family `towers`, a folder or a Hub name: a ViT of transformers or timm. Its pixel
            normalisation comes with it. The projections are drawn at random. For family `flip`, a model of flipscale;
            or `hf:NAME`, any image model of transformers or timm, by its stored features (`data.image_features`).
        text: The text tower of family `towers`, a folder or a Hub name: a text encoder, with its tokenizer. For family
            `flip`, a model of flipscale; or `hf:NAME`, any text model of transformers, by its stored features. If you
            name only `vision` or `text`, the other tower is drawn.
        drop_path_rate: Stochastic depth: how often the image tower's last block drops its attention, and separately
            its MLP. The rate grows linearly from 0 at the first block. The paper fine-tunes with 0.2. Exported
            models drop nothing.
        frozen: Parts whose weights stay fixed, by their names in the model, such as `[logit_scale]` (the temperature)
            or `[vision_model, image_projection]`.
    """

    family: Literal["flip", "clip", "siglip", "towers"] = "flip"
    size: str = "b16"
    vision_config: dict[str, Any] = field(default_factory=dict)
    text_config: dict[str, Any] = field(default_factory=dict)
    decoder_config: dict[str, Any] = field(default_factory=dict)
    answer_config: dict[str, Any] = field(default_factory=dict)
    gradient_checkpointing: bool = field(default=False, metadata={"learned": False})
    compile: bool | None = field(default=None, metadata={"learned": False})
    init_from: str | None = field(default=None, metadata={"place": True})
    vision: str | None = field(default=None, metadata={"place": True})
    text: str | None = field(default=None, metadata={"place": True})
    text_positions: Literal["stretched", "longclip"] | None = None
    text_rows: Literal["matched"] | None = None
    drop_path_rate: ShareBelowOne = 0.0
    frozen: list[str] = field(default_factory=list)

    @property
    def embedded(self) -> dict[str, str]:
        """Models of transformers and timm in place of a tower, `hf:NAME`, by tower: `images` and `texts`."""
        names = {"images": self.vision or "", "texts": self.text or ""}
        return {tower: name for tower, name in names.items() if name.startswith("hf:")}

    @property
    def start(self) -> str | Towers | None:
        if self.vision is None and self.text is None:
            return self.init_from
        return Towers(*cast(tuple[str, str], (self.vision, self.text)))

    def config(self) -> "FlipConfig":
        """Return the model's configuration. Raise UserError if the size or a field is unknown, or the patch does not
        divide the image size."""
        from huggingface_hub.errors import StrictDataclassError

        from flipscale.model.families import config_class

        kind = config_class(self.family)
        for section in ("vision_config", "text_config", "decoder_config", "answer_config"):
            # What transformers adds may name code to load.
            known = kind.parts(self.vision_config, self.text_config).get(section, [])
            for name in getattr(self, section):
                if name not in known:
                    near = difflib.get_close_matches(str(name), known, 1)
                    has = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
                    raise UserError(f"model.{section}.{name} is not a field of model.family {self.family}; {has}")
        try:
            config = kind.from_size(self.size, self.vision_config, self.text_config)
            return config.with_parts(self.decoder_config, self.answer_config) if self.family == "flip" else config
        except (StrictDataclassError, ValueError, OverflowError) as error:
            raise UserError(f"model: {' '.join(str(error).split())}") from None
