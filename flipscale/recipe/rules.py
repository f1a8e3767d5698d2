"""The rules between fields of a recipe: one `yield` each. They need neither torch nor files.

A rule that asks the model's configuration, the processes or a file stands where that is opened.
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from operator import attrgetter

from flipscale.io.errors import UserError
from flipscale.io.options import check_ranges
from flipscale.recipe.data import PRECOMPUTED_TOWERS, divisors_around, small_shares
from flipscale.recipe.optim import StageRecipe
from flipscale.recipe.recipe import Recipe
from flipscale.recipe.schedule import COOLDOWNS, schedule_stages

# Shares are written with a few digits, so their sum may differ from 1 by this.
_SUM_TOLERANCE = 1e-4
_DEFAULTS, _STAGE = Recipe(), StageRecipe("")
_JITTER = [f"data.augment.color_jitter.{name}" for name in ("brightness", "contrast", "saturation", "hue")]


def _set(recipe: Recipe, *names: str) -> Iterator[str]:
    """Yield `FIELD is VALUE` of each field that is not at its default. `stages.NAME` is the field of each stage."""
    for name in names:
        section, _, field = name.rpartition(".")
        parts = {f"stages.{stage.name}": stage for stage in recipe.stages}
        for path, part in parts.items() if section == "stages" else [(section, attrgetter(section)(recipe))]:
            default = getattr(_STAGE if section == "stages" else attrgetter(section)(_DEFAULTS), field)
            if (value := getattr(part, field)) not in (None, default):
                yield f"{path}.{field} is {value!r}"


def _both(recipe: Recipe, reason: str, *names: str) -> Iterator[str]:
    """Refuse each field that is set, because of another setting, which begins the reason."""
    for one in _set(recipe, *names):
        yield f"{one} and {reason}; leave one of them out"


def _besides_pairs(recipe: Recipe, reason: str, *names: str) -> Iterator[str]:
    """Refuse losses besides those of pairs, text masks, and fields that are set."""
    kind = () if recipe.loss.compares_pairs else ("loss.kind",)
    added = ("loss.caption_weight", "loss.reconstruction_weight", "stages.text_mask_ratio")
    yield from _both(recipe, reason, *kind, *added, *names)


def _model(recipe: Recipe) -> Iterator[str]:
    model, family = recipe.model, f"model.family is {recipe.model.family!r}"
    start, towers = f"model.init_from is {model.init_from!r}", [*_set(recipe, "model.vision", "model.text")]
    if not model.init_from:
        for one in _set(recipe, "model.text_positions", "model.text_rows"):
            yield f"{one}, for start weights, and model.init_from is not set; set it"
    for tower, name in model.embedded.items():
        named = f"model.{PRECOMPUTED_TOWERS[tower].removesuffix('_model')} is {name!r}"
        if model.family != "flip":
            fix = "leave hf: out to train the tower, or set model.family to flip to train on its stored features"
            yield f"{named} and {family}; {fix}"
        if tower not in recipe.data.stored:
            fix = f"`flipscale prepare embed SHARDS FOLDER --model {name} --towers {tower} --features pooled`"
            missing = f"data.{tower[:-1]}_features is not set; set it to that of {fix}"
            yield f"{named}, which can only be embedded, not masked or trained, and {missing}"
    if towers and (model.family in ("clip", "siglip") or (model.family == "flip" and model.init_from)):
        yield f"{towers[0]}, {family} and {start}; set the family to towers, or to flip without init_from"
    if model.family == "towers" and (len(towers) == 1 or bool(towers) == bool(model.init_from)):
        yield f"{', '.join([family, *towers])} and {start}; set both towers, or init_from to a folder of both"
    if re.match(r"(open_clip|hf|untrained):", model.init_from or ""):
        fix = "name a run, a Hub name or a model folder, such as `flipscale convert transformers` makes of it"
        yield f"{start}, which `flipscale evaluate` takes and training does not; {fix}"
    if not recipe.loss.learns_captions:
        for one in _set(recipe, "model.decoder_config"):
            yield f"{one}, but no loss learns captions; set loss.caption_weight too"
    if model.family != "flip":
        yield from _besides_pairs(recipe, f"{family}, and this needs the family flip", "model.drop_path_rate")


def _data(recipe: Recipe) -> Iterator[str]:
    data, batch = recipe.data, recipe.data.global_batch_size
    if data.crop_scale[0] > data.crop_scale[1]:
        yield f"data.crop_scale is {[*data.crop_scale]}; expected the smaller share first"
    for name, kinds in {"data": data.captions, **{f"stages.{one.name}": one.captions for one in recipe.stages}}.items():
        if kinds is not None and not (kinds and all(0.0 < weight < float("inf") for weight in kinds.values())):
            yield f"{name}.captions is {kinds}; expected kinds with weights above 0, such as {{alt: 1, txt: 2}}"
    if batch % data.num_lanes:
        nearest = divisors_around(batch, data.num_lanes)
        yield f"data.lanes {data.lanes} does not divide data.global_batch_size {batch}; use {nearest}"
    if data.sources:
        both = f"and data.sources names {len(data.sources)}"
        for one in _set(recipe, "data.shards"):
            yield f"{one} {both}; give one, and --data.shards null or --data.sources []"
        for one in _set(recipe, "data.weights"):
            yield f"{one} {both}; give each source its own `weights`"
    for number, source in enumerate(data.sources):
        if (source.shards is None) == (source.dataset is None):
            given = "neither shards nor dataset" if source.shards is None else "shards and dataset"
            yield f"data.sources[{number}] has {given}; give one of them"
    weighted = {f"data.sources[{number}].weights": one.weights for number, one in enumerate(data.sources)}
    for name, folder in {"data.weights": data.weights, **weighted}.items():
        if folder is not None:
            yield from _both(recipe, f"{name} is {folder!r}", "data.fraction")
    weights = [one.weight for one in data.sources if one.weight is not None]
    if weights and len(weights) < len(data.sources):
        yield f"{len(weights)} of {len(data.sources)} data.sources have a weight; give all of them one, or none"
    yield from small_shares(weights)
    if data.pack_captions:
        yield from _besides_pairs(recipe, "data.pack_captions is true, for whole captions of pairs")
    for name in ("rand_augment", "mixup_alpha", "cutmix_alpha"):
        for one in _set(recipe, f"data.augment.{name}") if recipe.loss.kind != "classify" else ():
            kind = f"for images with class numbers, and loss.kind is {recipe.loss.kind!r}"
            yield f"{one}, which is {kind}; leave it out, or use loss.kind classify"


def _precomputed(recipe: Recipe) -> Iterator[str]:
    model, data = recipe.model, recipe.data
    is_whole = len(data.sources) < 2 and not any(one.dataset for one in data.sources) and data.fraction == 1.0
    part = "which needs whole shards of one source; use data.shards and data.fraction 1"
    unread = {
        "images": ("stages.mask_ratio", "model.drop_path_rate", *_JITTER),
        "texts": (
            *("stages.captions", "data.captions", "data.pack_captions", "model.text_positions"),
            *("loss.positives", "loss.captions_per_image"),
        ),
    }
    own = {"images": model.vision, "texts": model.text}
    for tower, folder in data.stored.items():
        named = f"data.{tower[:-1]}_features is {folder!r}"
        yield from _besides_pairs(recipe, f"{named}, so these {tower} are not read", *unread[tower])
        if (own[tower] if any(own.values()) else model.init_from) is None:
            yield f"{named} and the tower has no start weights; set model.init_from to the model of the features"
        if not is_whole:
            yield f"{named}, {part}"
    for folder in data.teachers[:1]:
        named = f"data.teachers has {folder!r}"
        others = ("stages.captions", "data.captions", "data.image_features", "data.text_features")
        yield from _both(recipe, f"{named}, for infonce of one caption of each crop", *others)
        yield from _both(recipe, f"{named}, for infonce", "loss.kind", "loss.captions_per_image")
        yield from _both(recipe, f"{named}, whose embeddings are of unchanged crops", *_JITTER)
        if not is_whole:
            yield f"{named}, {part}"
    for one in _set(recipe, "loss.teacher_weight", "loss.teacher_temperature") if not data.teachers else ():
        yield f"{one} and there are no teachers; set data.teachers, or leave it out"


def _loss(recipe: Recipe) -> Iterator[str]:
    loss = recipe.loss
    if loss.positives != "pairs" and loss.kind != "sigmoid":
        fix = "leave it out, or use loss.kind 'sigmoid' (infonce learned the same with it as with 'pairs')"
        yield f"loss.positives is {loss.positives!r} with loss.kind {loss.kind!r}; {fix}"
    if loss.prefix_dims:
        yield f"loss.prefix_dims is {loss.prefix_dims}; leave it out: no widths are trained, because a PCA is as good"
    other_kind = () if loss.compares_pairs else ("loss.kind",)
    if loss.captions_per_image > 1:
        reason = f"loss.captions_per_image is {loss.captions_per_image}, for a loss of pairs alone and one view"
        others = ("loss.positives", "loss.caption_weight", "loss.reconstruction_weight", "mask.views")
        yield from _both(recipe, reason, *other_kind, *others)
    both = "and both train another model class"
    for weight in _set(recipe, "loss.caption_weight", "loss.reconstruction_weight"):
        yield from _both(recipe, f"{weight}, {both}", *other_kind)
    for weight in _set(recipe, "loss.reconstruction_weight"):
        yield from _both(recipe, f"{weight}, {both}", "loss.caption_weight")
        yield from _both(recipe, f"{weight}, but views see each other's masked patches", "mask.views")
    for one in _set(recipe, "stages.text_mask_ratio") if loss.learns_captions or loss.kind == "classify" else ():
        reason = "learns every word of a caption" if loss.learns_captions else "'classify' has no text"
        yield f"{one}; expected 0, because the loss {reason}. Fix: leave it out"


def _others(recipe: Recipe) -> Iterator[str]:
    loss = recipe.loss
    for rank in _set(recipe, "optim.lora.rank"):
        if recipe.model.init_from is None:
            yield f"{rank} and model.init_from is null; set it, because LoRA changes weights that are there"
        if recipe.optim.name != "adamw":
            yield f"{rank} and optim.name is {recipe.optim.name!r}; use adamw"
        if not loss.compares_pairs or loss.caption_weight or loss.reconstruction_weight:
            yield f"{rank}, and a head or a decoder of the loss would stay as drawn; use a loss of pairs alone"
    for name in ("log", "eval"):
        for one in _set(recipe, f"{name}.every_share") if recipe.budget_minutes is None else ():
            yield f"{one} and needs budget_minutes; set it, or use {name}.every_samples"
    for one in _set(recipe, "eval.every_share"):
        yield from _both(recipe, one, "eval.every_samples")
    if recipe.hub.push_to_hub and recipe.hub.hub_model_id is None:
        yield "hub.push_to_hub is true and hub.hub_model_id is not set; set it to ORG/NAME"


def _stages(recipe: Recipe) -> Iterator[str]:
    stages, batch, minutes = recipe.stages, recipe.data.global_batch_size, recipe.budget_minutes
    is_timed = minutes is not None and not recipe.counts_samples
    names = [stage.name for stage in stages]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield f"{names.count(name)} stages are named {name!r}; give every stage its own name"
    for stage in stages:
        named = f"stage {stage.name!r}:"
        for share, count in (("share", "samples"), ("warmup_share", "warmup_samples")):
            if is_timed and getattr(stage, count):
                fix = f"use {share}, or leave out budget_minutes"
                yield f"{named} {count} is a count, and the run ends by its clock (budget_minutes); {fix}"
            if not is_timed and getattr(stage, share):
                yield f"{named} {share} needs budget_minutes, which is not set; use {count}, or set budget_minutes"
    if not stages:
        return
    planned = schedule_stages(stages, batch, minutes if is_timed else None)
    if is_timed and abs((total := sum(stage.share or 0.0 for stage in stages)) - 1.0) > _SUM_TOLERANCE:
        yield f"the shares of the stages add up to {total:g}; they must add up to 1"
    for stage in stages:
        if not is_timed and (stage.samples or 0) < batch:
            yield f"stage {stage.name!r}: {stage.samples} samples are less than a step of {batch} pairs"
    for before, stage in pairwise([planned[0], *planned]):
        named, length = f"stage {stage.name!r}:", stage.schedule_last - stage.schedule_first
        if stage.base_lr is not None and stage.warmup >= length:
            words = f"{stage.warmup_share} of the budget" if is_timed else f"{stage.warmup_samples} samples"
            limit = f"{length:g}" if is_timed else f"{length * batch}"
            yield f"{named} a warm-up of {words} is not shorter than its schedule of {limit}"
        if stage.base_lr is None and (stage.warmup_share or stage.warmup_samples):
            yield f"{named} {'warmup_share' if is_timed else 'warmup_samples'} needs a base_lr"
        if stage.schedule in ("cosine", "constant") and stage.base_lr is None:
            yield f"{named} schedule {stage.schedule} starts with a rate and needs a base_lr"
        if stage.schedule in COOLDOWNS and before.shape != "constant":
            rate = "no stage is before it" if before is stage else f"the rate before it is {before.shape}, not constant"
            fix = "a stage before it needs `schedule: constant` and the base_lr"
            yield f"{named} schedule is {stage.schedule}, and {rate}; {fix}"
        if stage.schedule in COOLDOWNS and stage.base_lr is not None:
            fix = "leave base_lr out, because the rate falls from that of the stage before"
            yield f"{named} schedule is {stage.schedule}, and base_lr is {stage.base_lr}; {fix}"
        if stage.base_lr is None and set(stage.frozen) != set(before.frozen):
            fix = "set its base_lr, because a change of the frozen parts starts a new schedule and optimiser"
            yield f"{named} frozen is {[*stage.frozen]}, and {[*before.frozen]} before; {fix}"


SECTIONS = (_model, _data, _precomputed, _loss, _others, _stages)


def check_rules(recipe: Recipe) -> None:
    """Raise UserError for the first rule that a recipe breaks. A recipe without stages is not yet a whole one."""
    check_ranges(recipe)
    for refusal in refusals(recipe):
        raise UserError(refusal)


def refusals(recipe: Recipe) -> Iterator[str]:
    """Yield a sentence for each broken rule. A rule may rely on those before it."""
    for section in SECTIONS:
        yield from section(recipe)
