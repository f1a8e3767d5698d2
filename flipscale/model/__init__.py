"""The models: what `FlipModel.from_pretrained` loads, here and, with `trust_remote_code`, where flipscale is absent.

The classes are imported when the first of them is asked for: transformers takes seconds to import, and a recipe is read
without a model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .configuration_flip import SIZES, FlipConfig, FlipTextConfig, FlipVisionConfig

if TYPE_CHECKING:
    from .modeling_flip import (
        FlipForImageClassification,
        FlipModel,
        FlipOutput,
        FlipPreTrainedModel,
        FlipTextModel,
        FlipTextModelWithProjection,
        FlipVisionModel,
        FlipVisionModelWithProjection,
    )
    from .processing_flip import FlipProcessor

__all__ = [
    "SIZES",
    "FlipConfig",
    "FlipForImageClassification",
    "FlipModel",
    "FlipOutput",
    "FlipPreTrainedModel",
    "FlipProcessor",
    "FlipTextConfig",
    "FlipTextModel",
    "FlipTextModelWithProjection",
    "FlipVisionConfig",
    "FlipVisionModel",
    "FlipVisionModelWithProjection",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".auto_classes", __name__), name)
