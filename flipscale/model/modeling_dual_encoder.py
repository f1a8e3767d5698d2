"""transformers' VisionTextDualEncoderModel for text encoders without a pooled output, such as ModernBERT's.

An exported folder has a copy of this file, which transformers loads with `trust_remote_code=True`.
"""

from typing import Any

import torch
from transformers import VisionTextDualEncoderModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


def _add_mean(module: Any, arguments: Any, keywords: dict[str, Any], output: Any) -> BaseModelOutputWithPooling:
    tokens = output.last_hidden_state
    mask = keywords.get("attention_mask")
    weights = torch.ones_like(tokens[:, :, :1]) if mask is None else mask[:, :, None].to(tokens.dtype)
    mean = (tokens * weights).sum(dim=1) / weights.sum(dim=1)
    return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=mean)


def pool_captions(text_model: Any) -> None:
    """Give the output of a text encoder a `pooler_output`: the mean of its tokens without padding."""
    text_model.register_forward_pre_hook(_drop_missing, with_kwargs=True)
    text_model.register_forward_hook(_add_mean, with_kwargs=True)


def _drop_missing(module: Any, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Leave out arguments that are None: not all text encoders know the names of all."""
    return arguments, {name: value for name, value in keywords.items() if value is not None}


class MeanPooledDualEncoderModel(VisionTextDualEncoderModel):
    """A VisionTextDualEncoderModel with the same names of weights. A caption is the mean of its tokens."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        pool_captions(self.text_model)


MeanPooledDualEncoderModel.register_for_auto_class("AutoModel")
