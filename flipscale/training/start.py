"""The start of a run: what each process checks and opens, and what all processes then agree on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from flipscale.data.faults import Fault
from flipscale.data.feeding import enduring_batches, on_device
from flipscale.data.labelled.recipe import AugmentRecipe
from flipscale.data.loader import StepSampler, check_shared_memory, prepare_workers
from flipscale.data.packed import PackedBatch
from flipscale.data.pairs import InputShape, PairDataset
from flipscale.data.sources.opening import open_source
from flipscale.data.sources.source import Source, shard_sizes_digest
from flipscale.data.tokenizers import check_begin_and_end, check_tokenizer, load_tokenizer
from flipscale.engines.checkpoint_integrity import Contents, newest_whole
from flipscale.engines.launch import place_in_world
from flipscale.engines.start import start_accelerator
from flipscale.evaluation.class_names import refuse_other_class_names, training_class_names
from flipscale.evaluation.embedding import parts_of
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.rehearsal import rehearse
from flipscale.evaluation.test_set import read_class_names
from flipscale.io.digests import Comparison, Damage
from flipscale.io.errors import UserError
from flipscale.io.files import check_writable
from flipscale.io.lock import FolderLock
from flipscale.training.budget.progress import Progress, TimedProgress
from flipscale.training.recipe import Recipe, conflicts
from flipscale.training.run_directory import lock_run_directory
from flipscale.training.schedule import Stage, plan_stages
from flipscale.training.step import raise_if_dropout

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flipscale.objectives.objective import Objective

_log = logging.getLogger(__name__)


class StepBatch(NamedTuple):
    """One process's part of the batch of a step.

    Args:
        stage: of the step.
        micro_batches: on the device, all of one size, with the stage's `image_size` if it has one. Clearing the list
            frees the batch: nothing else holds it.
        faults: the samples that could not be used, each of which was replaced.
    """

    stage: Stage
    micro_batches: list[PackedBatch]
    faults: list[Fault]


@dataclass(frozen=True)
class Plan:
    """What a recipe asks for, checked and opened.

    Args:
        stages: of the whole run.
        source: of the pairs.
        tokenizer: of the captions; None for an objective without text.
        datasets: the pairs as each stage sees them.
        tasks: the evaluations.
        objective: what is learned.
        class_names: of a classifier.
    """

    stages: list[Stage]
    source: Source
    tokenizer: PreTrainedTokenizerBase | None
    datasets: Mapping[Stage, PairDataset]
    tasks: list[Task]
    objective: Objective
    class_names: Sequence[str] = ()

    def batches(self, progress: Progress, accelerator: Accelerator) -> Iterator[StepBatch]:
        """Yield this process's batches to the end of the run, which moves on by `progress.advance`.

        Raises:
            ValueError: the data cannot be used.
            OSError: a shard cannot be read, or workers keep dying.
        """
        rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
        pin_memory = device.type == "cuda"
        while not progress.is_over:
            stage, first, last = progress.stage, progress.step, progress.last_step
            batches = enduring_batches(self.datasets[stage], first, last, rank, world_size, pin_memory)
            with closing(on_device(batches, device)) as ready:
                for micro_batches in ready:
                    for one in micro_batches:
                        one.with_images_of(stage.image_size)
                    yield StepBatch(stage, micro_batches, [fault for one in micro_batches for fault in one.faults])
                    # What the clock ends has batches ahead, which are not used.
                    if progress.is_over or progress.stage is not stage:
                        break


@dataclass(frozen=True)
class Start:
    """Where a start of a run begins.

    Args:
        accelerator: the processes.
        checkpoint: the one that the run goes on from, None for a fresh start.
        state: of that checkpoint.
        set_aside: the names of newer ones that were not whole.
        lock: of the run directory; the main process has it.
    """

    accelerator: Accelerator
    checkpoint: Path | None
    state: Mapping[str, Any]
    set_aside: Sequence[str] = ()
    lock: FolderLock | None = None

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self.state.get("step", 0)

    def progress(self, recipe: Recipe, stages: Sequence[Stage]) -> Progress:
        """Return where the run is in its schedule."""
        if recipe.budget_minutes is None:
            return Progress(stages, self.step)
        return TimedProgress(stages, self.step, 60.0 * recipe.budget_minutes, self.state)

    @property
    def trained_seconds(self) -> float:
        """How long they took, in all starts so far."""
        return self.state.get("trained_seconds", 0.0)

    def check_lock(self, at_once: bool = False) -> None:
        """Raise if another run has taken the run directory, see `FolderLock.check`.

        Raises:
            OSError: it has; this process must write nothing more.
        """
        if self.lock is not None:
            self.lock.check(at_once)

    def release_lock(self) -> None:
        """Leave the run directory to others."""
        if self.lock is not None:
            self.lock.release()


def check_output_dir(name: str) -> None:
    """Raise unless a run directory can be written, before anything is done there.

    Raises:
        ValueError: it cannot.
    """
    check_writable(name, "output_dir")


def check(recipe: Recipe) -> Plan:
    """Check a recipe and open its data, in each process for itself.

    Raises:
        ValueError: the recipe cannot be run as it stands.
        OSError: shared memory is full.
    """
    objective, config = recipe.objective(), recipe.model_config()
    if recipe.model.frozen:
        from flipscale.engines.first_weights import freeze, model_without_storage  # seconds to import, with the models

        freeze(model_without_storage(config, objective.model_class), recipe.model.frozen)
    stages = plan_stages(recipe.stages, recipe.data.global_batch_size, recipe.budget_minutes)
    check_shares(recipe)
    check_trackers(recipe.log.report_to)
    tasks = recipe.eval.planned()
    for task in tasks:
        task.check()
    if recipe.data.micro_batch_size is not None and objective.is_coupled:
        raise_if_dropout(config)
    rank, world_size = place_in_world()
    # Says whether the processes and micro-batches divide the batch, before anything is written.
    sampler = StepSampler(0, 0, recipe.data.global_batch_size, rank, world_size, recipe.data.micro_batch_size)
    check_augment(recipe, objective, sampler.micro_batch_size)
    source = open_source(recipe.data)
    class_names = check_task_kinds(recipe, objective, tasks)
    tokenizer = None
    if objective.takes_text:
        tokenizer = load_tokenizer(recipe.data.tokenizer, config.caption_config.max_position_embeddings)
        check_tokenizer(tokenizer, config.caption_config)
        if config.decoder_config is not None:
            check_begin_and_end(tokenizer, config.decoder_config)
    if 0 < len(source) < recipe.data.global_batch_size and rank == 0 and objective.is_coupled:
        _log.warning(
            "data.global_batch_size is %d and there are %d pairs: every batch has some of them several times, which "
            "the loss takes for unlike; use a smaller batch",
            *(recipe.data.global_batch_size, len(source)),
        )
    check_shared_memory(recipe.data.num_workers)
    shape = InputShape.of(config)
    datasets = {
        stage: objective.dataset(
            source, tokenizer, recipe.data, shape.at(stage.image_size), recipe.seed, stage.mask_ratio, recipe.mask,
            stage.text_mask_ratio, drop_path_rate=recipe.model.drop_path_rate,
        )
        for stage in stages
    }  # fmt: skip
    rehearse(tasks, shape.image_size, rank, world_size)
    return Plan(stages, source, tokenizer, datasets, tasks, objective, class_names)


def check_trackers(names: Sequence[str]) -> None:
    """Raise unless all trackers are known and installed.

    Raises:
        ValueError: one is not.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = [str(one) for one in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(LOGGER_TYPE_TO_CLASS)
            raise UserError(f"log.report_to names {name!r}; there are {known}")
        if name not in installed:
            raise UserError(
                f"log.report_to names {name!r}, which is not installed; pip install {name}, or leave it out"
            )


def check_augment(recipe: Recipe, objective: Objective, micro_batch_size: int) -> None:
    """Raise unless what varies images can be done: of labelled ones, in couples of the same process.

    Raises:
        ValueError: it cannot.
    """
    augment = recipe.data.augment
    if augment != AugmentRecipe() and "labels" not in objective.columns:
        name = next(field for field, value in vars(augment).items() if value)
        raise UserError(
            f"data.augment.{name} is {getattr(augment, name)!r}, which is for images with class numbers, and loss.kind "
            f"is {recipe.loss.kind!r}; leave it out, or use loss.kind classify"
        )
    if augment.mixes and micro_batch_size % 2:
        raise UserError(
            f"data.augment mixes images in couples, and a process takes {micro_batch_size} at a time; use an even "
            "number of them"
        )


def check_task_kinds(recipe: Recipe, objective: Objective, tasks: Sequence[Task]) -> list[str]:
    """Return the names of the classes that a head is trained for, none without one.

    Raises:
        ValueError: an evaluation needs what the model does not have, the classes have no names or not as many as the
            head is for, or an evaluation or the run so far has other ones.
        OSError: a file of names cannot be fetched.
    """
    from flipscale.objectives.classify import Classify  # with the models, which take seconds to import

    classifier = objective if isinstance(objective, Classify) else None
    gives = ("features", "head") if classifier is not None else parts_of(recipe.model_config())
    for task in tasks:
        task.check_model(gives, f"the model of loss.kind {recipe.loss.kind!r}")
    if objective.num_labels is None:
        return []
    names = training_class_names(recipe.data, objective.num_labels)
    for task in tasks:
        if task.needs in ("head", "answers") and read_class_names(task.data) != names:
            raise UserError(f"{task.data} has other class names, or in another order, than the training shards")
    refuse_other_class_names(Path(recipe.output_dir), names)
    return names


def check_shares(recipe: Recipe) -> None:
    """Raise unless intervals that are shares of a time budget have one, and stand alone.

    Raises:
        ValueError: they do not.
    """
    for name, section in (("log", recipe.log), ("eval", recipe.eval)):
        if section.every_share and recipe.budget_minutes is None:
            raise UserError(
                f"{name}.every_share is {section.every_share:g} of budget_minutes, which is not set; set that, or use "
                f"{name}.every_samples"
            )
    if recipe.eval.every_share and recipe.eval.every_samples:
        raise UserError(
            f"eval.every_share is {recipe.eval.every_share:g} and eval.every_samples is {recipe.eval.every_samples}; "
            "leave one of them out"
        )


def join(recipe: Recipe, plan: Plan, ahead: Comparison | None) -> Start:
    """Collective. Start the processes and have them agree on the data and on the checkpoint to go on from, the newest
    that is whole.

    Args:
        ahead: what `begin_reading` began.

    Raises:
        ValueError: the processes are not those that were launched, their data differs, among them or from that of the
            checkpoint, there are checkpoints and none is whole, or another run has the run directory.
        OSError: a checkpoint cannot be read, or the run directory is not writable.
    """
    prepare_workers()
    accelerator = start_accelerator(recipe.log.report_to, recipe.output_dir)
    agree_on_data(accelerator, plan.source)
    lock = take_run_directory(accelerator, Path(recipe.output_dir))
    chosen = newest_whole(
        accelerator, Path(recipe.output_dir), lambda contents: check_same_run(recipe, plan.stages, contents), ahead
    )
    if chosen is None:
        return Start(accelerator, None, {}, lock=lock)
    check_same_data(chosen.checkpoint, chosen.state, plan.source)
    return Start(accelerator, *chosen, lock=lock)


def check_same_run(recipe: Recipe, stages: Sequence[Stage], contents: Contents) -> None:
    """Raise unless a checkpoint is of a run of this recipe.

    Raises:
        Damage: it is not.
    """
    changed = conflicts(recipe, dict(contents.recipe))
    if changed:
        raise Damage(f"it is of a run of another recipe: {'; '.join(changed)}")
    step, samples, last = contents.state["step"], contents.state["samples_seen"], stages[-1].last
    if recipe.budget_minutes is None and step > last:
        raise Damage(f"it is of step {step}, and the recipe has {last}")
    if samples != step * recipe.data.global_batch_size:
        raise Damage(f"state.json has {samples} samples_seen in {step} steps of {recipe.data.global_batch_size}")


def take_run_directory(accelerator: Accelerator, run_dir: Path) -> FolderLock | None:
    """Collective. Have the main process lock the run directory, and return the lock there.

    Raises:
        ValueError: another run has the directory.
        OSError: it is not writable.
    """
    from accelerate.utils import broadcast_object_list

    lock: FolderLock | None = None
    failed: Exception | None = None
    if accelerator.is_main_process:
        try:
            lock = lock_run_directory(run_dir)
        except (ValueError, OSError) as error:
            failed = error
    (failed,) = broadcast_object_list([failed])
    if failed is not None:
        raise failed
    return lock


def agree_on_data(accelerator: Accelerator, source: Source) -> None:
    """Collective. Raise unless all processes found the same numbers of samples in the same shards.

    Raises:
        ValueError: a copy on some node is older or cut, so that the order of samples would differ from there on.
    """
    mine = torch.tensor([shard_sizes_digest(source)], device=accelerator.device)
    everyone = accelerator.gather(mine).tolist()
    others = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
    if others:
        raise UserError(
            f"processes {', '.join(map(str, others))} of {len(everyone)} found other numbers of samples in the shards "
            "than process 0, so that they would read them in another order; make the nodes' copies the same"
        )


def check_same_data(checkpoint: Path, state: Mapping[str, Any], source: Source) -> None:
    """Raise unless the checkpoint of this `state` was trained on the data of `source`.

    Raises:
        ValueError: the number of samples or the shards changed, and with them the order of samples.
    """
    if (state["data_samples"], state["data_fingerprint"]) != (len(source), shard_sizes_digest(source)):
        raise UserError(
            f"{checkpoint} was trained on {state['data_samples']} samples, the data now has {len(source)} or in other "
            "shards; the order of samples would change: use the same data or another output_dir"
        )
