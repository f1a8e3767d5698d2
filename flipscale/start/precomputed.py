"""The precomputed features of a recipe: opened, and refused where they are of other shards or of another model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from flipscale.data.captions import tokenise
from flipscale.data.features import PROBE, PrecomputedFeatures, Teacher, TeacherCrops, read_about
from flipscale.data.samples import Source
from flipscale.data.sources.tar import TarSource
from flipscale.io.digests import weights_digest
from flipscale.io.errors import UserError
from flipscale.recipe.data import PRECOMPUTED_TOWERS
from flipscale.recipe.recipe import Recipe


def open_features(
    recipe: Recipe, source: Source, config: Any, tokenizer: PreTrainedTokenizerBase | None
) -> Mapping[str, PrecomputedFeatures]:
    """Return the precomputed features of each tower that is not run, `images` and `texts`.

    Raises:
        UserError: the features are of another kind, other shards, another image size or other tokens.
            `initial_weights` compares the model.
    """
    opened = {tower: _opened(recipe, tower, source) for tower in recipe.data.stored}
    sizes = {stage.image_size or config.vision_config.image_size for stage in recipe.stages}
    needed: dict[str, tuple[str, Any]] = {"images": ("image_size", sizes), "texts": ("tokens_digest", ())}
    if "texts" in opened and tokenizer is not None:
        tokens = tokenise(tokenizer, [PROBE], config.caption_config.max_position_embeddings)
        needed["texts"] = ("tokens_digest", {weights_digest([tokens["input_ids"]])})
    for tower, features in opened.items():
        name, values = needed[tower]
        found = features.about[tower].get(name)
        if any(found != value for value in values):
            raise UserError(
                f"data.{tower[:-1]}_features {str(features.folder)!r} has the {name} {found}, and this recipe "
                f"{[*values]}; embed by its start weights, and set their tokenizer, and image_size of the stages"
            )
    return opened


def embedded_by(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """Return the folder of each tower's features and the digest of its weights, by its name in the model."""
    about = {tower: read_about(Path(folder))[tower] for tower, folder in recipe.data.stored.items()}
    own = about.keys() - recipe.model.embedded.keys()
    return {PRECOMPUTED_TOWERS[tower]: (recipe.data.stored[tower], about[tower]["weights_digest"]) for tower in own}


def _opened(recipe: Recipe, tower: str, source: Source) -> PrecomputedFeatures:
    folder = recipe.data.stored[tower]
    named = f"data.{tower[:-1]}_features is {folder!r}"
    features = _of_shards(folder, tower, named, source)
    if features.about["features"] != "pooled":
        raise UserError(f"{named}, which has features after the projection; embed with --features pooled")
    return features


def _of_shards(folder: str, tower: str, named: str, source: Source) -> PrecomputedFeatures:
    """Return the features of a tower in a folder that a field names, or raise UserError unless they are of `source`."""
    assert isinstance(source, TarSource), "recipe.rules refuses others"
    features = PrecomputedFeatures(Path(folder), tower, source.shard_sizes)
    about = features.about
    if about["shards_digest"] != source.contents_digest(in_order=True):
        raise UserError(
            f"{named}, which has features of {about['samples']} samples in other shards ({about['shards']}) than "
            f"data.shards {source.list.shards!r} with {len(source)}; embed these shards"
        )
    return features


def open_teacher(recipe: Recipe, folder: str, source: Source) -> Teacher:
    """Return a teacher of a recipe. Raise UserError if it is of other shards, crops or features, or its temperature is
    unknown."""
    named, data = f"data.teachers has {folder!r}", recipe.data
    images, texts = (_of_shards(folder, tower, named, source) for tower in ("images", "texts"))
    about = images.about
    if about["features"] != "embeds" or "crops" not in about["images"]:
        raise UserError(f"{named}, which has no embeddings of crops; embed with --features embeds and --crops 4")
    crops, first = about["images"]["crops"], read_about(Path(data.teachers[0])).get("images", {}).get("crops", {})
    wanted = [("scale", "data.crop_scale", [*data.crop_scale]), ("mirror", "data.mirror", data.mirror)]
    wanted += [(name, f"the teacher {data.teachers[0]!r}", first.get(name)) for name in ("count", "seed")]
    for name, field, value in wanted:
        if crops[name] != value:
            raise UserError(
                f"{named}, whose crops have {name} {crops[name]}, and {field} has {value}; set the field to the "
                "teacher's, or embed again with equal --crop_scale, --no_mirror, --crops and --seed"
            )
    scale = about.get("logit_scale")
    if recipe.loss.teacher_temperature is not None:
        scale = 1 / recipe.loss.teacher_temperature
    if scale is None:
        raise UserError(f"{named}, which has no logit_scale; set loss.teacher_temperature, such as 0.01")
    return Teacher(images, texts, TeacherCrops(**{**crops, "scale": tuple(crops["scale"])}), scale)
