"""The families of models: a recipe's `model.family` is a key of `FAMILIES`."""

from importlib import import_module
from typing import Any

# Configuration class of each family, by its module. To add a family, write such a class and name it here.
FAMILIES = {
    "flip": ("configuration_flip", "FlipConfig"),
    "clip": ("masked_families", "MaskedCLIPConfig"),
    "siglip": ("masked_families", "MaskedSiglipConfig"),
    "towers": ("masked_families", "MaskedTowersConfig"),
}
# Families whose folders have another `model_type` than the family's name.
_MODEL_TYPES = {"vision-text-dual-encoder": "towers"}


def config_class(family: str) -> Any:
    """Return the configuration class of a family. All but `flip` import the models, which takes seconds."""
    module, name = FAMILIES[family]
    return getattr(import_module(f".{module}", __package__), name)


def family_of(model_type: object) -> str | None:
    """Return the family of a `model_type` in a config.json, or None."""
    name = _MODEL_TYPES.get(str(model_type), model_type)
    return str(name) if name in FAMILIES else None
