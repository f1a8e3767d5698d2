"""The recipe's `mask` section."""

from dataclasses import dataclass

from flipscale.io.options import Count


@dataclass(frozen=True)
class MaskRecipe:
    """How patches and words are chosen where a stage's mask_ratio or text_mask_ratio is above 0.

    Args:
        kind: How the patches that are removed are chosen: `random`; `grid`, as many in every cell of a regular grid;
            `block`, one window is kept; `centre`, those kept are Gaussian around the middle.
        views: How many masks of one decoded crop are taken that share no patch, each embedded and paired with the
            caption; the text is embedded once.
        text_kind: How the tokens that are removed are chosen: `random`, or `padding_first`, which removes padding
            before any word.
    """

    kind: str = "random"
    views: Count = 1
    text_kind: str = "padding_first"

    def __post_init__(self) -> None:
        from flipscale.data.masks.image import IMAGE_MASKS, check_kind  # with torch, and --help needs none
        from flipscale.data.masks.text import TEXT_MASKS

        check_kind(self.kind, IMAGE_MASKS, "mask.kind")
        check_kind(self.text_kind, TEXT_MASKS, "mask.text_kind")

    def views_at(self, mask_ratio: float) -> int:
        """Return how often an image is embedded: once where nothing is masked, since views share no patch."""
        return self.views if mask_ratio > 0.0 else 1
