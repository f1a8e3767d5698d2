"""Recipes of the family `clip` or `siglip`: fields that come from the start weights or the tokenizer."""

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flipscale.io.errors import UserError
from flipscale.io.model_folder import TEXTS, fetch_folder, local_folder, read_object
from flipscale.io.yaml_text import read_saved_recipe

if TYPE_CHECKING:
    from flipscale.training.recipe import Recipe

# Name of the original FLIP's tokenizer, the default of `data.tokenizer`.
_BERT = "bert"


def with_start_weights(recipe: "Recipe", fetches: bool) -> "Recipe":
    """Return the recipe with the towers, the normalisation of pixels and the tokenizer of `model.init_from`.

    Fields that the recipe sets stay. A run that began from these weights has all of them, so that its resume needs no
    folder. A name on the Hub is looked up with `fetches` only.

    Raises:
        UserError: the weights are of another family.
        OSError: the Hub cannot be reached.
    """
    model, init_from = recipe.model, str(recipe.model.init_from)
    with suppress(UserError):
        saved = read_saved_recipe(Path(recipe.output_dir) / "recipe.yaml")
        before = saved.get("model")
        if isinstance(before, dict) and before.get("init_from") == init_from:
            towers = {name: {**before[name], **getattr(model, name)} for name in ("vision_config", "text_config")}
            return _with(recipe, towers, saved["data"]["tokenizer"])
    folder = fetch_folder(init_from, TEXTS) if fetches else local_folder(init_from)
    if folder is None:
        return recipe
    kind = read_object(folder / "config.json").get("model_type")
    if kind != model.family:
        fix = f"set model.family to {kind}" if kind in ("flip", "clip", "siglip") else "no model.family starts from it"
        raise UserError(f"model.init_from {init_from!r} has the model_type {kind!r}, not {model.family!r}; {fix}")
    towers = {name: {**fields, **getattr(model, name)} for name, fields in stored_towers(folder).items()}
    return _with(recipe, towers, init_from if local_folder(init_from) is None else str(folder))


def _with(recipe: "Recipe", towers: dict[str, Any], tokenizer: str) -> "Recipe":
    """Return the recipe with these towers, and with this tokenizer in place of the default."""
    model, data = dataclasses.replace(recipe.model, **towers), recipe.data
    if data.tokenizer == _BERT:
        data = dataclasses.replace(data, tokenizer=tokenizer)
    return dataclasses.replace(recipe, model=model, data=data)


def stored_towers(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the fields of `vision_config` and `text_config` in a model folder of the family `clip` or `siglip`.

    Fields that transformers adds to all configurations are left out: they may name code to load.
    """
    from flipscale.model.families import config_class  # imports the models, which takes seconds

    content = read_object(folder / "config.json")
    kind = config_class(content["model_type"])
    towers = {}
    for name, known in kind.parts().items():
        # A file leaves out transformers' defaults, which are not those of our sizes.
        defaults = kind.sub_configs_defaults[name].config_class()
        fields = {**(content.get(name) or {}), **(_pixels(folder) if name == "vision_config" else {})}
        if "projection_dim" in known:  # a CLIPModel's projections have the width that is named outside of the towers
            fields["projection_dim"] = content.get("projection_dim", defaults.projection_dim)
        towers[name] = {key: fields.get(key, getattr(defaults, key)) for key in known}
    return towers


def _pixels(folder: Path) -> dict[str, Any]:
    """Return the mean and standard deviation of a folder's image processor."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            content = read_object(folder / name)
            content = content.get("image_processor", content)
            return {field: content[field] for field in ("image_mean", "image_std") if field in content}
    return {}


def with_tokenizer(recipe: "Recipe") -> "Recipe":
    """Return the recipe with the vocabulary's size and special tokens of a tokenizer that is a folder."""
    if not Path(recipe.data.tokenizer).is_dir():
        return recipe
    from flipscale.data.tokenizers import load_tokenizer, num_entries

    tokenizer = load_tokenizer(recipe.data.tokenizer, 1)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    text = {"vocab_size": num_entries(tokenizer), **ids, **recipe.model.text_config}
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, text_config=text))
