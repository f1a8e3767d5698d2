"""The stages of a start that all processes take together, from their launch to the engine."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flipscale.data.loader import prepare_workers
from flipscale.engines.build_engine import build_engine, start_accelerator
from flipscale.engines.checkpoint import CheckpointReader, Contents, from_main_process, latest_valid
from flipscale.engines.device import best_attention
from flipscale.engines.launch import launch_of
from flipscale.engines.trainable import add_lora, freeze
from flipscale.io.digests import CorruptFile
from flipscale.io.errors import UserError
from flipscale.io.options import changed_fields
from flipscale.loop.inputs import Session, TrainingSetup
from flipscale.objectives.build_objective import build_config, build_objective
from flipscale.process.lock import FolderLock
from flipscale.process.watchdog import Watchdog
from flipscale.process.world import gather_objects, place_in_world
from flipscale.recipe.recipe import Recipe, conflicts, deciding_part, to_yaml
from flipscale.recipe.schedule import Schedule
from flipscale.start.precomputed import embedded_by
from flipscale.start.setup import compiles

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flipscale.engines.engine import Engine
    from flipscale.model import FlipPreTrainedModel

_log = logging.getLogger(__name__)


@contextmanager
def watched(recipe: Recipe, work: str) -> Iterator[None]:
    """End the run if a `with` block shows no sign of life for `log.hang_seconds`."""
    with Watchdog(Path(recipe.output_dir), recipe.log.hang_seconds, place_in_world()[0]) as watch:
        watch.begin(work)
        yield


def start_processes(recipe: Recipe, worker_modules: Sequence[str] = ()) -> Accelerator:
    """Collective. Return accelerate's view of the processes. The server of workers imports `worker_modules`.

    Raise UserError if processes are missing."""
    with watched(recipe, "the start of the processes"):
        accelerator = start_accelerator(recipe.log.report_to, recipe.output_dir, is_watched=True)
        # Now, because accelerate may bind this process to the cores near its GPU, and workers inherit them.
        prepare_workers(worker_modules)
    return accelerator


def compare_processes(accelerator: Accelerator, setup: TrainingSetup, test_sets: Mapping[str, Any]) -> None:
    """Collective. Raise UserError on all processes if the recipe, launch, test sets or data of one differ from those of
    process 0. `test_sets` are digests by task. Paths may differ between machines."""
    launch, fields = launch_of(os.environ), yaml.safe_load(to_yaml(setup.recipe))
    mine = deciding_part(fields, name_of=lambda path: "") | {name: fields[name] for name in ("log", "save")}
    mine["eval"] = {name: fields["eval"][name] for name in ("every_samples", "every_share")}
    mine |= {"launch": [launch.engine, launch.precision, launch.shard_size], "test sets": dict(test_sets)}
    with watched(setup.recipe, "the comparison of the processes"):
        first = from_main_process(accelerator, lambda: mine)
        # A node's copy of the data may be older or incomplete, and its order of samples would differ.
        places = gather_objects([(platform.node(), sorted(changed_fields(first, mine)), setup.fingerprint)])
    for rank, (host, changed, _) in enumerate(places):
        if changed:
            raise UserError(
                f"process {rank} on {host} differs from process 0 ({'; '.join(changed)}); start all processes with the "
                "same recipe, flags, launch file and test sets"
            )
    if others := [str(rank) for rank, (_, _, fingerprint) in enumerate(places) if fingerprint != places[0][2]]:
        raise UserError(
            f"processes {', '.join(others)} of {len(places)} differ from process 0 in the samples of their shards, or "
            "in data.weights, and would read another order; make the nodes' copies the same"
        )


@contextmanager
def locked(accelerator: Accelerator, recipe: Recipe) -> Iterator[FolderLock | None]:
    """Collective. Hold the lock of the run directory in a `with` block; yield it on the main process. Raise UserError
    if another run holds it, or a process does not see it."""
    lock = FolderLock(Path(recipe.output_dir) / "run.lock", f"trains in {recipe.output_dir}")
    try:
        with watched(recipe, "the lock of the run directory"):
            holder = from_main_process(accelerator, lock.acquire)
            places = gather_objects([(lock.shows(holder), platform.node())])
        if unseen := [f"{rank} on {host}" for rank, (is_seen, host) in enumerate(places) if not is_seen]:
            raise UserError(
                f"processes {', '.join(unseen)} do not see the {lock.path.name} of process 0 on {places[0][1]} in "
                "output_dir; name the same folder for all, on a file system that all machines share"
            )
        yield lock if accelerator.is_main_process else None
    finally:
        lock.release()


def choose_checkpoint(accelerator: Accelerator, setup: TrainingSetup, lock: FolderLock | None) -> Session:
    """Collective. Return the session that begins at the newest whole checkpoint, or at step 0 without checkpoints.

    Raises:
        UserError: the checkpoint is of other data, or all are damaged.
        OSError: a checkpoint cannot be read.
    """
    run_dir, count = Path(setup.recipe.output_dir), len(setup.source)
    with watched(setup.recipe, "the choice of a checkpoint"):
        chosen = latest_valid(accelerator, run_dir, lambda contents: _check_same_run(setup, contents))
    if chosen is None:
        return Session(accelerator, None, {}, lock=lock)
    checkpoint, state, _ = chosen
    if (state["data_samples"], state["data_fingerprint"]) != (count, setup.fingerprint):
        raise UserError(
            f"{checkpoint} was written for {state['data_samples']} samples; the data has {count}, or other shards, "
            "data.weights or stored features. Use the same data, or another output_dir"
        )
    if state.get("data_lengths", setup.lengths_digest) != setup.lengths_digest and accelerator.is_main_process:
        message = "%s was written for as many samples in shards of other lengths; if the samples differ, stop the run, "
        _log.warning(message + "and use the same data or another output_dir", checkpoint)
    return Session(accelerator, *chosen, lock=lock)


def _check_same_run(setup: TrainingSetup, contents: Contents) -> None:
    if changed := conflicts(setup.recipe, dict(contents.recipe), contents.state["step"]):
        raise CorruptFile(f"it is of a run of another recipe: {'; '.join(changed)}")
    step, samples, total = contents.state["step"], contents.state["samples_seen"], setup.schedule.total_steps
    if total is not None and step > total:
        raise CorruptFile(f"it is of step {step}, and the recipe has {total}")
    if samples != step * setup.batch_size:
        raise CorruptFile(f"state.json has {samples} samples_seen in {step} steps of {setup.batch_size}")


def resume(recipe: Recipe, schedule: Schedule, session: Session, rows: Mapping[int, int] | None = None) -> Engine:
    """Collective. Build the engine, with the checkpoint's weights or new ones, ready to train. `rows` is the set-up's
    `text_rows`."""
    # Imported here, because transformers' models take seconds, and a wrong recipe is refused without them.
    from flipscale.engines.first_weights import compile_blocks, initial_weights, no_weights

    config, launch, first = build_config(recipe), launch_of(os.environ), schedule.first(session.state)
    model_class = build_objective(recipe).trained_class(config)
    reader = None if session.checkpoint is None else CheckpointReader(session.checkpoint)
    start_from = (recipe.model.start, config, recipe.seed, model_class, recipe.model.text_positions)
    fill = no_weights if reader else initial_weights(*start_from, embedded_by(recipe), rows)

    def configure(model: FlipPreTrainedModel) -> None:
        add_lora(model, recipe.optim.lora)
        freeze(model, recipe.model.frozen)
        model.set_attn_implementation(best_attention(session.accelerator.device))
        if compiles(recipe, launch, session.accelerator.device):
            compile_blocks(model, recipe.data.pack_captions)

    with watched(recipe, "the building of the model"):
        engine = build_engine(session.accelerator, launch, recipe.optim, recipe.data.global_batch_size)
        # A stage may start its optimisers afresh, without the checkpoint's moments.
        num_steps = 0 if first.resets_optimizer else session.state.get("optimizer_steps", 0)
        engine.build(config, configure, fill, model_class, first.stage.frozen, reader, num_steps)
    return engine
