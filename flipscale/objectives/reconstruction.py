"""Reconstruction of the masked patches as a second loss: MAE (arXiv 2111.06377).

FLIP tried it, and was 0.2 and 0.3 points worse (paper, Table 1f). It is off by default, and never exported.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init

from flipscale.io.errors import UserError
from flipscale.model import FlipConfig, FlipModel, FlipPreTrainedModel, FlipVisionConfig
from flipscale.model.modeling_flip import FlipEncoder, sincos_positions
from flipscale.model.patches import complement
from flipscale.objectives.objective import SecondLossOutput, WithSecondLoss, recorded_inputs, watch_gradients

_DECODER_LAYERS = 4


class ReconstructionDecoder(FlipPreTrainedModel):
    """A small transformer that predicts the masked patches' pixels from the image tower's tokens.

    It has half the tower's width, a learned token at every masked position, and fixed position embeddings.
    """

    config: FlipVisionConfig
    input_modalities = ("image",)
    position_embedding: torch.Tensor

    def __init__(self, config: FlipVisionConfig, tower_width: int):
        super().__init__(config)
        self.embed = nn.Linear(tower_width, config.hidden_size)
        self.mask_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.encoder = FlipEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.predict = nn.Linear(config.hidden_size, config.num_channels * config.patch_size**2)
        for name, value in self.fixed_tables().items():
            self.register_buffer(name, value, persistent=False)
        self.post_init()

    @classmethod
    def for_tower(cls, tower: FlipVisionConfig) -> "ReconstructionDecoder":
        config, width = copy.deepcopy(tower), tower.hidden_size // 2
        if width % 4:
            raise UserError(
                f"model.vision_config.hidden_size is {tower.hidden_size}; reconstruction needs a multiple of 8"
            )
        config.hidden_size, config.num_hidden_layers, config.intermediate_size = width, _DECODER_LAYERS, 4 * width
        config.num_attention_heads = next(heads for heads in range(max(width // 64, 1), 0, -1) if width % heads == 0)
        return cls._from_config(config, tower_width=tower.hidden_size)

    def fixed_tables(self) -> dict[str, torch.Tensor]:
        side = self.config.patches_along()
        return {"position_embedding": sincos_positions(self.config.hidden_size, side, side)}

    def positions(self, image_size: int | None) -> torch.Tensor:
        """Return the position embeddings of an image's patches, fp32 `(num_patches, hidden_size)`."""
        side, own = self.config.patches_along(image_size), self.config.patches_along()
        if side == own:
            return self.position_embedding
        return sincos_positions(self.config.hidden_size, side, side, own).to(self.position_embedding)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ReconstructionDecoder):
            init.normal_(module.mask_token, std=0.02)
            init.xavier_uniform_(module.embed.weight)
            init.xavier_uniform_(module.predict.weight)

    def forward(
        self, tokens: torch.Tensor, patch_index: torch.Tensor, masked_index: torch.Tensor, image_size: int | None = None
    ) -> torch.Tensor:
        """Predict the pixels of the masked patches, `(batch, masked, channels * p * p)`, each patch normalised.

        Args:
            tokens: the image tower's output, `(batch, num_prefix_tokens + kept, width)`.
            patch_index, masked_index: positions of the visible patches, `(batch, kept)`, and of the masked patches.
            image_size: side of the image in pixels; by default the model's.
        """
        # A sharded decoder computes in the precision of its weights.
        tokens = self.embed(tokens.to(self.embed.weight.dtype))
        positions = self.positions(image_size).to(tokens.dtype)
        num_prefix = self.config.num_prefix_tokens
        seen = tokens[:, num_prefix:] + positions[patch_index]
        masked = self.mask_token.to(tokens.dtype) + positions[masked_index]
        states = self.encoder(torch.cat([tokens[:, :num_prefix], seen, masked], dim=1))
        return self.predict(self.final_layer_norm(states[:, num_prefix + patch_index.shape[1] :]))


class ReconstructingFlipModel(FlipModel):
    """A `FlipModel` for training whose forward pass also reconstructs masked patches."""

    def __init__(self, config: FlipConfig):
        super().__init__(config)
        self.reconstruction = ReconstructionDecoder.for_tower(config.vision_config)
        self.post_init()

    def forward(self, *inputs: Any, masked_patches: torch.Tensor | None = None, **kwargs: Any) -> SecondLossOutput:
        """
        Args:
            masked_patches: uint8 `(batch, num_patches - kept, channels * p * p)`, the patches that are not in
                `patch_index`, in ascending order.
        """
        with recorded_inputs(self.image_projection) as means:
            output = super().forward(*inputs, **kwargs)
        tokens, squares = watch_gradients(output.vision_model_output.last_hidden_state, means[0])
        image_size = kwargs.get("image_size")
        num_patches = self.config.vision_config.patches_along(image_size) ** 2
        patch_index = kwargs.get("patch_index")
        if masked_patches is None:
            # The decoder runs without masked patches too, because engines expect all gradients in every step.
            patch_index = torch.arange(num_patches, device=tokens.device).expand(len(tokens), -1)
            masked_patches = tokens.new_empty(len(tokens), 0, self.reconstruction.predict.out_features)
        assert patch_index is not None
        patch_index = patch_index.long()
        pixels = self.vision_model.embeddings.normalise(masked_patches)
        predicted = self.reconstruction(tokens, patch_index, complement(patch_index, num_patches), image_size)
        loss = pixel_loss(predicted, pixels)
        return SecondLossOutput(**output, second_losses=loss, gradient_squares=squares)


def pixel_loss(predicted: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of the patches' pixels, fp32 `()`; 0 if there are no patches.

    Each patch is normalised by its own mean and standard deviation.
    """
    centred = pixels.float() - pixels.float().mean(dim=2, keepdim=True)
    deviation = (centred.square().mean(dim=2, keepdim=True) + 1e-6).sqrt()
    squares = (predicted.float() - centred / deviation).square()
    return squares.sum() / max(squares.numel(), 1)


@dataclass(frozen=True, kw_only=True)
class WithReconstruction(WithSecondLoss):
    """Another objective plus `weight` times the reconstruction of the masked patches."""

    second_loss: ClassVar[str] = "reconstruction"
    model_class: ClassVar[type[FlipPreTrainedModel]] = ReconstructingFlipModel
    columns: ClassVar[tuple[str, ...]] = ("masked_patches",)
