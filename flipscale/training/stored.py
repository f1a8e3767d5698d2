"""The stored features of a recipe: opened, and refused where they are of other shards or of another model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from flipscale.data.captions import tokenise
from flipscale.data.features import ABOUT, PROBE, Features, tokens_digest
from flipscale.data.samples import Source
from flipscale.data.sources.tar import TarSource
from flipscale.io.errors import UserError
from flipscale.io.model_folder import read_object
from flipscale.io.options import refuse_set
from flipscale.training.recipe import Recipe


def open_stored(
    recipe: Recipe, source: Source, config: Any, tokenizer: PreTrainedTokenizerBase | None
) -> Mapping[str, Features]:
    """Return the stored features of each tower that is not run, `images` and `texts`.

    Raises:
        UserError: a field needs the images or the captions themselves, or the features are of another kind, other
            shards, another image size or other tokens. `initial_weights` compares the model.
    """
    stored = {tower: _opened(recipe, tower, source) for tower in recipe.data.stored}
    for tower, features in stored.items():
        about = features.about[tower]
        if tower == "images":
            needed, found = config.vision_config.image_size, about["image_size"]
        else:
            assert tokenizer is not None
            length = config.caption_config.max_position_embeddings
            needed, found = tokens_digest(tokenise(tokenizer, [PROBE], length)["input_ids"]), about.get("tokens_digest")
        if needed != found:
            what = "images of another size" if tower == "images" else "captions by another tokenizer or length"
            raise UserError(
                f"{_field(tower)} {str(features.folder)!r} has features of {what} ({found}) than the recipe's "
                f"({needed}); embed by the folder of the recipe's start weights"
            )
    return stored


def embedded_by(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """Return the folder of the stored features of each tower, by its name in the model, and the digest of its weights
    at that time."""
    return {
        {"images": "vision_model", "texts": "text_model"}[tower]: (
            folder,
            read_object(Path(folder) / ABOUT)[tower]["weights_digest"],
        )
        for tower, folder in recipe.data.stored.items()
    }


def _field(tower: str) -> str:
    return "data.image_features" if tower == "images" else "data.text_features"


def _opened(recipe: Recipe, tower: str, source: Source) -> Features:
    folder = recipe.data.stored[tower]
    named = f"{_field(tower)} is {folder!r}"
    model, data = recipe.model, recipe.data
    by_stage = {f"stages.{stage.name}": stage for stage in recipe.stages}
    if tower == "images":
        others = {f"{name}.mask_ratio": stage.mask_ratio for name, stage in by_stage.items()}
        others |= {f"{name}.image_size": stage.image_size for name, stage in by_stage.items()}
        others |= {"model.drop_path_rate": model.drop_path_rate}
    else:
        others = {f"{name}.captions": stage.captions for name, stage in by_stage.items()}
        others |= {"data.captions": data.captions, "data.pack_captions": data.pack_captions}
        others |= {"model.text_positions": model.text_positions}
        others |= {"loss.positives": recipe.loss.positives if recipe.loss.positives != "pairs" else None}
        others |= {"loss.captions_per_image": recipe.loss.captions_per_image - 1 and recipe.loss.captions_per_image}
    refuse_set({**recipe.besides_contrastive(), **others}, f"{named}, so these {tower} are not read")
    start = model.start if isinstance(model.start, str | None) else {"images": model.vision, "texts": model.text}[tower]
    if start is None:
        raise UserError(f"{named} and the tower has no start weights; set model.init_from to the model of the features")
    if not isinstance(source, TarSource):
        raise UserError(f"{named}, which needs whole shards of one source; use data.shards and data.fraction 1")
    features = Features(Path(folder), tower, source.shard_sizes)
    about = features.about
    if about["shards_digest"] != source.contents_digest():
        raise UserError(
            f"{named}, which has features of {about['samples']} samples in other shards ({about['shards']}) than "
            f"data.shards {source.list.shards!r} with {len(source)}; embed these shards"
        )
    if about["features"] != "pooled":
        raise UserError(f"{named}, which has features after the projection; embed with --features pooled")
    return features
