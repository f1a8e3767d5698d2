"""The stored features of a recipe: opened, and refused where they are of other shards or of another model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from flipscale.data.captions import tokenise
from flipscale.data.features import ABOUT, PROBE, StoredFeatures
from flipscale.data.recipe import STORED_TOWERS
from flipscale.data.samples import Source
from flipscale.data.sources.tar import TarSource
from flipscale.io.digests import weights_digest
from flipscale.io.errors import UserError
from flipscale.io.model_folder import read_object
from flipscale.io.options import refuse_set
from flipscale.training.recipe import Recipe


def open_stored(
    recipe: Recipe, source: Source, config: Any, tokenizer: PreTrainedTokenizerBase | None
) -> Mapping[str, StoredFeatures]:
    """Return the stored features of each tower that is not run, `images` and `texts`.

    Raises:
        UserError: a field needs the images or the captions themselves, or the features are of another kind, other
            shards, another image size or other tokens. `initial_weights` compares the model.
    """
    stored = {tower: _opened(recipe, tower, source) for tower in recipe.data.stored}
    needed: dict[str, tuple[str, Any]] = {"images": ("image_size", config.vision_config.image_size)}
    if "texts" in stored and tokenizer is not None:
        tokens = tokenise(tokenizer, [PROBE], config.caption_config.max_position_embeddings)
        needed["texts"] = ("tokens_digest", weights_digest([tokens["input_ids"]]))
    for tower, features in stored.items():
        name, value = needed[tower]
        if (found := features.about[tower].get(name)) != value:
            raise UserError(
                f"{_field(tower)} {str(features.folder)!r} has the {name} {found}, and this recipe's model "
                f"{value}; embed by the folder of the recipe's start weights, and set its tokenizer"
            )
    return stored


def embedded_by(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """Return the folder of each tower's stored features and the digest of its weights, by its name in the model."""
    about = {tower: read_object(Path(folder, ABOUT))[tower] for tower, folder in recipe.data.stored.items()}
    return {STORED_TOWERS[t]: (recipe.data.stored[t], found["weights_digest"]) for t, found in about.items()}


def _field(tower: str) -> str:
    return "data.image_features" if tower == "images" else "data.text_features"


def _opened(recipe: Recipe, tower: str, source: Source) -> StoredFeatures:
    folder = recipe.data.stored[tower]
    named = f"{_field(tower)} is {folder!r}"
    model, data = recipe.model, recipe.data
    fields = ("mask_ratio", "image_size") if tower == "images" else ("captions",)
    others = {f"stages.{stage.name}.{name}": getattr(stage, name) for stage in recipe.stages for name in fields}
    if tower == "images":
        others["model.drop_path_rate"] = model.drop_path_rate
    else:
        others |= {"data.captions": data.captions, "data.pack_captions": data.pack_captions}
        others |= {"model.text_positions": model.text_positions}
        others["loss.positives"] = None if recipe.loss.positives == "pairs" else recipe.loss.positives
        others["loss.captions_per_image"] = recipe.loss.captions_per_image - 1 and recipe.loss.captions_per_image
    refuse_set({**recipe.besides_contrastive(), **others}, f"{named}, so these {tower} are not read")
    start = model.start if isinstance(model.start, str | None) else {"images": model.vision, "texts": model.text}[tower]
    if start is None:
        raise UserError(f"{named} and the tower has no start weights; set model.init_from to the model of the features")
    if not isinstance(source, TarSource):
        raise UserError(f"{named}, which needs whole shards of one source; use data.shards and data.fraction 1")
    features = StoredFeatures(Path(folder), tower, source.shard_sizes)
    about = features.about
    if about["shards_digest"] != source.contents_digest(in_order=True):
        raise UserError(
            f"{named}, which has features of {about['samples']} samples in other shards ({about['shards']}) than "
            f"data.shards {source.list.shards!r} with {len(source)}; embed these shards"
        )
    if about["features"] != "pooled":
        raise UserError(f"{named}, which has features after the projection; embed with --features pooled")
    return features
