"""Which attention kernel is fastest where."""

import torch


def best_attention(device: torch.device) -> str:
    """The name of the transformers attention implementation for `device`."""
    return "eager" if device.type == "cpu" else "sdpa"
