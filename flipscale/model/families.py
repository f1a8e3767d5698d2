"""The families of models: a recipe's `model.family` is a key of `FAMILIES`."""

from importlib import import_module
from typing import Any

# Configuration class of each family, by its module. To add a family, write such a class and name it here.
FAMILIES = {
    "flip": ("configuration_flip", "FlipConfig"),
    "clip": ("masked_clip", "MaskedCLIPConfig"),
    "siglip": ("masked_siglip", "MaskedSiglipConfig"),
}


def config_class(family: str) -> Any:
    """Return the configuration class of a family. All but `flip` import the models, which takes seconds."""
    module, name = FAMILIES[family]
    return getattr(import_module(f".{module}", __package__), name)
