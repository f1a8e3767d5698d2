"""Flags beyond the recipe's own: fields of one stage, and the names of other trainers."""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from flipscale.io.errors import UserError
from flipscale.recipe.optim import StageRecipe

# Other trainers' names, by the setting of this trainer.
_NAMES = {
    "--stages.STAGE.base_lr, the rate per 256 pairs": "lr learning_rate base_lr blr peak_lr max_lr",
    "--stages.STAGE.samples, the pairs of a stage": "samples epochs num_epochs num_train_epochs max_steps",
    "--stages.STAGE.warmup_samples, a number of pairs": "warmup warmup_samples warmup_steps warmup_epochs warmup_ratio",
    "--stages.STAGE.mask_ratio": "mask_ratio patch_dropout force_patch_dropout",
    "--data.global_batch_size, the pairs of all processes": "batch_size train_batch_size per_device_train_batch_size",
    "--data.micro_batch_size, the pairs that a process holds at once": "accum_freq gradient_accumulation_steps",
    "--data.shards": "train_data train_data_dir data_path data_dir",
    "--data.num_workers": "workers num_workers dataloader_num_workers",
    "--model.init_from": "pretrained model_name_or_path",
    "--model.vision_config.image_size": "image_size img_size force_image_size",
    "mixed_precision of the launch file": "precision mixed_precision amp bf16 fp16",
}
_SETTINGS = {name: setting for setting, names in _NAMES.items() for name in names.split()}


def with_stages(words: Sequence[str], stages_of: Callable[[list[str]], list[StageRecipe]]) -> list[str]:
    """Return a command line in which `--stages` has the values of flags such as `--stages.masked.base_lr 1e-5`. Raise
    UserError if such a flag has no value, or names no field of a stage by its name or its number from 0."""
    others, changes, rest = [], {}, iter(words)
    for word in rest:
        if not word.startswith("--stages.") or word == "--stages.help":
            others.append(word)
        elif (value := next(rest, "--")).startswith("--"):
            raise UserError(f"{word} has no value; write {word} VALUE")
        else:
            changes[word] = value
    if not changes:
        return others
    stages = [dataclasses.asdict(stage) for stage in stages_of([word for word in others if word != "--print_config"])]
    fields = [f"--stages.{number}.{name}" for number, stage in enumerate(stages) for name in stage]
    for flag, value in changes.items():
        if (numbered := with_stage_number(flag, stages, "--stages.")) not in fields:
            named = [f"--stages.{stage['name']}.{name}" for stage in stages for name in stage]
            raise UserError(unknown_flag(flag, [*fields, *named]))
        _, number, name = numbered.split(".")
        stages[int(number)][name] = value
    return [*others, "--stages", yaml.safe_dump(stages, default_flow_style=True, width=math.inf)]


def with_stage_number(path: str, stages: Sequence[Mapping[str, Any]], start: str = "stages.") -> str:
    """Return the path of a field, such as `stages.masked.base_lr`, with the number of a stage in place of its name."""
    for number, stage in enumerate(stages):
        if path.startswith(named := f"{start}{stage['name']}."):
            return f"{start}{number}.{path.removeprefix(named)}"
    return path


def unknown_flag(flag: str, known: Sequence[str]) -> str:
    """Return the error of an unknown flag, with the setting that another trainer means, or a known flag like it."""
    name = re.split(r"\.|^--", flag)[-1].replace("-", "_")
    same = [one for one in known if re.split(r"\.|^--", one)[-1] == name]
    if name in _SETTINGS and not (same and flag.startswith("--stages.")):
        return f"{flag} is no field of a recipe; use {_SETTINGS[name]}"
    near = difflib.get_close_matches(flag, same or known, 1, cutoff=0.0 if same else 0.6)
    return f"{flag} is no field of a recipe; {f'did you mean {near[0]}?' if near else '--help lists all fields'}"
