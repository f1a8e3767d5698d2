"""transformers' VisionTextDualEncoderModel with parts that its class lacks.

For text encoders without a pooled output, such as ModernBERT's, a caption is the mean of its tokens. Projections may
have two layers. An exported folder has a copy of this file, which transformers loads with `trust_remote_code=True`.
"""

from typing import Any

import torch
from torch import nn
from transformers import VisionTextDualEncoderModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


def add_parts(model: Any) -> None:
    """Add the parts that the configuration of a VisionTextDualEncoderModel needs."""
    if not hasattr(model.text_model, "pooler"):
        model.text_model.register_forward_pre_hook(_drop_missing, with_kwargs=True)
        model.text_model.register_forward_hook(_add_mean, with_kwargs=True)
    if hidden := getattr(model.config, "projection_hidden_size", None):
        for name in ("visual_projection", "text_projection"):
            one = getattr(model, name)
            layers = nn.Linear(one.in_features, hidden), nn.GELU(), nn.Linear(hidden, one.out_features, bias=False)
            setattr(model, name, nn.Sequential(*layers))


def _add_mean(module: Any, arguments: Any, keywords: dict[str, Any], output: Any) -> BaseModelOutputWithPooling:
    tokens = output.last_hidden_state
    mask = keywords.get("attention_mask")
    weights = torch.ones_like(tokens[:, :, :1]) if mask is None else mask[:, :, None].to(tokens.dtype)
    mean = (tokens * weights).sum(dim=1) / weights.sum(dim=1)
    return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=mean)


def _drop_missing(module: Any, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Leave out arguments that are None: not all text encoders know the names of all."""
    return arguments, {name: value for name, value in keywords.items() if value is not None}


class ExtendedDualEncoderModel(VisionTextDualEncoderModel):
    """A VisionTextDualEncoderModel with these parts, and the same names of all other weights."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        add_parts(self)


ExtendedDualEncoderModel.register_for_auto_class("AutoModel")
