"""Makes configurations, models and the processor known to transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from .configuration_flip import FlipConfig, FlipTextConfig, FlipVisionConfig
from .modeling_flip import FlipForImageClassification, FlipModel, FlipTextModel, FlipVisionModel
from .modeling_flip_caption import FlipForConditionalGeneration
from .modeling_flip_vqa import FlipForQuestionAnswering
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
FlipForQuestionAnswering.register_for_auto_class("AutoModelForVisualQuestionAnswering")
AutoModelForZeroShotImageClassification.register(FlipConfig, FlipModel)
AutoModelForImageClassification.register(FlipConfig, FlipForImageClassification)
AutoModelForImageTextToText.register(FlipConfig, FlipForConditionalGeneration)
AutoModelForVisualQuestionAnswering.register(FlipConfig, FlipForQuestionAnswering)
AutoProcessor.register(FlipConfig, FlipProcessor)
