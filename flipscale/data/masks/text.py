"""Masks of caption tokens, as pure functions of uniform noise."""

from collections.abc import Callable

import torch

from flipscale.model.patches import num_kept


def uniform(noise: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Score the tokens for a uniform subset."""
    return noise


def padding_first(noise: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Score the tokens so that padding goes before any word, then words at random."""
    return noise + (attention_mask == 0)


# Every `mask.text_kind`: from uniform noise and the attention mask, both `(batch, tokens)`, to scores of the tokens, of
# which the lowest are kept.
TEXT_MASKS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "random": uniform,
    "padding_first": padding_first,
}


def keep_tokens(noise: torch.Tensor, attention_mask: torch.Tensor, mask_ratio: float, kind: str) -> torch.Tensor:
    """Return the tokens left of each caption: int64 `(batch, num_kept)`, ascending (paper, Table 1c).

    Args:
        noise: uniform in [0, 1), `(batch, tokens)`.
        attention_mask: `(batch, tokens)`, 0 for padding.
        mask_ratio: the fraction of all tokens removed, padding counted, in [0, 1).
        kind: one of `TEXT_MASKS`.

    Raises:
        ValueError: `mask_ratio` is outside of [0, 1) or leaves no token.
    """
    kept = num_kept(noise.shape[1], mask_ratio, "tokens")
    scores = TEXT_MASKS[kind](noise, attention_mask)
    return scores.topk(kept, dim=1, largest=False, sorted=False).indices.sort(dim=1).values
