"""The models: what `FlipModel.from_pretrained` loads, here and, with `trust_remote_code`, where flipscale is absent.

The classes are imported, and made known to transformers' Auto classes, when the first is asked for. transformers'
models take seconds to import, and a recipe is read without them: what only reads one imports `.configuration_flip`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_flip import (
        SIZES,
        FlipAnswerConfig,
        FlipConfig,
        FlipDecoderConfig,
        FlipTextConfig,
        FlipVisionConfig,
    )
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
    from .modeling_flip_caption import FlipForConditionalGeneration
    from .modeling_flip_vqa import FlipForQuestionAnswering
    from .processing_flip import FlipProcessor

__all__ = [
    "SIZES",
    "FlipAnswerConfig",
    "FlipConfig",
    "FlipDecoderConfig",
    "FlipForConditionalGeneration",
    "FlipForImageClassification",
    "FlipForQuestionAnswering",
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

_MODULES = (
    "configuration_flip",
    "modeling_flip",
    "modeling_flip_caption",
    "modeling_flip_vqa",
    "processing_flip",
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(".auto_classes", __name__)
    modules = (import_module(f".{module}", __name__) for module in _MODULES)
    return next(vars(module)[name] for module in modules if name in vars(module))
