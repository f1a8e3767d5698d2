"""What a recipe of the family `clip` or `siglip` takes from its start weights or its tokenizer."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flipscale.io.errors import UserError
from flipscale.io.model_folder import fetch_folder, read_object

if TYPE_CHECKING:
    from flipscale.training.recipe import Recipe

# Name of the original FLIP's tokenizer, the default of `data.tokenizer`.
_BERT = "bert"


def with_start_weights(recipe: "Recipe") -> "Recipe":
    """Return the recipe with the towers, the normalisation of pixels and the tokenizer of `model.init_from`.

    Fields that the recipe sets stay. A resolved recipe is complete: a resume reads no folder.

    Raises:
        UserError: the weights are of another family or cannot be trained with masks.
        OSError: the Hub cannot be reached.
    """
    model, folder = recipe.model, fetch_folder(str(recipe.model.init_from))
    kind = read_object(folder / "config.json").get("model_type")
    if kind != model.family:
        raise UserError(
            f"model.init_from {model.init_from!r} is a {kind!r} and model.family is {model.family!r}; "
            + ("set model.family to the same" if kind in ("flip", "clip", "siglip") else "it can start no such model")
        )
    towers = {name: {**fields, **getattr(model, name)} for name, fields in stored_towers(folder).items()}
    tokenizer = str(folder) if recipe.data.tokenizer == _BERT else recipe.data.tokenizer
    data = dataclasses.replace(recipe.data, tokenizer=tokenizer)
    return dataclasses.replace(recipe, model=dataclasses.replace(model, **towers), data=data)


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
