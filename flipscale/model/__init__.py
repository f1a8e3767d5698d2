"""The models that `FlipModel.from_pretrained` loads, also with `trust_remote_code` where flipscale is not installed.

Classes are imported at first use, because transformers' models take seconds to import. Code that only reads a recipe
imports `.configuration_flip` alone.
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

_MODULES = ("configuration_flip", "modeling_flip", "modeling_flip_caption", "modeling_flip_vqa", "processing_flip")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in _MODULES:
        globals().update({n: v for n, v in vars(import_module(f".{module}", __name__)).items() if n in __all__})
    _register()
    return globals()[name]


def _register() -> None:
    """Register configurations, models and the processor with transformers' Auto classes.

    `save_pretrained` writes this folder's code next to the weights of these classes.
    """
    import transformers

    own = globals()
    for config in (own["FlipConfig"], own["FlipTextConfig"], own["FlipVisionConfig"]):
        transformers.AutoConfig.register(config.model_type, config)
        config.register_for_auto_class("AutoConfig")
    for auto, config, name in (
        ("AutoModel", "FlipConfig", "FlipModel"),
        ("AutoModel", "FlipTextConfig", "FlipTextModel"),
        ("AutoModel", "FlipVisionConfig", "FlipVisionModel"),
        ("AutoModelForImageClassification", "FlipConfig", "FlipForImageClassification"),
        ("AutoModelForImageTextToText", "FlipConfig", "FlipForConditionalGeneration"),
        ("AutoModelForVisualQuestionAnswering", "FlipConfig", "FlipForQuestionAnswering"),
        ("AutoProcessor", "FlipConfig", "FlipProcessor"),
    ):
        getattr(transformers, auto).register(own[config], own[name])
        own[name].register_for_auto_class(auto)
    transformers.AutoModelForZeroShotImageClassification.register(own["FlipConfig"], own["FlipModel"])
