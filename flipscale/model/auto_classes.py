"""The configurations, models and processor, made known to transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from .configuration_flip import SIZES, FlipConfig, FlipDecoderConfig, FlipTextConfig, FlipVisionConfig
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
from .processing_flip import FlipProcessor

for _config, _model in ((FlipConfig, FlipModel), (FlipTextConfig, FlipTextModel), (FlipVisionConfig, FlipVisionModel)):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    # `save_pretrained` writes this folder's code beside the weights.
    _config.register_for_auto_class("AutoConfig")
    _model.register_for_auto_class("AutoModel")
FlipProcessor.register_for_auto_class("AutoProcessor")
FlipForImageClassification.register_for_auto_class("AutoModelForImageClassification")
FlipForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
AutoModelForZeroShotImageClassification.register(FlipConfig, FlipModel)
AutoModelForImageClassification.register(FlipConfig, FlipForImageClassification)
AutoModelForImageTextToText.register(FlipConfig, FlipForConditionalGeneration)
AutoProcessor.register(FlipConfig, FlipProcessor)

__all__ = [
    "SIZES",
    "FlipConfig",
    "FlipDecoderConfig",
    "FlipForConditionalGeneration",
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
