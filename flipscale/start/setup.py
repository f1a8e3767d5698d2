"""The set-up of a run: its recipe, checked, and its data, opened."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from flipscale.data.image_augmentation import Augment
from flipscale.data.loader import StepSampler, check_shared_memory
from flipscale.data.pairs import InputShape, check_kinds, check_masks
from flipscale.data.sources.opening import open_source
from flipscale.data.tokenizers import check_begin_and_end, model_tokenizer
from flipscale.engines.build_engine import engine_class
from flipscale.engines.device import can_compile
from flipscale.engines.launch import Launch
from flipscale.engines.optimizers import layer_scales
from flipscale.engines.trainable import add_lora, freeze
from flipscale.io.errors import UserError
from flipscale.loop.inputs import TrainingSetup, dropout
from flipscale.objectives.build_objective import build_config, build_objective
from flipscale.process.world import place_in_world
from flipscale.recipe.recipe import Recipe
from flipscale.recipe.rules import check_rules
from flipscale.recipe.schedule import Schedule, Stage, schedule_stages
from flipscale.start.precomputed import open_features, open_teacher
from flipscale.start.pretrained_fields import text_rows, warn_of_pixels

if TYPE_CHECKING:
    from flipscale.model import FlipConfig
    from flipscale.objectives.objective import Objective

_log = logging.getLogger(__name__)


def compiles(recipe: Recipe, launch: Launch, device: torch.device | None = None) -> bool:
    """Return whether a run's blocks are compiled on `device`, by default a GPU that has a compiler.

    The towers of other libraries are compiled only if the recipe says so: not each of their blocks is one graph.
    """
    if recipe.model.compile is not None:
        return recipe.model.compile
    if engine_class(launch).refusal(launch, recipe.optim.name, compiles=True) or recipe.model.family == "towers":
        return False
    return device is None or (device.type == "cuda" and can_compile(device))


def check_settings(recipe: Recipe, place: tuple[int, int]) -> tuple[Objective, FlipConfig, list[Stage]]:
    """Check a recipe without its data, and return its objective, its model's configuration and its stages.

    `place` is a rank and the number of processes. Raise UserError if the recipe cannot be run as it stands."""
    check_rules(recipe)
    objective, config = build_objective(recipe), build_config(recipe)
    _check_trained(recipe, objective, config)
    stages = schedule_stages(recipe.stages, recipe.data.global_batch_size, recipe.budget_minutes)
    # Stored features take no masks, and say so when they are opened.
    for stage in () if recipe.data.stored else stages:
        check_masks(InputShape.of(config).at(stage.image_size), stage.mask_ratio, recipe.mask, stage.text_mask_ratio)
    _check_trackers(recipe.log.report_to)
    _check_micro_batches(recipe, config, place)
    return objective, config, stages


def open_setup(recipe: Recipe, is_fresh: bool = False) -> TrainingSetup:
    """Check a recipe and open its data, in each process by itself.

    Args:
        is_fresh: whether the run begins with its start weights, whose vocabulary and pixels then are compared.

    Raises:
        UserError: the recipe cannot be run as it stands.
        OSError: shared memory is full, or a file cannot be fetched.
    """
    data = recipe.data
    objective, config, stages = check_settings(recipe, place_in_world())
    check_shared_memory(data.workers)
    by_kind = [data.captions, *(stage.captions for stage in stages)]
    kinds = dict.fromkeys((kind for shares in by_kind for kind in shares or ()), 1.0)
    source = open_source(replace(data, captions=kinds or None))
    check_kinds(source, list(kinds))
    rank, _ = place_in_world()
    treats_as_negatives = objective.needs_global_batch and recipe.loss.positives == "pairs"
    if 0 < source.num_drawn < data.global_batch_size and rank == 0 and treats_as_negatives:
        _log.warning(
            "data.global_batch_size is %d and there are %d pairs: every batch repeats pairs, which the loss treats as "
            "negatives; use a smaller batch",
            *(data.global_batch_size, source.num_drawn),
        )
    shape = InputShape.of(config)
    tokenizer, rows = open_tokenizer(recipe, objective, config, is_fresh)
    teachers = [open_teacher(recipe, folder, source) for folder in data.teachers]
    features = open_features(recipe, source, config, tokenizer)
    datasets = {
        stage: objective.dataset(
            source, tokenizer, replace(data, captions=stage.captions or data.captions), shape.at(stage.image_size),
            recipe.seed, stage.mask_ratio, recipe.mask, stage.text_mask_ratio,
            drop_path_rate=recipe.model.drop_path_rate, **({"stored": features} if features else {}),
            **({"teachers": teachers} if teachers else {}),
        )
        for stage in stages
    }  # fmt: skip
    budget_seconds = None if recipe.budget_minutes is None else 60.0 * recipe.budget_minutes
    schedule = Schedule(tuple(stages), budget_seconds)
    if is_fresh:
        warn_of_pixels(recipe.model)
    return TrainingSetup(recipe, schedule, source, tokenizer, datasets, objective, config, features, teachers, rows)


def open_tokenizer(
    recipe: Recipe, objective: Objective, config: FlipConfig, is_fresh: bool
) -> tuple[PreTrainedTokenizerBase | None, Mapping[int, int] | None]:
    """Return the tokenizer of the captions, None for an objective without text, and the `text_rows` of a fresh run.
    Raise UserError unless the tokenizer fits the recipe, its model and its start weights."""
    data = recipe.data
    if not objective.takes_text or "texts" in recipe.model.embedded:
        return None, None
    tokenizer = model_tokenizer(data.tokenizer, config.caption_config)
    if data.pack_captions and tokenizer.padding_side != "right":
        raise UserError(
            f"data.pack_captions is true, and data.tokenizer {data.tokenizer!r} pads on the "
            f"{tokenizer.padding_side}; set its padding_side to right, or leave packing out"
        )
    if config.decoder_config is not None:
        check_begin_and_end(tokenizer, config.decoder_config)
    return tokenizer, text_rows(recipe, tokenizer) if is_fresh else None


def _check_trained(recipe: Recipe, objective: Objective, config: FlipConfig) -> None:
    """Raise UserError for parts that the model lacks."""
    from flipscale.engines.first_weights import model_without_storage  # seconds to import, with the models

    lora = recipe.optim.lora
    for stage in recipe.stages:
        if lora.rank is not None or recipe.optim.part_lr_ratios or recipe.model.frozen or stage.frozen:
            model = model_without_storage(config, objective.trained_class(config))
            add_lora(model, lora)
            layer_scales(model, None, ratios=recipe.optim.part_lr_ratios)
            freeze(model, recipe.model.frozen)
            freeze(model, stage.frozen, f"stages.{stage.name}.frozen")


def _check_trackers(names: Sequence[str]) -> None:
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = [str(one) for one in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"log.report_to has {name!r}; use {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name not in installed:
            raise UserError(f"log.report_to has {name!r}, which is not installed; pip install {name}, or leave it out")


def _check_micro_batches(recipe: Recipe, config: FlipConfig, place: tuple[int, int]) -> None:
    data = recipe.data
    divided = f"{place[1]} processes" if place[1] > 1 else ""
    if data.micro_batch_size is not None:
        divided = f"data.micro_batch_size {data.micro_batch_size}"
    for field, rate in dropout(config).items():
        if rate > 0.0 and divided:
            raise UserError(
                f"model.{field} is {rate} with {divided}; expected one process and one pass, because a batch drops "
                f"others if it is divided. Set it to 0. model.drop_path_rate is the same however a batch is divided"
            )
    sampler = StepSampler(0, 0, data.global_batch_size, *place, data.micro_batch_size)
    if data.augment.mixes and sampler.micro_batch_size % 2:
        raise UserError(
            f"data.augment mixes pairs of images; a process takes {sampler.micro_batch_size}, not an even number"
        )
    Augment(data.augment, recipe.seed, config.vision_config.image_size)  # asks timm
