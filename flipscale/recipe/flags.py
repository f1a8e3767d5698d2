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

# Names of open_clip's flags, and of other trainers', by the setting of this trainer.
_NAMES = {
    "--stages.STAGE.base_lr, the rate per 256 pairs": "lr learning_rate base_lr blr peak_lr max_lr",
    "--stages.STAGE.schedule": "lr_scheduler lr_scheduler_type lr_schedule skip_scheduler epochs_cooldown "
    "lr_cooldown_end lr_cooldown_power",
    "--stages.STAGE.samples, the pairs of a stage": "samples epochs num_epochs num_train_epochs max_steps",
    "--stages.STAGE.warmup_samples, a number of pairs": "warmup warmup_samples warmup_steps warmup_epochs warmup_ratio",
    "--stages.STAGE.mask_ratio": "mask_ratio patch_dropout force_patch_dropout",
    "--data.global_batch_size, the pairs of all processes": "batch_size train_batch_size per_device_train_batch_size",
    "--data.micro_batch_size, the pairs that a process holds at once": "accum_freq gradient_accumulation_steps",
    "--data.shards": "train_data train_data_dir data_path data_dir",
    "--data.sources, each with a weight": "train_data_upsampling_factors",
    "--data.weights, by which pairs are drawn": "dataset_resampled",
    "--data.num_workers": "workers num_workers dataloader_num_workers",
    "--data.cache_dir for shards, and the variable HF_HOME for models": "cache_dir",
    "--data.augment": "aug_cfg",
    "--data.teachers, whose features `flipscale prepare embed --crops` stores": "distill_model distill_pretrained",
    "--model.init_from": "pretrained model_name_or_path",
    "--model.vision, an image tower": "pretrained_image",
    "--model.frozen '[vision_model]'": "lock_image lock_image_unlocked_groups",
    "--model.frozen '[text_model]'": "lock_text lock_text_unlocked_layers lock_text_freeze_layer_norm",
    "--model.gradient_checkpointing": "grad_checkpointing",
    "--model.compile": "torchcompile",
    "--model.vision_config.image_size": "image_size img_size force_image_size",
    "--model.vision_config.image_mean": "image_mean",
    "--model.vision_config.image_std": "image_std",
    "--model.vision_config.hidden_act and --model.text_config.hidden_act": "force_quick_gelu",
    "--model.text_config.max_position_embeddings": "force_context_length",
    "--optim.name": "opt optimizer",
    "--optim.weight_decay": "wd",
    "--optim.adam_beta1": "beta1",
    "--optim.adam_beta2": "beta2",
    "--optim.adam_epsilon": "eps",
    "--optim.muon_momentum": "momentum",
    "--optim.max_grad_norm": "grad_clip_norm",
    "--loss.kind sigmoid": "siglip",
    "--loss.caption_weight": "coca_caption_loss_weight coca_contrastive_loss_weight",
    "--eval.tasks": "imagenet_val imagenet_v2",
    "--eval.retrieval, a folder of pairs": "val_data",
    "--eval.every_samples": "zeroshot_frequency val_frequency",
    "--save.every_samples": "save_frequency",
    "--save.total_limit": "save_most_recent delete_previous_checkpoint",
    "--output_dir": "logs name",
    "--resume_from_checkpoint": "resume",
    "--log.every_samples": "log_every_n_steps",
    "--log.report_to": "report_to",
    "--hub.push_to_hub": "remote_sync remote_sync_frequency remote_sync_protocol",
    "mixed_precision of the launch file": "precision mixed_precision amp bf16 fp16",
    "the launch file (--config_file of accelerate)": "device dist_url dist_backend horovod ddp_static_graph "
    "no_set_device_rank",
    "`flipscale prepare shards`, which reads tables": "csv_separator csv_img_key csv_caption_key",
    "`flipscale convert`, which writes ONNX": "torchscript trace",
}
_SETTINGS = {name: setting for setting, names in _NAMES.items() for name in names.split()}
# open_clip's other flags, by the reason to leave them out.
_NOT_NEEDED = {
    "the loss always compares the whole batch, with gradients": "local_loss gather_with_grad loss_dist_impl",
    "the shards are counted": "train_num_samples val_num_samples dataset_type",
    "the models have no batch norm": "use_bn_sync lock_image_freeze_bn_stats",
    "images are cropped, then resized in one way": "image_interpolation image_resize_mode",
    "the text tower is always its own module": "force_custom_text",
    "linear layers are torch's": "use_bnb_linear",
    "the main process logs, and environment.json names the commit": "log_local copy_codebase debug",
    "a tracker's run has the name of output_dir": "wandb_notes wandb_project_name",
}
_REASONS = {name: reason for reason, names in _NOT_NEEDED.items() for name in names.split()}


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
        return f"{flag} is not a field of a recipe; use {_SETTINGS[name]}"
    if name in _REASONS:
        return f"{flag} is not a field of a recipe; leave it out: {_REASONS[name]}"
    near = difflib.get_close_matches(flag, same or known, 1, cutoff=0.0 if same else 0.6)
    return f"{flag} is not a field of a recipe; {f'did you mean {near[0]}?' if near else '--help lists all fields'}"
