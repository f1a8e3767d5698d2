"""FLIP models: CLIP whose image encoder sees only the visible patches (arXiv 2212.00794)."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPTextModelOutput, CLIPVisionModelOutput
from transformers.utils import ModelOutput, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_flip import FlipConfig, FlipTextConfig, FlipVisionConfig
from .patches import keep_lowest, num_kept, patchify, take_patches

_log = logging.get_logger(__name__)


@dataclass
class FlipOutput(ModelOutput):
    """
    Args:
        loss: symmetric InfoNCE over the images and texts of this batch, or the sigmoid loss for a model with
            `logit_bias`; None without `return_loss`.
        logits_per_image: `(images, texts)`, `logit_scale` times the cosine, plus `logit_bias` if the model has it;
            `logits_per_text` is its transpose.
        image_embeds, text_embeds: fp32, `(batch, projection_dim)`, of unit length.
        logit_scale: fp32, `(1,)`, the inverse temperature (after the exponential), clipped to [1, 100].
        logit_bias: fp32, `(1,)`; None without `logit_bias_init_value`.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None
    logit_bias: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in (self[k] for k in self.keys()))


# Types of the devices for which one product of three weights and norms in bf16 are faster than their usual forms.
_gpu_types = {"cuda"}


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Compute on a CPU in the forms that GPUs take, which differ by rounding: for plans and tests."""
    _gpu_types.add("cpu")
    try:
        yield
    finally:
        _gpu_types.remove("cpu")


def sincos_positions(width: int, rows: int, columns: int, side: int | None = None) -> torch.Tensor:
    """Return the fixed 2-D position table, fp32 `(rows * columns, width)`.

    The first half of the width encodes the column and the second half the row, each as sines and then cosines.

    Args:
        side: side of the square reference grid, whose patches have the coordinates 0 to `side - 1`. The longer side of
            `rows` x `columns` is stretched over the same extent and the shorter side is centred. A patch then has the
            coordinates of the place that it shows: one that covers four reference patches has their mean. By default
            rows and columns are counted from 0.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))

    def encode(count: int) -> torch.Tensor:
        places = torch.arange(count, dtype=torch.float64)
        if side is not None:
            places = (places + (1 - count) / 2) * (side / max(rows, columns)) + (side - 1) / 2
        angles = places[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()

    by_column = encode(columns)[None, :, :].expand(rows, -1, -1)
    by_row = encode(rows)[:, None, :].expand(-1, columns, -1)
    return torch.cat([by_column, by_row], dim=2).reshape(rows * columns, width)


def normalise_embeds(embeds: torch.Tensor) -> torch.Tensor:
    """Return the embeddings in fp32, each divided by its norm plus 1e-8 as in the original."""
    embeds = embeds.float()
    return embeds / (embeds.norm(dim=-1, keepdim=True) + 1e-8)


def clip_loss(logits_per_image: torch.Tensor) -> torch.Tensor:
    """Return the symmetric InfoNCE loss of one process's square logits, with the positives on the diagonal."""
    target = torch.arange(len(logits_per_image), device=logits_per_image.device)
    by_image = nn.functional.cross_entropy(logits_per_image, target)
    return (by_image + nn.functional.cross_entropy(logits_per_image.t(), target)) / 2


def siglip_loss(logits_per_image: torch.Tensor) -> torch.Tensor:
    """Return the pairwise sigmoid loss of square logits with the positives on the diagonal.

    It is summed over the texts and averaged over the images.
    """
    signs = 2.0 * torch.eye(len(logits_per_image), device=logits_per_image.device) - 1.0
    return -nn.functional.logsigmoid(signs * logits_per_image).sum(dim=1).mean()


class FlipPatchEmbedding(nn.Module):
    """The patch convolution, computed as a matrix product over the visible patches only.

    The weight has the shape of a convolution, `(hidden_size, channels, patch_size, patch_size)`.
    """

    def __init__(self, config: FlipVisionConfig):
        super().__init__()
        self.weight = nn.Parameter(
            torch.zeros(config.hidden_size, config.num_channels, config.patch_size, config.patch_size)
        )
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Map patches `(batch, kept, channels * p * p)` to tokens `(batch, kept, hidden_size)`."""
        return nn.functional.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class FlipVisionEmbeddings(nn.Module):
    """The input tokens of the image tower: the class token, then the visible patches with their positions."""

    position_embedding: torch.Tensor
    pixel_scale: torch.Tensor
    pixel_shift: torch.Tensor

    def __init__(self, config: FlipVisionConfig):
        super().__init__()
        self.config = config
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.patch_embedding = FlipPatchEmbedding(config)
        for name, value in self.fixed_tables().items():
            self.register_buffer(name, value, persistent=False)
        # The last table of another grid, on the device: in each forward pass, the host would wait for its copy there.
        self._last_grid: tuple[tuple[Any, ...], torch.Tensor] | None = None

    def fixed_tables(self) -> dict[str, torch.Tensor]:
        """Compute the buffers from the configuration. They are not saved, so `_init_weights` fills them."""
        config, side = self.config, self.config.patches_along()
        mean = torch.tensor(config.image_mean, dtype=torch.float32)
        std = torch.tensor(config.image_std, dtype=torch.float32)
        return {
            "position_embedding": sincos_positions(config.hidden_size, side, side, config.position_side)[None],
            "pixel_scale": 1.0 / (255.0 * std),
            "pixel_shift": -mean / std,
        }

    def forward(
        self,
        pixel_values: torch.Tensor | None,
        image_mask_ratio: float,
        patches: torch.Tensor | None,
        patch_index: torch.Tensor | None,
        interpolate_pos_encoding: bool,
        image_size: int | None = None,
    ) -> torch.Tensor:
        """Return the tokens `(batch, 1 + kept, hidden_size)`. The arguments are those of `FlipVisionModel.forward`."""
        side = self.config.patches_along(image_size)
        if patches is None:
            if pixel_values is None:
                raise ValueError("pixel_values and patches are both missing; give one of them")
            positions = self._positions_of(pixel_values, image_size, interpolate_pos_encoding)
            patches = patchify(pixel_values, self.config.patch_size)
            if patch_index is None and image_mask_ratio != 0.0:
                rows, columns = (pixels // self.config.patch_size for pixels in pixel_values.shape[-2:])
                noise = torch.rand(len(patches), rows, columns, device=patches.device)
                patch_index = keep_lowest(noise, num_kept(rows * columns, image_mask_ratio))[:, 0]
            if patch_index is not None:
                self._check_index(patch_index, (patches.shape[0], patch_index.shape[-1]))
                patches = take_patches(patches, patch_index)
        else:
            if patches.ndim == 4 and patch_index is not None:
                patches, patch_index = patches.flatten(0, 1), patch_index.flatten(0, 1)
            self._check_patches(patches, patch_index, side**2)
            positions = self.positions(side, side)
        if patches.dtype == torch.uint8:
            patches = self.normalise(patches)
        embeds = self.patch_embedding(patches)
        if patch_index is not None:
            positions = positions[0][patch_index.long()]
        embeds = embeds + positions.to(embeds.dtype)
        # len() would fix the batch size of an exported graph.
        class_embeds = self.class_embedding.to(embeds.dtype).expand(embeds.shape[0], 1, -1)
        return torch.cat([class_embeds, embeds], dim=1)

    def normalise(self, patches: torch.Tensor) -> torch.Tensor:
        """Convert uint8 patches `(batch, kept, channels * p * p)` to fp32, normalised by channel mean and std."""
        by_channel = patches.unflatten(2, (self.config.num_channels, -1)).to(torch.float32, copy=True)
        return by_channel.mul_(self.pixel_scale.view(-1, 1)).add_(self.pixel_shift.view(-1, 1)).flatten(2)

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        """Return the position embeddings of `rows` x `columns` patches: fp32 `(1, rows * columns, hidden_size)`.

        Coordinates are those of the model's own grid.
        """
        config = self.config
        own = self.position_embedding
        if rows == columns == config.patches_along():
            return own
        grid = (rows, columns, own.device, own.dtype)
        if self._last_grid is not None and self._last_grid[0] == grid:
            return self._last_grid[1]
        table = sincos_positions(config.hidden_size, rows, columns, config.position_side)[None].to(own)
        if not torch.compiler.is_compiling():
            self._last_grid = (grid, table)
        return table

    def _check_patches(self, patches: torch.Tensor, patch_index: torch.Tensor | None, num_patches: int) -> None:
        width = self.config.num_channels * self.config.patch_size**2
        if patches.ndim != 3 or patches.shape[2] != width:
            raise ValueError(f"patches has shape {tuple(patches.shape)}; expected (batch, kept, {width})")
        if patch_index is None and patches.shape[1] != num_patches:
            raise ValueError(f"patches has {patches.shape[1]} of {num_patches} patches; give their patch_index")
        if patch_index is not None:
            self._check_index(patch_index, tuple(patches.shape[:2]))

    def _check_index(self, patch_index: torch.Tensor, shape: tuple[int, ...]) -> None:
        if tuple(patch_index.shape) != shape:
            raise ValueError(f"patch_index has shape {tuple(patch_index.shape)}; expected {shape}")
        if patch_index.is_floating_point() or patch_index.dtype == torch.bool:
            raise ValueError(f"patch_index is of {patch_index.dtype}; expected integers, the positions of the patches")

    def _positions_of(self, pixel_values: torch.Tensor, image_size: int | None, interpolate: bool) -> torch.Tensor:
        size, patch, channels = image_size or self.config.image_size, self.config.patch_size, self.config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected (batch, {channels}, height, width)"
            )
        height, width = pixel_values.shape[-2:]
        if (height, width) != (size, size) and not interpolate:
            raise ValueError(
                f"pixel_values are {height}x{width}; expected {size}x{size}. Fix: resize them, pass "
                "interpolate_pos_encoding=True, or load the model with vision_config={'image_size': ..., "
                f"'position_size': {self.config.position_side * patch}}}"
            )
        if height % patch or width % patch:
            raise ValueError(f"pixel_values are {height}x{width}; expected multiples of patch_size {patch}")
        return self.positions(height // patch, width // patch)


class FlipTextEmbeddings(nn.Module):
    """The input tokens of the text tower: word pieces with learned positions."""

    def __init__(self, config: FlipTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        """Map ids `(batch, tokens)` to tokens `(batch, tokens, hidden_size)`; by default positions count from 0."""
        limit = self.position_embedding.num_embeddings
        if input_ids.shape[1] > limit:
            raise ValueError(f"input_ids has {input_ids.shape[1]} tokens; expected at most {limit}. Fix: truncate them")
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        embeds = self.token_embedding(input_ids) + self.position_embedding(position_ids)
        # Else the text tower's residuals would be fp32 under autocast, and the image tower's are bf16.
        return cast_for_products(embeds) if embeds.device.type in _gpu_types else embeds


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    num_returned: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention as two matrix products, which in bf16 on CPUs beat the fused kernel.

    Args:
        query, key, value: `(batch, heads, tokens, width)`.
        attention_mask: added to the scores, `(batch, 1, tokens, tokens)`.
        num_returned: number of leading tokens whose attention weights are returned; by default all.

    Returns:
        The output `(batch, tokens, heads, width)` and the attention weights.
    """
    batch, heads, tokens, width = query.shape
    # Batch and heads are merged once here, because matmul would copy each operand to merge them.
    query, key, value = (states.reshape(batch * heads, -1, width) for states in (query, key, value))
    scores = torch.baddbmm(query.new_empty(1, 1, 1), query, key.transpose(1, 2), beta=0.0, alpha=scaling)
    if attention_mask is not None:
        scores = (scores.view(batch, heads, tokens, -1) + attention_mask).flatten(0, 1)
    # The softmax kernel computes in fp32 and rounds its result.
    weights = nn.functional.softmax(scores, dim=-1).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training).view(batch, heads, tokens, -1)
    returned = weights
    if num_returned is not None:
        # Written back, so that the output depends on the returned part and autograd can compute its gradient.
        returned = weights[..., :num_returned, :num_returned]
        rows = weights[..., :num_returned, :].slice_scatter(returned, -1, 0, num_returned)
        weights = weights.slice_scatter(rows, -2, 0, num_returned)
    output = torch.bmm(weights.flatten(0, 1), value).view(batch, heads, tokens, width)
    return output.transpose(1, 2), returned


def packed_mask(position_ids: torch.Tensor, is_causal: bool, attention: str) -> torch.Tensor:
    """Return the attention mask `(rows, 1, tokens, tokens)` of rows that hold several captions: each sees itself only.

    Args:
        position_ids: `(rows, tokens)`; each caption, and each token of padding, begins at 0.
        attention: transformers' name of the kernel, which takes bool as `sdpa` does, or fp32 that it adds.
    """
    caption = (position_ids == 0).cumsum(1)
    mask = caption[:, None, :, None] == caption[:, None, None, :]
    mask = mask.tril() if is_causal else mask
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min) if attention == "eager" else mask


def cast_for_products(hidden_states: torch.Tensor) -> torch.Tensor:
    """Cast `hidden_states` as autocast does for a matrix product; without autocast, return them unchanged."""
    device_type = hidden_states.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return hidden_states.to(torch.get_autocast_dtype(device_type))
    return hidden_states


class BlockLayerNorm(nn.LayerNorm):
    """The layer norm of a block. On a GPU it stays in bf16 where its input is bf16, and computes in fp32 inside.

    Autocast would cast the input to fp32 and the output back: 20 bytes an element instead of 4. Weights are rounded to
    bf16, as FSDP2 does.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the normalised states in their own type on a GPU, else in autocast's."""
        device, dtype = hidden_states.device.type, hidden_states.dtype
        if device not in _gpu_types or dtype != torch.bfloat16 or self.weight.dtype == dtype:
            return super().forward(hidden_states)
        with torch.autocast(device, enabled=False):
            weight, bias = self.weight.to(dtype), self.bias.to(dtype)
            return nn.functional.layer_norm(hidden_states, self.normalized_shape, weight, bias, self.eps)


def _is_plain(linear: nn.Module) -> bool:
    """Return whether a layer's weight may be used without a call of the layer.

    LoRA replaces the layer, quantisation replaces it or wraps the weight, and ZeRO-3 gathers the weight by a hook.
    """
    wraps = hasattr(linear.weight, "__tensor_flatten__")
    return type(linear) is nn.Linear and not wraps and not linear._forward_pre_hooks


class FlipAttention(nn.Module):
    """Multi-head self-attention with separate query, key and value projections."""

    def __init__(self, config: FlipVisionConfig | FlipTextConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output `(batch, tokens, hidden_size)`, and attention weights if the implementation has them."""
        # Autocast would cast the norm's fp32 output for q, k and v each, and keep three copies for the backward pass.
        hidden_states = cast_for_products(hidden_states)
        output, weights = self._attend(*self._projected(hidden_states), attention_mask, **kwargs)
        return self.out_proj(output.reshape(hidden_states.shape)), weights

    def _projected(self, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """Return query, key and value `(batch, heads, tokens, head_dim)` of the same states.

        On a GPU they are one product of the three weights side by side. On a CPU they stay three, and so does rounding.
        """
        linears = (self.q_proj, self.k_proj, self.v_proj)
        if hidden_states.device.type not in _gpu_types or not all(map(_is_plain, linears)):
            return [self._heads(linear(hidden_states)) for linear in linears]
        weight, bias = (torch.cat([getattr(each, name) for each in linears]) for name in ("weight", "bias"))
        states = nn.functional.linear(hidden_states, weight, bias).unflatten(-1, (3, -1, self.head_dim))
        return [each.transpose(1, 2) for each in states.unbind(2)]

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _attend(self, *states: torch.Tensor | None, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend with `states`: query, key, value and attention mask."""
        kernel = self.config._attn_implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(kernel, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        return attend(self, *states, is_causal=self.is_causal, scaling=self.scaling, dropout=dropout, **kwargs)


class FlipMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: FlipVisionConfig | FlipTextConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.is_tanh_gelu = config.hidden_act == "gelu_pytorch_tanh"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.fc1(hidden_states)
        if self.is_tanh_gelu and hidden_states.dtype == torch.bfloat16 and hidden_states.device.type == "cpu":
            # The exact form replaces the tanh form, which in bf16 on a CPU takes 3 to 5 times as long, a sixth of a
            # training step. They differ by less than 5e-4. This changes the embeddings by 1e-4, relatively; bf16
            # rounding changes them by 4e-3.
            return self.fc2(nn.functional.gelu(hidden_states))
        return self.fc2(self.activation_fn(hidden_states))


class FlipProjection(nn.Module):
    """A projection of two linear layers with an activation between them, or of one, which is then an `nn.Linear`."""

    def __init__(self, config: FlipVisionConfig | FlipTextConfig, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, hidden_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(hidden_size, config.projection_dim, bias=False)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Map `(batch, hidden_size)` to `(batch, projection_dim)`."""
        return self.fc2(self.activation_fn(self.fc1(pooled)))

    @classmethod
    def of(cls, config: FlipVisionConfig | FlipTextConfig) -> Any:
        if config.projection_hidden_size is not None:
            return cls(config, config.projection_hidden_size)
        return nn.Linear(config.hidden_size, config.projection_dim, bias=False)


class EmbeddedTower(nn.Module):
    """The place of a tower that is another library's model, see `FlipVisionConfig.embedded_by`. It has no weights."""

    def forward(self, **inputs: Any) -> NoReturn:
        raise ValueError("this tower is another library's model, embedded_by; call forward with its pooled output")


def projected(projection: nn.Module, features: torch.Tensor) -> Any:
    """Return a tower's output with `pooler_output` projected, from stored features `(batch, width)`."""
    dtype = next(projection.parameters()).dtype
    return BaseModelOutputWithPooling(pooler_output=projection(features.to(dtype)))


def scaled(branch: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return a branch `(batch, tokens, width)` times each sample's scale, in the branch's precision."""
    return branch * scales.to(branch.dtype)[:, None, None]


class FlipEncoderLayer(GradientCheckpointingLayer):
    """One pre-norm transformer block."""

    def __init__(self, config: FlipVisionConfig | FlipTextConfig):
        super().__init__()
        self.layer_norm1 = BlockLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = FlipAttention(config)
        self.layer_norm2 = BlockLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FlipMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        branch_scales: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens `(batch, tokens, width)` after the block.

        Args:
            padding: more tokens that take part in attention. They are returned separately, as the second of a pair.
            branch_scales: `(batch, 2)`, factors of each sample's attention and MLP.
        """
        length = hidden_states.shape[1]
        if padding is not None:
            hidden_states, kwargs["num_returned"] = torch.cat([hidden_states, padding], dim=1), length
        branch = self.self_attn(self.layer_norm1(hidden_states), attention_mask, **kwargs)[0]
        hidden_states = hidden_states + (branch if branch_scales is None else scaled(branch, branch_scales[:, 0]))
        branch = self.mlp(self.layer_norm2(hidden_states))
        hidden_states = hidden_states + (branch if branch_scales is None else scaled(branch, branch_scales[:, 1]))
        return hidden_states if padding is None else (hidden_states[:, :length], hidden_states[:, length:])


class FlipEncoder(nn.Module):
    """The transformer blocks of a tower."""

    def __init__(self, config: FlipVisionConfig | FlipTextConfig):
        super().__init__()
        self.layers = nn.ModuleList([FlipEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        branch_scales: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return all tokens after the last block, `(batch, tokens, width)`, the padding last.

        The hidden states and attention weights that transformers records do not include the padding. `branch_scales`,
        see `FlipEncoderLayer`, are `(batch, blocks, 2)` here, and not together with `padding`.
        """
        if padding is None:
            for number, layer in enumerate(self.layers):
                scales = {} if branch_scales is None else {"branch_scales": branch_scales[:, number]}
                hidden_states = layer(hidden_states, attention_mask, **scales, **kwargs)
            return hidden_states
        for layer in self.layers:
            hidden_states, padding = layer(hidden_states, attention_mask, padding, **kwargs)
        return torch.cat([hidden_states, padding], dim=1)


class FlipPreTrainedModel(PreTrainedModel):
    """The base of all FLIP models: initialisation and loading."""

    config: Any
    config_class = FlipConfig
    base_model_prefix = "flip"
    input_modalities: Any = ("image", "text")
    # Name of the part whose input embeddings are the model's; empty for a part itself.
    embedding_part: ClassVar[str] = ""
    supports_gradient_checkpointing = True
    # Names of modules without weight decay, besides biases and norms, as in the original.
    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"position_embedding"})
    _no_split_modules = ["FlipTextEmbeddings", "FlipVisionEmbeddings", "FlipEncoderLayer", "FlipDecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": FlipEncoderLayer, "attentions": FlipAttention}  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load the model of a folder or Hub name. Weights are read from safetensors, never from a pickle."""
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("use_safetensors is False; a pickle can run code when it is read and is never loaded")
        return super().from_pretrained(pretrained_model_name_or_path, *args, use_safetensors=True, **kwargs)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Set the attention kernel. The configuration of a part that this model lacks, such as a classifier's
        `text_config`, is left alone: transformers would warn of undefined behaviour."""
        if isinstance(attn_implementation, str):
            used = {id(module.config) for module in self.modules() if hasattr(module, "config")}
            parts = (name for name in self.config.sub_configs if id(getattr(self.config, name)) in used)
            attn_implementation = dict.fromkeys(["", *parts], attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        part: Any = getattr(self, self.embedding_part) if self.embedding_part else super()
        return part.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        part: Any = getattr(self, self.embedding_part) if self.embedding_part else super()
        part.set_input_embeddings(value)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Call `_init_weights` for every module.

        In custom code, transformers skips modules without parameters, because that code might overwrite loaded weights.
        The functions of `init` never do, and our tables need to be filled.
        """
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module as the original does.

        Matrices are Xavier-uniform (q, k and v as one). Tokens and positions are normal with standard deviation 0.02.
        """
        super()._init_weights(module)
        for name, value in getattr(module, "fixed_tables", dict)().items():
            init.copy_(getattr(module, name), value)
        if isinstance(module, FlipVisionEmbeddings):
            init.normal_(module.class_embedding, std=0.02)
        elif isinstance(module, FlipPatchEmbedding):
            bound = math.sqrt(6.0 / (module.weight[0].numel() + module.weight.shape[0]))
            init.uniform_(module.weight, -bound, bound)
            init.zeros_(module.bias)
        elif isinstance(module, FlipAttention):
            bound = math.sqrt(6.0 / (4 * module.q_proj.in_features))
            for linear in (module.q_proj, module.k_proj, module.v_proj):
                init.uniform_(linear.weight, -bound, bound)
            init.xavier_uniform_(module.out_proj.weight)
        elif isinstance(module, FlipMLP):
            init.xavier_uniform_(module.fc1.weight)
            init.xavier_uniform_(module.fc2.weight)
        elif isinstance(module, FlipModel):
            for name in module.loss_parameters:
                if getattr(module, name) is not None:
                    init.constant_(getattr(module, name), getattr(module.config, f"{name}_init_value"))
        if isinstance(module, FlipModel | FlipVisionModelWithProjection | FlipTextModelWithProjection):
            projections = (getattr(module, f"{tower}_projection", None) for tower in ("image", "text"))
            for linear in (layer for p in projections if p is not None for layer in p.modules()):
                if isinstance(linear, nn.Linear):
                    init.xavier_uniform_(linear.weight)


class FlipVisionModel(FlipPreTrainedModel):
    """The image tower without its projection. `pooler_output` is the mean over all tokens after the last norm."""

    config: FlipVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    base_model_prefix = "vision_model"
    _input_embed_layer = "patch_embedding"
    # The weights of a FlipModel that do not belong to this tower.
    _keys_to_ignore_on_load_unexpected = [r"^text_", r"^image_projection\.", r"^logit_", r"^(decoder|fusion)\."]  # noqa: RUF012

    def __init__(self, config: FlipVisionConfig):
        super().__init__(config)
        self.embeddings = FlipVisionEmbeddings(config)
        self.encoder = FlipEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        image_mask_ratio: float = 0.0,
        patches: torch.Tensor | None = None,
        patch_index: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        image_size: int | None = None,
        branch_scales: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        r"""
        Encode either whole images or their visible patches.

        Args:
            pixel_values: `(batch, channels, image_size, image_size)`, normalised.
            image_mask_ratio: fraction of the patches of `pixel_values` that is removed at random, in [0, 1).
            patches: `(batch, kept, channels * p * p)`, channel-major like a flattened convolution kernel. uint8 values
                0..255 are normalised here with the configuration's mean and std; floats must be normalised.
            patch_index: integers `(batch, kept)`, the row-major position of each patch. With `pixel_values` it selects
                the patches, and `image_mask_ratio` is not used. Without it, `patches` are the whole image.
            interpolate_pos_encoding: whether to accept `pixel_values` of another size. Their patches get the positions
                of the places that they show, in the coordinates of the model's own grid.
            image_size: side in pixels of the images of `patches`, a multiple of `patch_size`; by default the
                configuration's. For positions see above.
            branch_scales: `(batch, blocks, 2)`, for training with stochastic depth: factors of each block's attention
                and MLP for each image, 0 where they are dropped.

        With several views (masks) of one image, these three have one more dimension, `views`, after `batch`. The output
        has `batch * views` rows; the views of an image are neighbours.
        """
        hidden_states = self.embeddings(
            pixel_values, image_mask_ratio, patches, patch_index, interpolate_pos_encoding, image_size
        )
        if branch_scales is not None:
            branch_scales = branch_scales.flatten(0, -3)
        hidden_states = self.final_layer_norm(self.encoder(hidden_states, branch_scales=branch_scales, **kwargs))
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states.mean(dim=1))


class FlipTextModel(FlipPreTrainedModel):
    """The text tower without its projection. `pooler_output` is the first token after the last norm, or the mean."""

    config: FlipTextConfig
    input_modalities = ("text",)
    base_model_prefix = "text_model"
    _input_embed_layer = "token_embedding"
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"_projection\.", r"^logit_", r"^(decoder|fusion)\."]  # noqa: RUF012

    def __init__(self, config: FlipTextConfig):
        super().__init__(config)
        self.embeddings = FlipTextEmbeddings(config)
        self.encoder = FlipEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        caption_ends: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        r"""
        Encode captions.

        Args:
            input_ids: `(batch, tokens)`, padded on the right. Without `position_ids`, those beyond
                `max_position_embeddings` are cut off with a warning, as the tokenizer cuts them: `eos_token_id` stays.
            attention_mask: `(batch, tokens)`, 1 for the caption's own tokens; by default all that are not
                `pad_token_id`. Not used with `attend_to_padding`: as the original does, shorter `input_ids` are padded
                to the full length here. The embedding is therefore the same at any padded length.
            caption_ends: `(captions,)`, place of a token of each caption in the flat `input_ids`, whose rows then hold
                several captions. `position_ids` begin at 0 for each. Not with `attend_to_padding`.
        """
        if input_ids is None:
            raise ValueError("input_ids is missing")
        full_length = self.config.max_position_embeddings
        if position_ids is None and input_ids.shape[1] > full_length:
            _log.warning_once(f"texts of more than {full_length} tokens are cut; give the tokenizer truncation=True")
            input_ids = input_ids[:, :full_length].clone()
            attention_mask = None if attention_mask is None else attention_mask[:, :full_length]
            if isinstance(self.config.eos_token_id, int):
                input_ids[input_ids[:, -1] != self.config.pad_token_id, -1] = self.config.eos_token_id
        length = input_ids.shape[1]
        if self.config.attend_to_padding:
            attention_mask = None
            if position_ids is None and length < full_length:
                input_ids = nn.functional.pad(input_ids, (0, full_length - length), value=self.config.pad_token_id)
        elif attention_mask is None:
            attention_mask = torch.ne(input_ids, self.config.pad_token_id).long()
        if caption_ends is not None and position_ids is not None:
            attention_mask = packed_mask(position_ids, False, cast(str, self.config._attn_implementation))
        hidden_states = self.embeddings(input_ids, position_ids)
        # A batch without padding needs no mask. Only a CPU checks that, because on an accelerator the host would wait.
        may_skip = attention_mask is None or attention_mask.device.type == "cpu"
        layer_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            allow_is_bidirectional_skip=may_skip,
        )
        padding = hidden_states[:, length:] if hidden_states.shape[1] > length else None
        hidden_states = self.encoder(hidden_states[:, :length], layer_mask, padding, **kwargs)
        hidden_states = self.final_layer_norm(hidden_states)
        if caption_ends is not None and position_ids is not None:
            pooled = self._pool_packed(hidden_states, position_ids, caption_ends)
        else:
            pooled = self._pool(hidden_states, attention_mask)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states[:, :length], pooler_output=pooled)

    def _pool_packed(self, tokens: torch.Tensor, position_ids: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        if self.config.pooling == "first":
            return tokens.flatten(0, 1).index_select(0, ends - position_ids.flatten()[ends])
        together = packed_mask(position_ids, False, "sdpa")[:, 0].to(tokens.dtype)
        return ((together @ tokens) / together.sum(dim=2, keepdim=True)).flatten(0, 1).index_select(0, ends)

    def _pool(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if self.config.pooling == "first":
            return hidden_states[:, 0]
        if attention_mask is None:
            return hidden_states.mean(dim=1)
        weights = attention_mask.to(hidden_states.dtype)[:, :, None]
        return (hidden_states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)


class FlipVisionModelWithProjection(FlipPreTrainedModel):
    """The image tower and its projection. `image_embeds` are not normalised."""

    config: FlipVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    embedding_part = "vision_model"
    _keys_to_ignore_on_load_unexpected = [r"^text_", r"^logit_"]  # noqa: RUF012

    def __init__(self, config: FlipVisionConfig):
        super().__init__(config)
        self.vision_model = FlipVisionModel._from_config(config)
        self.image_projection = FlipProjection.of(config)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor | None = None, **kwargs: Any) -> CLIPVisionModelOutput:
        """Encode and project images. The arguments are those of `FlipVisionModel.forward`."""
        output = self.vision_model(pixel_values=pixel_values, **kwargs)
        return CLIPVisionModelOutput(
            image_embeds=self.image_projection(output.pooler_output),
            last_hidden_state=output.last_hidden_state,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class FlipTextModelWithProjection(FlipPreTrainedModel):
    """The text tower and its projection. `text_embeds` are not normalised."""

    config: FlipTextConfig
    input_modalities = ("text",)
    embedding_part = "text_model"
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^image_projection\.", r"^logit_", r"^(decoder|fusion)"]  # noqa: RUF012

    def __init__(self, config: FlipTextConfig):
        super().__init__(config)
        self.text_model = FlipTextModel._from_config(config)
        self.text_projection = FlipProjection.of(config)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> CLIPTextModelOutput:
        """Encode and project captions. The arguments are those of `FlipTextModel.forward`."""
        output = self.text_model(input_ids=input_ids, **kwargs)
        return CLIPTextModelOutput(
            text_embeds=self.text_projection(output.pooler_output),
            last_hidden_state=output.last_hidden_state,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class FlipModel(FlipPreTrainedModel):
    """Both towers, their projections and the parameters of the loss."""

    config: FlipConfig
    embedding_part = "text_model"
    # Parameters of the loss, and whether weight decay applies to them, as in the original and in SigLIP. The model has
    # the parameters with an initial value in the configuration, `NAME_init_value`. The output of `forward` has a field
    # of each name.
    loss_parameters: ClassVar[dict[str, bool]] = {"logit_scale": True, "logit_bias": False}
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None
    vision_model: Any
    text_model: Any

    def __init__(self, config: FlipConfig):
        if config.text_config is None:
            raise ValueError("the config has no text_config; load this captioner as a FlipForConditionalGeneration")
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.vision_model = EmbeddedTower() if vision.embedded_by else FlipVisionModel._from_config(vision)
        self.text_model = EmbeddedTower() if text.embedded_by else FlipTextModel._from_config(text)
        self.image_projection = FlipProjection.of(vision)
        self.text_projection = FlipProjection.of(text)
        for name in self.loss_parameters:
            missing = getattr(config, f"{name}_init_value", None) is None
            # Shape (1,): a 0-d parameter cannot be sharded.
            setattr(self, name, None if missing else nn.Parameter(torch.zeros(1)))
        self.post_init()
        # Replaces the union of the towers' lists, because each list names the other tower's weights.
        self._keys_to_ignore_on_load_unexpected = {r"^(decoder|fusion)\."}

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return the image tower's output with `pooler_output` projected to `(batch, projection_dim)`, not normalised.

        The arguments are those of `FlipVisionModel.forward`.
        """
        output = self.vision_model(pixel_values=pixel_values, **kwargs)
        output.pooler_output = self.image_projection(output.pooler_output)
        return output

    @can_return_tuple
    def get_text_features(self, input_ids: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return the text tower's output with `pooler_output` projected to `(batch, projection_dim)`, not normalised.

        The arguments are those of `FlipTextModel.forward`.
        """
        output = self.text_model(input_ids=input_ids, **kwargs)
        output.pooler_output = self.text_projection(output.pooler_output)
        return output

    def loss_values(self) -> dict[str, torch.Tensor]:
        """Return the values of the loss parameters, fp32 `(1,)`, as in `FlipOutput`."""
        # The parameter itself is not clipped: it may drift past ln(100), where its gradient is zero.
        values = {"logit_scale": self.logit_scale.float().clamp(0.0, math.log(100.0)).exp()}
        if self.logit_bias is not None:
            # A copy, because ZeRO-3 takes a parameter that is returned for one of the caller's.
            values["logit_bias"] = self.logit_bias.to(torch.float32, copy=True)
        return values

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        return_logits: bool = True,
        image_mask_ratio: float = 0.0,
        patches: torch.Tensor | None = None,
        patch_index: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        image_size: int | None = None,
        branch_scales: torch.Tensor | None = None,
        caption_ends: torch.Tensor | None = None,
        on_texts: Callable[[torch.Tensor], None] | None = None,
        image_features: torch.Tensor | None = None,
        text_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> FlipOutput | BaseModelOutputWithPooling:
        r"""
        Embed images and captions and compare them. Without captions, return `get_image_features`, because
        transformers' pipeline `image-feature-extraction` calls a model this way.

        Args:
            input_ids, attention_mask, position_ids, caption_ends: see `FlipTextModel.forward`.
            pixel_values, kwargs: images, see `FlipVisionModel.forward`.
            return_loss: whether to compute the loss of this batch. Training computes its own over all processes
                (`flipscale.objectives`).
            return_logits: False skips the `(images, texts)` matrix, which training does not need.
            on_texts: function that is called with `text_embeds` before the images are encoded.
            image_features, text_features: `(batch, width)`, what a tower gave earlier, in place of its input.
        """
        is_of_images = input_ids is None and attention_mask is None and text_features is None and not return_loss
        if text_features is not None:
            text_output = projected(self.text_projection, text_features)
        elif not is_of_images:
            packed = {} if caption_ends is None else {"caption_ends": caption_ends}
            text_output = self.get_text_features(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **packed, **kwargs
            )
        if not is_of_images:
            text_embeds = normalise_embeds(text_output.pooler_output)
            if on_texts is not None:
                on_texts(text_embeds)
        if image_features is not None:
            image_output = projected(self.image_projection, image_features)
        else:
            image_output = self.get_image_features(
                pixel_values=pixel_values,
                image_mask_ratio=image_mask_ratio,
                patches=patches,
                patch_index=patch_index,
                interpolate_pos_encoding=interpolate_pos_encoding,
                image_size=image_size,
                branch_scales=branch_scales,
                **kwargs,
            )
        if is_of_images:
            return image_output
        image_embeds = normalise_embeds(image_output.pooler_output)
        loss_values = self.loss_values()
        logit_scale, logit_bias = loss_values["logit_scale"], loss_values.get("logit_bias")
        logits = logit_scale * image_embeds @ text_embeds.t() if return_logits or return_loss else None
        if logits is not None and logit_bias is not None:
            logits = logits + logit_bias
        loss_of = clip_loss if logit_bias is None else siglip_loss
        return FlipOutput(
            loss=loss_of(logits) if return_loss and logits is not None else None,
            logits_per_image=logits,
            logits_per_text=None if logits is None else logits.t(),
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            text_model_output=text_output,
            vision_model_output=image_output,
        )


class FlipForImageClassification(FlipPreTrainedModel):
    """The image tower and a linear classifier of `num_labels` classes on its `pooler_output`.

    Loaded from the folder of a `FlipModel`, it has that model's image tower and a new classifier.
    """

    config: FlipConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    embedding_part = "vision_model"
    _keys_to_ignore_on_load_unexpected = [r"^text_", r"^image_projection\.", r"^logit_", r"^(decoder|fusion)\."]  # noqa: RUF012

    def __init__(self, config: FlipConfig):
        super().__init__(config)
        self.vision_model = FlipVisionModel._from_config(config.vision_config)
        self.classifier = nn.Linear(config.vision_config.hidden_size, cast(int, config.num_labels))
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor | None = None, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        r"""
        Classify images. The other arguments are those of `FlipVisionModel.forward`.

        Args:
            labels: `(batch,)` class numbers for a cross-entropy `loss`; floats for a regression loss if `num_labels` is
                1; `(batch, num_labels)` floats for several labels of an image.
        """
        output = self.vision_model(pixel_values=pixel_values, **kwargs)
        logits = self.classifier(output.pooler_output)
        return ImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
