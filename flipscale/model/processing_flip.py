"""The processor of images and texts for FLIP models."""

from typing import Any

from transformers.processing_utils import ProcessingKwargs, ProcessorMixin


class FlipProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": "max_length", "truncation": True}}  # type: ignore[misc]  # noqa: RUF012


class FlipProcessor(ProcessorMixin):
    """An image processor (centre crop of the short side, bicubic, ImageNet mean and std) and a tokenizer.

    The tokenizer's `model_max_length` is the model's; captions are padded to it, as in the original.
    """

    valid_processor_kwargs = FlipProcessorKwargs

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, **kwargs)
