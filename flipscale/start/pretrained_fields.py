"""Fields of a recipe that come from the start weights or the tokenizer."""

import dataclasses
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from flipscale.data.features import read_about
from flipscale.data.tokenizers import begin_and_end, load_tokenizer, num_entries, piece_rows, read_tokenizer
from flipscale.io.errors import UserError, first_line
from flipscale.io.model_folder import TEXTS, fetch_folder, local_folder, pixel_fields, read_object
from flipscale.io.yaml_text import read_saved_recipe
from flipscale.model.configuration_flip import FlipConfig
from flipscale.model.families import config_class, family_of
from flipscale.recipe.data import PRECOMPUTED_TOWERS, DataRecipe
from flipscale.recipe.model import ModelRecipe, Towers
from flipscale.recipe.recipe import Recipe
from flipscale.recipe.rules import check_rules

_log = logging.getLogger(__name__)

_BERT_ENTRIES = 30_522


def with_vocabulary(recipe: Recipe, fetches: bool = False) -> Recipe:
    """Return the recipe with the size of the vocabulary, and with the tokens around learned captions.

    The size is that of the start weights, or else of a tokenizer in a folder. BERT's vocabulary keeps the default size,
    which has one more row, as in the original. Start weights on the Hub are looked up with `fetches` only.

    Raises:
        UserError: the recipe breaks a rule between its fields, or the tokenizer or the start weights cannot be read.
    """
    check_rules(recipe)
    model, folder = recipe.model, recipe.data.tokenizer
    if model.family != "flip":
        return _with_towers(recipe, fetches)
    if model.vision or model.text:
        recipe = _with_towers(recipe, fetches)
        model, folder = recipe.model, recipe.data.tokenizer
    if model.init_from and "vocab_size" not in model.text_config and not model.text_rows:
        size = _vocabulary_of(model.init_from, Path(recipe.output_dir), fetches)
        model = dataclasses.replace(model, text_config={**model.text_config, **size})
        recipe = dataclasses.replace(recipe, model=model)
    takes_size = "vocab_size" not in model.text_config and (model.text_rows or not model.init_from)
    takes_ends = recipe.loss.learns_captions and not {"bos_token_id", "eos_token_id"} <= model.decoder_config.keys()
    if not (takes_size or takes_ends) or not Path(folder).is_dir():
        return recipe
    tokenizer = load_tokenizer(folder, 1)
    entries, ends = num_entries(tokenizer), begin_and_end(tokenizer) if takes_ends else {}
    size = {"vocab_size": entries} if takes_size and entries != _BERT_ENTRIES else {}
    text, decoder = {**model.text_config, **size}, {**ends, **model.decoder_config}
    return dataclasses.replace(recipe, model=dataclasses.replace(model, text_config=text, decoder_config=decoder))


def _with_towers(recipe: Recipe, fetches: bool) -> Recipe:
    """Return a recipe of another family than `flip` with the towers and the tokenizer of its start weights, or without
    them with the special tokens of its tokenizer. Fields that the recipe sets stay."""
    model, tokenizer = recipe.model, recipe.data.tokenizer
    if model.start:
        # A recipe of family `towers` that names the kinds of its towers needs no folder to be planned.
        fetches = fetches or (model.family == "towers" and "model_type" not in model.vision_config)
        towers, own = start_fields(model, Path(recipe.output_dir), fetches, recipe.data.stored)
        tokenizer = own if tokenizer == DataRecipe.tokenizer else tokenizer
        if model.text_rows:
            towers["text_config"] |= tokenizer_fields(tokenizer)
    else:
        towers = {"vision_config": {}, "text_config": tokenizer_fields(tokenizer)}
    fields: dict[str, Any] = {name: {**found, **getattr(model, name)} for name, found in towers.items()}
    data = dataclasses.replace(recipe.data, tokenizer=tokenizer)
    return dataclasses.replace(recipe, model=dataclasses.replace(model, **fields), data=data)


def _vocabulary_of(init_from: str, run_dir: Path, fetches: bool) -> dict[str, Any]:
    """Return the field `vocab_size` of start weights, from the saved recipe, else from `config.json`."""
    content: dict[str, Any] = {}
    with suppress(UserError):
        saved = read_saved_recipe(run_dir / "recipe.yaml").get("model")
        content = saved if isinstance(saved, dict) and saved.get("init_from") == init_from else {}
    try:
        if not content and (folder := fetch_folder(init_from, ["config.json"]) if fetches else local_folder(init_from)):
            content = read_object(folder / "config.json")
    except (UserError, OSError) as error:
        if fetches:
            raise UserError(f"model.init_from {init_from!r} cannot be loaded ({error})") from error
    if (family := family_of(content.get("model_type"))) not in ("flip", None):
        kind = content["model_type"]
        raise UserError(f"model.init_from {init_from!r} has the model_type {kind!r}; set model.family to {family}")
    if any((content.get(f"{name}_config") or {}).get("embedded_by") for name in ("vision", "text")):
        raise UserError(
            f"model.init_from {init_from!r} projects features of other models; name them in model.vision and model.text"
        )
    text, decoder = content.get("text_config"), content.get("decoder_config")
    if isinstance(text, dict) and "vocab_size" in text:
        return {"vocab_size": text["vocab_size"]}
    if not text and isinstance(decoder, dict) and "vocab_size" in decoder:  # a captioner, perhaps with its own row
        return {"vocab_size": decoder["vocab_size"] - (decoder.get("mask_token_id") is not None)}
    return {}


def start_fields(
    model: ModelRecipe, run_dir: Path, fetches: bool, stored: Mapping[str, str]
) -> tuple[dict[str, dict[str, Any]], str]:
    """Return the fields of `vision_config` and `text_config` that start weights have, and the name of their tokenizer.

    A run in `run_dir` that began from these weights has all of it, so that its resume needs no folder. A name on the
    Hub is looked up with `fetches` only; else the fields are empty. `stored` is `DataRecipe.stored`.

    Raises:
        UserError: the weights are of another family.
        OSError: the Hub cannot be reached.
    """
    with suppress(UserError):
        saved = read_saved_recipe(run_dir / "recipe.yaml")
        before = saved.get("model")
        starts = ("init_from", "vision", "text")
        if isinstance(before, dict) and all(before.get(name) == getattr(model, name) for name in starts):
            return {name: before[name] for name in ("vision_config", "text_config")}, saved["data"]["tokenizer"]
    if model.family == "flip":
        towers, tokenizer = _flip_fields(model.vision, model.text, fetches)
        for tower, name in model.embedded.items():
            field = PRECOMPUTED_TOWERS[tower].removesuffix("_model")
            towers[f"{field}_config"] = _embedded_fields(f"model.{field} is {name!r}", name, tower, stored)
        return towers, tokenizer
    if isinstance(start := model.start, Towers):
        from flipscale.engines.pretrained_towers import start_tower_fields as fields_of_towers  # imports the models

        return fields_of_towers(start), str(local_folder(start.text) or start.text)
    init_from = str(model.init_from)
    folder = fetch_folder(init_from, TEXTS) if fetches else local_folder(init_from)
    if folder is None:
        return {"vision_config": {}, "text_config": {}}, init_from
    kind = read_object(folder / "config.json").get("model_type")
    if (family := family_of(kind)) != model.family:
        fix = f"set model.family to {family}" if family else "no model.family starts from it"
        raise UserError(f"model.init_from {init_from!r} has the model_type {kind!r}, not {model.family!r}; {fix}")
    return saved_towers(folder), init_from if local_folder(init_from) is None else str(folder)


def _flip_fields(vision: str | None, text: str | None, fetches: bool) -> tuple[dict[str, dict[str, Any]], str]:
    """Return the fields of the towers of two models of family `flip`, without their projections, and the tokenizer."""
    towers: dict[str, dict[str, Any]] = {"vision_config": {}, "text_config": {}}
    tokenizer = DataRecipe.tokenizer
    for field, name in (("vision", vision), ("text", text)):
        if name is None or name.startswith("hf:"):
            continue
        try:
            folder = local_folder(name)
        except UserError:
            if fetches:
                raise
            continue  # a run that may be there later
        tokenizer = str(folder or name) if field == "text" else tokenizer
        if folder is None and not fetches:
            continue
        folder = folder or fetch_folder(name, TEXTS)
        content = read_object(folder / "config.json")
        if family_of(content.get("model_type")) != "flip" or not content.get(f"{field}_config"):
            kind = content.get("model_type")
            raise UserError(f"model.{field} {name!r} has the model_type {kind!r}; set model.family to towers")
        config = getattr(FlipConfig.from_own_fields(content), f"{field}_config")
        if config.embedded_by:
            raise UserError(
                f"model.{field} {name!r} has no tower of its own; name {config.embedded_by['model']!r} instead"
            )
        known = [key for key in FlipConfig.parts()[f"{field}_config"] if not key.startswith("projection_")]
        towers[f"{field}_config"] = {key: getattr(config, key) for key in known}
    return towers, tokenizer


def _embedded_fields(named: str, name: str, tower: str, stored: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of a tower that is another library's model, from its stored features."""
    about = read_about(Path(stored[tower]))
    if tower not in about or about.get("model") != name:
        had = f"{' and '.join(sorted(about.keys() & PRECOMPUTED_TOWERS.keys()))} of {about.get('model')!r}"
        has = f"has {had if about else 'none'}; expected {tower} of this model. Fix: embed them"
        raise UserError(f"{named} and data.{tower[:-1]}_features {stored[tower]!r} {has}")
    found = about[tower]
    own = {"embedded_by": {"model": name, "weights_digest": found["weights_digest"]}, "hidden_size": found["width"]}
    # Images come from the model's own processor, so here they are one patch.
    sizes = dict.fromkeys(("image_size", "patch_size"), found.get("image_size")) if tower == "images" else {}
    return {**own, **(sizes or {"vocab_size": 1}), "num_hidden_layers": 0, "num_attention_heads": 1}


def saved_towers(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the fields of `vision_config` and `text_config` in a model folder of another family than `flip`.

    Fields that transformers adds to all configurations are left out: they may name code to load.
    """
    content = read_object(folder / "config.json")
    if (family := str(family_of(content["model_type"]))) == "towers":
        from flipscale.engines.pretrained_towers import stored_fields  # imports the models

        return stored_fields(folder, content)
    kind = config_class(family)
    towers = {}
    for name, known in kind.parts({}, {}).items():
        # A file leaves out transformers' defaults, which are not those of our sizes.
        defaults = kind.sub_configs_defaults[name].config_class()
        fields = {**(content.get(name) or {}), **(pixel_fields(folder) if name == "vision_config" else {})}
        if "projection_dim" in known:  # a CLIPModel's projections have the width that is named outside of the towers
            fields["projection_dim"] = content.get("projection_dim", defaults.projection_dim)
        towers[name] = {key: fields.get(key, getattr(defaults, key)) for key in known}
    return towers


def warn_of_pixels(model: ModelRecipe) -> None:
    """Warn if start weights of another family than `flip` do not say a mean and a deviation, so that defaults do."""
    name = model.vision or model.init_from
    if model.family == "flip" or name is None:
        return
    content = read_object((folder := fetch_folder(name, TEXTS)) / "config.json")
    if not pixel_fields(folder) and not {"mean", "std"} <= content.get("pretrained_cfg", content).keys():  # timm's
        own = [f"{field} {list(model.vision_config[field])}" for field in ("image_mean", "image_std")]
        _log.warning("%s has no mean and deviation of its images; they are taken to be %s", name, " and ".join(own))


def text_rows(recipe: Recipe, tokenizer: Any) -> dict[int, int] | None:
    """Return the row of the start weights for each known piece, by its id, if `model.text_rows` is matched; else None.
    Raise UserError if `model.text_rows` is not set, and a piece would take the row of another piece; or it is set, and
    the start weights have no tokenizer."""
    model, name = recipe.model, recipe.model.init_from or recipe.model.text
    if tokenizer is None or name is None:
        return None
    try:
        theirs = read_tokenizer(folder := fetch_folder(name, TEXTS))
    except Exception as error:  # the tokenizers library raises any
        if model.text_rows:
            raise UserError(f"model.text_rows needs the tokenizer of {name} ({first_line(error)})") from error
        _log.warning("the vocabulary of %s cannot be compared with data.tokenizer's (%s)", name, first_line(error))
        return None
    rows, own = piece_rows(tokenizer, theirs), tokenizer.get_vocab()
    if model.text_rows:
        _log.info("model.text_rows: %d of %d pieces have rows in %s, the others are drawn", len(rows), len(own), name)
        return rows
    pieces = {index: piece for piece, index in theirs.get_vocab().items()}
    others = {piece: pieces[index] for piece, index in own.items() if index in pieces and rows.get(index) != index}
    if others:
        piece, there = min(others.items())
        raise UserError(
            f"data.tokenizer {recipe.data.tokenizer!r} has another vocabulary than {name}: {len(others):,} pieces "
            f"would take rows of others, such as {piece!r} that of {there!r}; set data.tokenizer to {str(folder)!r}, "
            "or model.text_rows to matched"
        )
    return None


def tokenizer_fields(folder: str) -> dict[str, Any]:
    """Return the fields of `text_config` that a tokenizer in a folder decides: its size and its special tokens."""
    if not Path(folder).is_dir():
        return {}
    tokenizer = load_tokenizer(folder, 1)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return {"vocab_size": num_entries(tokenizer), **ids}
