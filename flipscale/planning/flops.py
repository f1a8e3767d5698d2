"""The batch of a step, and the operations of a pair under its mask, by running the model without storage."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.flop_counter import FlopCounterMode
from transformers.initialization import no_init_weights

from flipscale.engines.first_weights import model_without_storage
from flipscale.engines.trainable import add_lora, freeze
from flipscale.model import FlipConfig, FlipModel
from flipscale.model.patches import num_kept
from flipscale.objectives.build_objective import build_config, build_objective
from flipscale.objectives.contrastive import Contrastive
from flipscale.objectives.objective import Objective
from flipscale.recipe.optim import LoraRecipe, StageRecipe
from flipscale.recipe.recipe import Recipe
from flipscale.recipe.schedule import Stage

# The default objective of a recipe.
PLAIN = Contrastive()


@dataclass(frozen=True)
class StepShape:
    """Everything that decides the activations of one process in a step.

    Args:
        batch_size: pairs in the forward pass.
        bf16: whether matrix products are in bf16; otherwise they are in fp32.
        autocast: whether fp32 weights are cast for each product, as in data parallel and ZeRO; otherwise weights are in
            the precision of the products, as FSDP2 gathers them.
        device_type: `cuda` or `cpu`, which differ in the attention kernel and in autocast's operations.
        added_gradients: share of each fp32 gradient that stays on the process when it is ready; below 0 if a block's
            gradients from earlier passes are then sent away.
        image_size: image size in pixels; None for the model's own.
        frozen: parts of the model without gradients, by name.
        lora: low-rank changes in place of the weights.
        stored: towers whose features are stored, `images` or `texts`, so that they do not run.
    """

    batch_size: int
    mask_ratio: float = 0.0
    views: int = 1
    text_mask_ratio: float = 0.0
    gradient_checkpointing: bool = False
    bf16: bool = True
    autocast: bool = True
    device_type: str = "cuda"
    added_gradients: float = 0.0
    image_size: int | None = None
    frozen: tuple[str, ...] = ()
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    stored: tuple[str, ...] = ()

    def prepare(self, model: nn.Module) -> None:
        with unset_fake_temporarily():  # PEFT cannot move fake tensors
            add_lora(model, self.lora)
        freeze(model, self.frozen)


def example_batch(config: FlipConfig, step: StepShape, objective: Objective = PLAIN) -> dict[str, torch.Tensor]:
    """Return a batch with the loader's columns and shapes."""
    vision, text, decoder = config.vision_config, config.caption_config, config.decoder_config
    num_patches = vision.patches_along(step.image_size) ** 2
    kept = num_kept(num_patches, step.mask_ratio)
    images, pixels = step.batch_size * step.views, vision.num_channels * vision.patch_size**2
    tokens = num_kept(text.max_position_embeddings, step.text_mask_ratio, "tokens")
    batch = {}
    if "images" in step.stored:
        batch["image_features"] = torch.zeros(step.batch_size, vision.hidden_size, dtype=torch.float16)
    else:
        batch["patches"] = torch.zeros(images, kept, pixels, dtype=torch.uint8)
    captions = step.batch_size * objective.captions_per_image
    if "texts" in step.stored:
        batch["text_features"] = torch.zeros(step.batch_size, text.hidden_size, dtype=torch.float16)
    elif objective.takes_text:
        batch["input_ids"] = torch.zeros(captions, tokens, dtype=torch.int64)
        batch["attention_mask"] = torch.ones(captions, tokens, dtype=torch.int64)
    if decoder is not None and decoder.mask_token_id is not None:
        batch["in_parallel"] = torch.ones(step.batch_size, dtype=torch.bool)
    if "labels" in objective.columns:
        batch["labels"] = objective.example_labels(step.batch_size)
    if step.mask_ratio > 0.0:
        batch["patch_index"] = torch.zeros(images, kept, dtype=torch.int16)
        if "masked_patches" in objective.columns:
            batch["masked_patches"] = torch.zeros(images, num_patches - kept, pixels, dtype=torch.uint8)
    if step.text_mask_ratio > 0.0:
        batch["position_ids"] = torch.zeros(captions, tokens, dtype=torch.int64)
    return batch


@dataclass(frozen=True)
class Flops:
    """Matrix products of one image-text pair's forward pass with all its views; a multiply-add is two operations.

    Norms, softmax, GELU, additions, the token look-up and the loss are not counted, by convention.

    Args:
        forward: operations of a forward pass.
        modules: operations by module name, such as `vision_model.embeddings`.
        backward: operations of a backward pass: two forward passes, unless weights are frozen. This is 0.1 % too many,
            because the pixels need no gradient.
    """

    forward: int
    modules: Mapping[str, int]
    backward: int

    @property
    def training(self) -> int:
        return self.forward + self.backward


def forward_flops(config: FlipConfig, step: StepShape, objective: Objective = PLAIN) -> Flops:
    """Return the operations of a pair in a step whose batch is one pair.

    Captions are padded to the full length before `text_mask_ratio` of their tokens is removed. The heads and exported
    decoders of `objective` are counted.
    """
    if objective.exported_class is FlipModel:
        objective = replace(PLAIN, captions_per_image=objective.captions_per_image)
    return _counted(type(config), config.to_json_string(use_diff=False), step, objective)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=64)
def _counted(kind: type[FlipConfig], content: str, step: StepShape, objective: Objective) -> Flops:
    # Fake tensors, because transformers reads the values of attention masks on the meta device.
    with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():
        config = kind(**json.loads(content))
        model = model_without_storage(config, objective.trained_class(config))
        step.prepare(model)
        # Eager, because torch's counter lacks formulas for some fused attention kernels.
        model.set_attn_implementation("eager")
        with torch.device("meta"):
            batch = example_batch(model.config, step, objective)
        is_whole = not step.frozen and step.lora.rank is None
        with torch.set_grad_enabled(not is_whole), FlopCounterMode(display=False, depth=64) as counter:
            output = model(**batch, image_size=step.image_size, return_logits=False)
        prefix, forward = f"{type(model).__name__}.", counter.get_total_flops()
        counts = {name.removeprefix(prefix): sum(by_op.values()) for name, by_op in counter.flop_counts.items()}
        if is_whole:
            return Flops(forward, counts, 2 * forward)
        values = [*objective.loss_inputs(output), *objective.parameters(output).values()]
        loss = objective.per_sample_loss(output) + sum(value.float().sum() for value in values)
        with FlopCounterMode(display=False) as counter:
            loss.backward()
    return Flops(forward, counts, counter.get_total_flops())


def pair_step(recipe: Recipe, stage: StageRecipe | Stage) -> StepShape:
    """Return a stage's step with one pair."""
    return StepShape(
        batch_size=1,
        mask_ratio=stage.mask_ratio,
        views=recipe.mask.views_at(stage.mask_ratio),
        text_mask_ratio=stage.text_mask_ratio,
        image_size=stage.image_size,
        frozen=(*recipe.model.frozen, *stage.frozen),
        lora=recipe.optim.lora,
        stored=tuple(recipe.data.stored),
    )


def stage_flops(recipe: Recipe) -> dict[str, Flops]:
    config, objective = build_config(recipe), build_objective(recipe)
    return {stage.name: forward_flops(config, pair_step(recipe, stage), objective) for stage in recipe.stages}


def pair_flops(recipe: Recipe) -> dict[str, int]:
    return {name: flops.training for name, flops in stage_flops(recipe).items()}


def row_flops(recipe: Recipe) -> dict[str, int]:
    """Return the operations of the text tower in a pair's training step by stage name: a row for each caption."""
    lora, flops = recipe.optim.lora, stage_flops(recipe)

    def passes(frozen: tuple[str, ...]) -> int:
        if "text_model" in frozen or (lora.rank is not None and "text_model" not in lora.towers):
            return 1
        return 3 if lora.rank is None else 2

    return {
        stage.name: passes((*recipe.model.frozen, *stage.frozen)) * flops[stage.name].modules.get("text_model", 0)
        for stage in recipe.stages
    }
