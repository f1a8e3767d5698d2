"""Pre-training by masking: `accelerate launch -m flipscale.pretrain --config RECIPE`, `torchrun`, or plain python."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from flipscale.data.feeding import enduring_batches, on_device
from flipscale.data.packed import PackedBatch
from flipscale.data.pairs import InputShape, PairDataset
from flipscale.data.sources.opening import open_source
from flipscale.data.sources.source import fingerprint
from flipscale.data.tokenizers import load_tokenizer
from flipscale.engines.checkpoint import CheckpointReader, CheckpointWriter, list_checkpoints, load_state
from flipscale.engines.device import best_attention
from flipscale.engines.first_weights import Fill, compile_blocks, fresh_weights, no_weights, weights_of
from flipscale.engines.launch import launch_of
from flipscale.engines.start import build_engine, close_process_group, exit_now, start_accelerator
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.results import Result
from flipscale.evaluation.suite import evaluate_tasks
from flipscale.hub.background_push import BackgroundPush, card_name, open_target, push_finished
from flipscale.hub.model_card import write_card
from flipscale.hub.model_folder import build_processor, export_checkpoint
from flipscale.model import FlipConfig, FlipModel
from flipscale.planning.flops import pair_flops
from flipscale.training.bad_samples import BadSamples
from flipscale.training.health import StepGuard, Verdict, agree_on_data
from flipscale.training.preemption import StopRequest
from flipscale.training.recipe import Recipe, parse_recipe, to_yaml
from flipscale.training.run_directory import (
    is_done,
    mark_done,
    open_run_directory,
    told_of_a_full_disk,
    write_run_files,
)
from flipscale.training.schedule import Stage, plan_stages
from flipscale.training.step import consume_batch, raise_if_dropout
from flipscale.training.tracking import Tracker, is_due
from flipscale.training.user_errors import report_user_errors
from flipscale.training.watch import StepWatch


class Run:
    """A run in progress: the model, its optimisers and its position, and what is due between steps."""

    def __init__(self, recipe: Recipe):
        """Collective. Everything of the recipe checked and built, and the newest checkpoint loaded."""
        self.recipe = recipe
        self.batch_size = recipe.data.global_batch_size
        self.run_dir = Path(recipe.output_dir)
        self.stages = plan_stages(recipe.stages, self.batch_size)
        self.objective, config = recipe.objective(), recipe.model_config()
        if recipe.data.micro_batch_size is not None and self.objective.is_coupled:
            raise_if_dropout(config)
        checkpoint = open_run_directory(recipe)
        self.source = open_source(recipe.data)
        self.tokenizer = load_tokenizer(recipe.data.tokenizer, config.text_config.max_position_embeddings)
        self.datasets = {stage: self._dataset(stage, config) for stage in self.stages}
        self.processor = build_processor(config, self.tokenizer)
        self.tasks = recipe.eval.planned()
        for task in self.tasks:
            task.check()
        open_target(recipe.hub, resumes=checkpoint is not None)
        self.accelerator = start_accelerator(recipe.log.report_to, recipe.output_dir)
        agree_on_data(self.accelerator, fingerprint(self.source))
        # A file system may show a new folder to one machine later than to another.
        (checkpoint,) = broadcast_object_list([checkpoint])
        self.total_steps = self.stages[-1].last_step
        self.bad_samples = BadSamples(self.run_dir, self.accelerator.is_main_process, recipe.data.max_bad_fraction)
        self.watch = StepWatch(self.accelerator, self.run_dir, recipe.log.hang_seconds)
        self.tracker = Tracker(
            self.watch, self.bad_samples, recipe.log, self.batch_size, self.total_steps, pair_flops(recipe)
        )
        self.background_push = BackgroundPush(recipe, self.total_steps, self.accelerator.is_main_process)
        self.request = StopRequest(watches_file=self.accelerator.is_main_process)
        newest = None if checkpoint is None else load_state(checkpoint)["step"]
        self.checkpoints = CheckpointWriter(self.accelerator, self.run_dir, recipe.save, newest)
        self.guard = StepGuard(self.accelerator, self.request, self.checkpoints, self.watch)
        self.step, self.num_replaced, self.stopped = 0, 0, False

        self.engine = build_engine(self.accelerator, launch_of(os.environ), recipe.optim, self.batch_size)
        kind = self.objective.model_class
        fill = no_weights if checkpoint else initial_weights(recipe.model.init_from, config, recipe.seed, kind)
        self.engine.build(config, self._configure, fill, kind)
        self.weights = self.engine.model
        state = self._load(checkpoint)
        if self.accelerator.is_main_process:
            write_run_files(recipe, self.engine.name, self.accelerator.num_processes, state, len(self.source))
        if recipe.log.report_to:
            self.accelerator.init_trackers("tensorboard")
        self.request.listen()
        self.tracker.start(self.step, state.get("trained_seconds", 0.0))
        self.bad_samples.start(self.step * self.batch_size, self.source.faults)

    def _dataset(self, stage: Stage, config: FlipConfig) -> PairDataset:
        shape, recipe = InputShape.of(config), self.recipe
        return PairDataset(
            self.source, self.tokenizer, recipe.data, shape, recipe.seed, stage.mask_ratio, recipe.mask,
            stage.text_mask_ratio, sends_masked="masked_patches" in self.objective.columns,
        )  # fmt: skip

    def _configure(self, model: FlipModel) -> None:
        model.set_attn_implementation(best_attention(self.accelerator.device))
        if self.recipe.model.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if self.recipe.model.compile:
            compile_blocks(model)

    def _load(self, checkpoint: Path | None) -> dict[str, Any]:
        if checkpoint is None:
            self.engine.prepare()
            self.engine.start_averages(None)
            return {}
        state = load_state(checkpoint)
        if (state["data_samples"], state["data_fingerprint"]) != (len(self.source), fingerprint(self.source)):
            raise ValueError(
                f"{checkpoint} was trained on {state['data_samples']} samples, the data now has {len(self.source)} or "
                "in other shards; the order of samples would change: use the same data or another output_dir"
            )
        reader = CheckpointReader(checkpoint)
        self.engine.load_weights(reader)
        self.engine.prepare()
        self.step = state["step"]
        if self.step > self._stage_of(self.step).schedule_first:
            self.engine.load_moments(reader, state["optimizer_steps"])
        self.engine.start_averages(reader)
        return state

    def _stage_of(self, step: int) -> Stage:
        return next((stage for stage in self.stages if step < stage.last_step), self.stages[-1])

    def remaining_stages(self) -> Iterator[Stage]:
        """The stages that are not over, the optimisers' moments forgotten where one says so."""
        for stage in self.stages:
            if self.stopped or stage.last_step <= self.step:
                continue
            if stage.fresh_optimizer and stage.first_step == self.step and self.step > 0:
                self.engine.forget_moments()
            yield stage

    def batches(self, stage: Stage) -> Iterator[list[PackedBatch]]:
        """This process's batches of a stage from the current step until its end or a stop, each as its micro-batches on
        the device."""
        accelerator = self.accelerator
        batches = enduring_batches(
            self.datasets[stage],
            max(self.step, stage.first_step),
            stage.last_step,
            accelerator.process_index,
            accelerator.num_processes,
            pin_memory=accelerator.device.type == "cuda",
        )
        for batch in self.watch.timed(on_device(batches, accelerator.device), self.step):
            self.num_replaced = self.bad_samples.note([fault for part in batch for fault in part.faults])
            yield batch
            if self.stopped:
                return

    def after_step(self, stage: Stage, metrics: dict[str, Any], verdict: Verdict) -> None:
        """Collective. Counts the step and does what is due: track, evaluate, save."""
        self.step += 1
        self.stopped = verdict.stop
        self.bad_samples.count(verdict.num_replaced, self.batch_size)
        self.tracker.after_step(self.step, {**metrics, "stage": stage.name}, skipped=not verdict.finite)
        if verdict.written:
            self.commit()
        seen, recipe = self.step * self.batch_size, self.recipe
        due = [task for task in self.tasks if is_due(seen, self.batch_size, task.every_samples or 0)]
        evaluates = bool(due) and self.step < self.total_steps
        saves = verdict.stop or verdict.save or is_due(seen, self.batch_size, recipe.save.every_samples)
        if evaluates or saves:
            self.tracker.pause()
            if evaluates:
                self.evaluate(due)
            if saves:
                self.save()
            self.tracker.resume()

    def evaluate(self, tasks: list[Task]) -> list[Result]:
        """Collective. The tasks' results of the weights or their averages, also written to the run's files."""
        self.weights.eval()
        recipe = self.recipe.eval
        embedder = Embedder(
            self.weights, self.tokenizer, self.accelerator, recipe.batch_size, recipe.num_workers, self.watch.alive
        )
        with self.engine.averaged():
            results = evaluate_tasks(embedder, tasks)
        self.weights.train()
        self.watch.pause()
        self.tracker.write_results(self.step, results)
        return results

    def save(self) -> None:
        """Collective. Begins a checkpoint of this step."""
        self.commit()
        self.bad_samples.flush()
        state = {
            "step": self.step,
            "samples_seen": self.step * self.batch_size,
            "optimizer_steps": self.engine.optimizer_steps(),
            "trained_seconds": self.tracker.trained_seconds,
            "data_samples": len(self.source),
            "data_fingerprint": fingerprint(self.source),
            "num_processes": self.accelerator.num_processes,
        }
        self.checkpoints.save(self.engine.pieces(), self.engine.layout.shapes(), state, to_yaml(self.recipe))

    def commit(self) -> None:
        """Collective. The checkpoint that was begun is there, and may be pushed."""
        committed = self.checkpoints.commit()
        if committed is not None:
            self.background_push.offer(committed)

    def finish(self) -> None:
        """Collective. The last checkpoint; and unless the run was stopped, its evaluation and the exported model."""
        self.tracker.pause()
        self.save()
        self.commit()
        self.background_push.close()
        if not self.stopped:
            self.evaluate(self.tasks)
            if self.accelerator.is_main_process:
                export_checkpoint(list_checkpoints(self.run_dir)[-1], self.run_dir / "model")
                write_card(self.run_dir / "model", self.run_dir, card_name(self.recipe))
                mark_done(self.run_dir)
        self.tracker.finish()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.wait_for_everyone()


def pretrain(recipe: Recipe) -> Path:
    """Collective. The run directory of the finished (or stopped and resumable) run.

    Raises:
        ValueError: a recipe that cannot be run as it stands.
        FloatingPointError: the loss stayed non-finite.
        OSError: a checkpoint could not be written.
    """
    if is_done(recipe):
        print(f"{recipe.output_dir} is done; remove it, or choose another output_dir, to train again")
        return Path(recipe.output_dir)
    run = Run(recipe)
    with closing(run.watch):
        for stage in run.remaining_stages():
            for batch in run.batches(stage):
                learning_rate = stage.learning_rate(run.step)
                found = consume_batch(run.engine, batch, run.objective)
                verdict = run.guard.agree(found.loss, run.engine.gradient_norm(), run.num_replaced)
                run.engine.step(learning_rate, verdict.finite)
                metrics = {
                    "loss": verdict.loss,
                    "lr": learning_rate,
                    "grad_norm": verdict.grad_norm,
                    **{name: value.item() for name, value in found.metrics.items()},
                }
                run.after_step(stage, metrics, verdict)
        run.finish()
    return run.run_dir


def initial_weights(init_from: str | None, config: FlipConfig, seed: int, kind: type[FlipModel] = FlipModel) -> Fill:
    """What a run starts from: fresh weights, or those of the folder or Hub name `init_from`.

    Raises:
        ValueError: the weights cannot be loaded into a model of `config`.
    """
    if init_from is None:
        return fresh_weights(seed)
    try:
        torch.manual_seed(seed)
        return weights_of(kind.from_pretrained(init_from, config=config, dtype=torch.float32))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"model.init_from {init_from!r} cannot be loaded ({str(error).splitlines()[0]})") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """The verb: parses a recipe and runs it; a user's mistake ends in one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with report_user_errors():
        if "--dry_run" in arguments:
            from flipscale.planning.dry_run import dry_run

            return dry_run(arguments)
        recipe = parse_recipe(arguments)
        with told_of_a_full_disk(Path(recipe.output_dir)):
            pretrain(recipe)
        close_process_group()
        push_finished(recipe)
    exit_now()


if __name__ == "__main__":
    main()
