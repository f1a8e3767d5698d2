"""The bytes of a recipe."""

from contextlib import suppress
from pathlib import Path

from flipscale.objectives.build import build_config, build_objective
from flipscale.recipe.files import RECIPES
from flipscale.recipe.recipe import to_yaml
from flipscale.runs.complete_recipe import parse_recipe
from flipscale.training.schedule import schedule_stages

# Fields that no recipe of the package has.
_OTHERS = (b"""
model: {family: towers, vision: a, text: b, frozen: [logit_scale], text_positions: null}
data: {shards: made, weights: counts, global_batch_size: 16, captions: {alt: 0.3, txt: 0.7}, pack_captions: false}
loss: {kind: sigmoid, positives: equal_captions, options: {}}
optim: {name: muon, part_lr_ratios: {vision_model: 0.1, text_model.encoder: 0.5}, layer_decay: 0.75, ema_decay: 0.99}
stages:
- {name: one, share: 0.5, warmup_share: 0.1, base_lr: 1e-3, image_size: 32, frozen: [vision_model], captions: {alt: 1}}
- {name: two, share: 0.5, gradient_checkpointing: true, text_mask_ratio: 0.5}
budget_minutes: 3
""", b"""
model: {init_from: runs/start, text_positions: longclip, text_config: {max_position_embeddings: 248}}
data: {shards: made, teachers: [a, b], global_batch_size: 16, crop_scale: [0.5, 1.0]}
loss: {teacher_weight: 0.5, teacher_temperature: 0.01}
optim: {lora: {rank: 8, alpha: 16, towers: [vision_model], modules: [q_proj, fc1]}}
stages: [{name: one, samples: 96, base_lr: 1e-3}]
log: {every_share: 0.01}
cost: {device_hour_dollars: 2.5, kwh_co2_grams: 400, pue: 1.2}
""", b"""
data:
  sources: [{shards: a, weights: w, weight: 2}, {dataset: b, caption_columns: [alt, txt], weight: 1}]
  image_features: stored
  global_batch_size: 16
loss: {captions_per_image: 2}
mask: {kind: grid, views: 2, text_kind: random}
stages: [{name: one, samples: 96, base_lr: 1e-3, mask_ratio: 0.5}]
""")  # fmt: skip


def seeds() -> list[bytes]:
    """The recipes of the package, and further fields."""
    return [*(file.read_bytes() for file in sorted(RECIPES.glob("*.yaml"))), *_OTHERS]


def attack(data: bytes, folder: Path) -> None:
    """Parse the recipe, and ask of it what is asked before any data is opened."""
    file = folder / "recipe.yaml"
    file.write_bytes(data)
    with suppress(ValueError, OSError):
        recipe = parse_recipe(["--config", str(file)])
        build_config(recipe)
        build_objective(recipe)
        schedule_stages(recipe.stages, recipe.data.global_batch_size, recipe.budget_minutes)
        to_yaml(recipe)
