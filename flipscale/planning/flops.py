"""Floating-point operations of a pair, counted with the mask on."""

from dataclasses import dataclass

from flipscale.model.configuration_flip import FlipConfig, FlipTextConfig, FlipVisionConfig
from flipscale.model.patches import num_kept
from flipscale.training.recipe import Recipe


@dataclass(frozen=True)
class Flops:
    """The matrix products of one image-text pair's forward pass, all its views; a multiply-add is two operations.

    Not counted, as everywhere: norms, softmax, GELU, additions, the token look-up and the loss.

    Args:
        patch_embedding: of the patches that are left.
        image_projections, text_projections: q, k, v, the attention's output and the MLP of all layers.
        image_attention, text_attention: the two products between tokens, of all layers.
        joint_projections: of both towers into the joint embedding.
    """

    patch_embedding: int
    image_projections: int
    image_attention: int
    text_projections: int
    text_attention: int
    joint_projections: int

    @property
    def image(self) -> int:
        """The image tower's share of `forward`, the joint projection left out."""
        return self.patch_embedding + self.image_projections + self.image_attention

    @property
    def text(self) -> int:
        """The text tower's share of `forward`, the joint projection left out."""
        return self.text_projections + self.text_attention

    @property
    def forward(self) -> int:
        """Operations of a forward pass."""
        return self.image + self.text + self.joint_projections

    @property
    def training(self) -> int:
        """Operations of a training step: three forward passes, what a model that is recomputed repeats left out. A
        permille too many, for nothing needs the gradient of the pixels."""
        return 3 * self.forward


def forward_flops(config: FlipConfig, mask_ratio: float, views: int = 1, text_mask_ratio: float = 0.0) -> Flops:
    """The operations of a pair at `mask_ratio`, its image embedded `views` times, every caption padded to the full
    length before `text_mask_ratio` of its tokens are removed.

    Raises:
        ValueError: a mask ratio outside [0, 1), or one that leaves no patch or no token.
    """
    vision: FlipVisionConfig = config.vision_config
    text: FlipTextConfig = config.text_config
    kept = num_kept(vision.num_patches, mask_ratio)
    image_tokens = vision.num_prefix_tokens + kept
    text_tokens = num_kept(text.max_position_embeddings, text_mask_ratio, "tokens")
    pixels = vision.num_channels * vision.patch_size**2
    return Flops(
        patch_embedding=views * 2 * kept * pixels * vision.hidden_size,
        image_projections=views * _projections(vision, image_tokens),
        image_attention=views * _attention(vision, image_tokens),
        text_projections=_projections(text, text_tokens),
        text_attention=_attention(text, text_tokens),
        joint_projections=2 * (views * vision.hidden_size + text.hidden_size) * vision.projection_dim,
    )


def pair_flops(recipe: Recipe) -> dict[str, int]:
    """The operations of a pair's training step in each stage of a recipe, by the stage's name."""
    config = recipe.model.config()
    return {
        stage.name: forward_flops(
            config, stage.mask_ratio, recipe.mask.views_at(stage.mask_ratio), stage.text_mask_ratio
        ).training
        for stage in recipe.stages
    }


def _projections(tower: FlipVisionConfig | FlipTextConfig, tokens: int) -> int:
    weights = 4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.intermediate_size
    return 2 * tokens * weights * tower.num_hidden_layers


def _attention(tower: FlipVisionConfig | FlipTextConfig, tokens: int) -> int:
    return 2 * 2 * tokens**2 * tower.hidden_size * tower.num_hidden_layers
