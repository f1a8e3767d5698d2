"""Floating-point operations of a pair, counted with the mask on, by running the model without storage."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from flipscale.engines.first_weights import model_without_storage
from flipscale.model import FlipConfig, FlipModel
from flipscale.objectives.objective import Objective
from flipscale.planning.activations import PLAIN, Step, example_batch
from flipscale.training.recipe import Recipe


@dataclass(frozen=True)
class Flops:
    """The matrix products of one image-text pair's forward pass, all its views; a multiply-add is two operations.

    Norms, softmax, GELU, additions, the token look-up and the loss are not counted, as everywhere.

    Args:
        forward: operations of a forward pass.
        modules: those inside each module, by its name, such as `vision_model.embeddings`.
    """

    forward: int
    modules: Mapping[str, int]

    @property
    def training(self) -> int:
        """Operations of a training step: three forward passes. What recomputation repeats is left out. This is a
        permille too many, since nothing needs the gradient of the pixels."""
        return 3 * self.forward


def forward_flops(
    config: FlipConfig,
    mask_ratio: float,
    views: int = 1,
    text_mask_ratio: float = 0.0,
    image_size: int | None = None,
    objective: Objective = PLAIN,
) -> Flops:
    """Return the operations of a pair at `mask_ratio`, its image embedded `views` times, every caption padded to the
    full length before `text_mask_ratio` of its tokens are removed.

    Args:
        image_size: in pixels; left out, the model's own.
        objective: whose model is counted, decoders that are exported and heads included.

    Raises:
        ValueError: a mask ratio is outside [0, 1), or leaves no patch or no token; the patch does not divide the image.
    """
    step = Step(1, mask_ratio, views, text_mask_ratio, image_size=image_size)
    return _counted(
        config.to_json_string(use_diff=False), step, PLAIN if objective.exported_class is FlipModel else objective
    )


@functools.lru_cache(maxsize=64)
def _counted(config: str, step: Step, objective: Objective) -> Flops:
    # transformers asks an attention mask on the meta device for its values, but not a fake one.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model_without_storage(FlipConfig(**json.loads(config)), objective.model_class)
        # torch's counter has no formula for the fused attention of every device.
        model.set_attn_implementation("eager")
        with torch.device("meta"):
            batch = example_batch(model.config, step, objective)
        with torch.no_grad(), FlopCounterMode(display=False, depth=64) as counter:
            model(**batch, image_size=step.image_size, return_logits=False)
    prefix = f"{type(model).__name__}."
    counts = {name.removeprefix(prefix): sum(found.values()) for name, found in counter.flop_counts.items()}
    return Flops(counter.get_total_flops(), counts)


def stage_flops(recipe: Recipe) -> dict[str, Flops]:
    """Return the operations of a pair in each stage of a recipe, by the stage's name."""
    config, objective = recipe.model_config(), recipe.objective()
    return {
        stage.name: forward_flops(
            *(config, stage.mask_ratio, recipe.mask.views_at(stage.mask_ratio), stage.text_mask_ratio),
            *(stage.image_size, objective),
        )
        for stage in recipe.stages
    }


def pair_flops(recipe: Recipe) -> dict[str, int]:
    """Return the operations of a pair's training step in each stage of a recipe, by the stage's name."""
    return {name: flops.training for name, flops in stage_flops(recipe).items()}
