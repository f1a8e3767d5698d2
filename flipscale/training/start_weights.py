"""Recipes of the family `clip` or `siglip`: fields that come from the start weights or the tokenizer."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from flipscale.io.errors import UserError
from flipscale.io.model_folder import TEXTS, fetch_folder, local_folder, read_object
from flipscale.io.yaml_text import read_saved_recipe
from flipscale.model.families import FAMILIES, config_class


def start_fields(init_from: str, family: str, run_dir: Path, fetches: bool) -> tuple[dict[str, dict[str, Any]], str]:
    """Return the fields of `vision_config` and `text_config` that start weights have, and the name of their tokenizer.

    A run in `run_dir` that began from these weights has all of it, so that its resume needs no folder. A name on the
    Hub is looked up with `fetches` only; else the fields are empty.

    Raises:
        UserError: the weights are of another family.
        OSError: the Hub cannot be reached.
    """
    with suppress(UserError):
        saved = read_saved_recipe(run_dir / "recipe.yaml")
        model = saved.get("model")
        if isinstance(model, dict) and model.get("init_from") == init_from:
            return {name: model[name] for name in ("vision_config", "text_config")}, saved["data"]["tokenizer"]
    folder = fetch_folder(init_from, TEXTS) if fetches else local_folder(init_from)
    if folder is None:
        return {"vision_config": {}, "text_config": {}}, init_from
    kind = read_object(folder / "config.json").get("model_type")
    if kind != family:
        fix = f"set model.family to {kind}" if kind in FAMILIES else "no model.family starts from it"
        raise UserError(f"model.init_from {init_from!r} has the model_type {kind!r}, not {family!r}; {fix}")
    return stored_towers(folder), init_from if local_folder(init_from) is None else str(folder)


def stored_towers(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the fields of `vision_config` and `text_config` in a model folder of the family `clip` or `siglip`.

    Fields that transformers adds to all configurations are left out: they may name code to load.
    """
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


def tokenizer_fields(folder: str) -> dict[str, Any]:
    """Return the fields of `text_config` that a tokenizer in a folder decides: its size and its special tokens."""
    if not Path(folder).is_dir():
        return {}
    from flipscale.data.tokenizers import load_tokenizer, num_entries

    tokenizer = load_tokenizer(folder, 1)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return {"vocab_size": num_entries(tokenizer), **ids}
