"""A start of a run: whether its directory fits, the checkpoint on which all processes agree, and the engine with it."""

from __future__ import annotations

import logging
import math
import os
import platform
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from flipscale.data.loader import prepare_workers
from flipscale.engines.build import build_engine, start_accelerator
from flipscale.engines.checkpoint import CheckpointReader, Contents, from_main_process, latest_checkpoint, latest_valid
from flipscale.engines.device import best_attention
from flipscale.engines.launch import launch_of
from flipscale.engines.trainable import add_lora, freeze
from flipscale.io.digests import CorruptFile
from flipscale.io.errors import UserError
from flipscale.io.options import changed_fields
from flipscale.io.paths import check_writable, quoted
from flipscale.io.yaml_text import read_saved_recipe
from flipscale.loop.inputs import Session, TrainingSetup
from flipscale.objectives.build import build_config, build_objective
from flipscale.process.lock import FolderLock, start_of
from flipscale.process.watchdog import Watchdog
from flipscale.process.world import gather_objects
from flipscale.recipe.recipe import Recipe, conflicts, deciding_part, to_yaml
from flipscale.recipe.schedule import Schedule
from flipscale.start.precomputed import embedded_by
from flipscale.start.setup import compiles

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flipscale.engines.engine import Engine
    from flipscale.model import FlipPreTrainedModel

_log = logging.getLogger(__name__)


def open_run_directory(recipe: Recipe) -> Path | None:
    """Return the checkpoint to resume from, None for a fresh start. Every process calls this before any of them writes.
    Raise UserError if the directory holds a run of another recipe, or a checkpoint against `resume_from_checkpoint`."""
    run_dir = Path(recipe.output_dir)
    if recipe.resume_from_checkpoint not in ("auto", "never"):
        raise UserError(f"resume_from_checkpoint is {recipe.resume_from_checkpoint!r}; use 'auto' or 'never'")
    check_writable(recipe.output_dir, "output_dir")
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None and (run_dir / "model").exists() and not (run_dir / "DONE").exists():
        raise UserError(
            f"{run_dir}/model has no checkpoint, and training would replace it; move it, or use another output_dir"
        )
    saved = run_dir / "recipe.yaml"
    # Without this file, the checkpoints' own copies are compared later.
    changed = conflicts(recipe, read_saved_recipe(saved)) if saved.exists() else []
    _refuse_another(run_dir, changed)
    if checkpoint is not None and recipe.resume_from_checkpoint == "never":
        raise UserError(f"{run_dir} holds {checkpoint.name} and resume_from_checkpoint is 'never'; change output_dir")
    return checkpoint


def is_done(recipe: Recipe, checkpoint: Path | None) -> bool:
    """Return whether the recipe's run is done, even if its checkpoints and its model are gone.

    A recipe with added stages is not done. They need a checkpoint of the same run.
    """
    run_dir = Path(recipe.output_dir)
    if not (run_dir / "recipe.yaml").exists() or not (run_dir / "DONE").exists():
        return False
    # The checkpoint's copy, because the stages may have been added to the run's own file.
    finished = run_dir / "recipe.yaml" if checkpoint is None else checkpoint / "recipe.yaml"
    saved = read_saved_recipe(finished)
    if len(recipe.stages) <= len(saved.get("stages") or []):
        missing = "" if (run_dir / "model").exists() else ", but its model is gone"
        if missing and checkpoint is not None:
            missing += f": `flipscale export {quoted(run_dir)}` writes it again"
        longer = "add a stage to train on"
        if recipe.budget_minutes is not None:
            longer = f"train on in a run of its own, with model.init_from {run_dir}/model and another output_dir"
        fix = f"remove it, or choose another output_dir, to train again, or {longer}"
        _log.info("%s is done%s; %s", run_dir, missing, fix)
        return True
    if checkpoint is None:
        raise UserError(
            f"{run_dir} is done and keeps no checkpoint for another stage; train the stage as a run of its own, "
            f"with model.init_from {run_dir}/model and another output_dir"
        )
    _refuse_another(run_dir, conflicts(recipe, saved))
    return False


def _refuse_another(run_dir: Path, changed: Sequence[str]) -> None:
    if not changed:
        return
    fix = "use that recipe or another output_dir"
    if re.match(r"stages\[\d+\]: None", changed[0]):
        fix += "; a stage that is added needs a base_lr"
    # The weights fit the recipe's model.
    if not any(re.match(r"model\.(?!init_from)", change) for change in changed) and (run_dir / "model").exists():
        new = next(name for number in count(2) if not os.path.exists(name := f"{run_dir}_{number}"))
        flags = shlex.join(["--model.init_from", str(run_dir), "--output_dir", new])
        fix += f"; to train its model on with this recipe, add {flags}"
    raise UserError(f"{run_dir} holds a run of another recipe ({'; '.join(changed)}); {fix}")


class StartTimings(dict[str, float]):
    """The seconds of each part of a start: imports, data, processes, checkpoint. It begins with the process if
    `of_process`, else now."""

    def __init__(self, of_process: bool = False) -> None:
        ticks = (of_process and start_of(os.getpid())) or math.inf  # since the boot; unknown without /proc
        self._last = min(float(ticks) / os.sysconf("SC_CLK_TCK"), time.clock_gettime(time.CLOCK_BOOTTIME))

    def end(self, part: str) -> None:
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        self[part], self._last = round(now - self._last, 2), now


def join(
    setup: TrainingSetup,
    timings: StartTimings,
    test_sets: Mapping[str, Any] | None = None,
    worker_modules: Sequence[str] = (),
) -> Session:
    """Collective. Start the processes; agree on the data and on the newest undamaged checkpoint.

    `test_sets` are digests of the test sets by task. The server of workers imports `worker_modules`.

    Raises:
        UserError: processes are missing, their recipes, launches, data or run directories differ, the data is not the
            checkpoint's, all checkpoints are damaged, or another run has the run directory.
        OSError: a checkpoint cannot be read, or the run directory is not writable.
    """
    recipe, source = setup.recipe, setup.source
    run_dir = Path(recipe.output_dir)
    with watched(recipe, int(os.environ.get("RANK", "0")), "the start of the processes"):
        accelerator = start_accelerator(recipe.log.report_to, recipe.output_dir, is_watched=True)
        # Now, because accelerate may bind this process to the cores near its GPU, and workers inherit them.
        prepare_workers(worker_modules)
        _refuse_other_settings(accelerator, {**_shared_settings(recipe), "test sets": dict(test_sets or {})})
        # A node's copy of the data may be older or incomplete, and its order of samples would differ.
        digest = setup.fingerprint
        digests_found = accelerator.gather(torch.tensor([digest], device=accelerator.device)).tolist()
        if others := [rank for rank, found in enumerate(digests_found) if found != digests_found[0]]:
            raise UserError(
                f"processes {', '.join(map(str, others))} of {len(digests_found)} found other numbers of samples in "
                "the shards than process 0, or other data.weights, so that they would read them in another order; make "
                "the nodes' copies the same"
            )
        lock = FolderLock(run_dir / "run.lock", f"trains in {run_dir}")
        holder = from_main_process(accelerator, lock.acquire)
        session = Session(accelerator, None, {}, lock=lock if accelerator.is_main_process else None)
        timings.end("processes")
        try:
            places = gather_objects([(lock.shows(holder), platform.node())])
            if unseen := [f"{rank} on {host}" for rank, (is_seen, host) in enumerate(places) if not is_seen]:
                raise UserError(
                    f"processes {', '.join(unseen)} do not see the {lock.path.name} of process 0 on {places[0][1]} in "
                    "output_dir; name the same folder for all, on a file system that all machines share"
                )
            chosen = latest_valid(accelerator, run_dir, lambda contents: _check_same_run(setup, contents))
            if chosen is None:
                return session
            checkpoint, state, _ = chosen
            if (state["data_samples"], state["data_fingerprint"]) != (len(source), digest):
                raise UserError(
                    f"{checkpoint} was trained on {state['data_samples']} samples, the data now has {len(source)} or "
                    "in other shards, or other data.weights or stored features; the samples would change: use the "
                    "same data or another output_dir"
                )
            if state.get("data_lengths", setup.lengths_digest) != setup.lengths_digest and accelerator.is_main_process:
                message = "%s was trained on shards of other lengths than the data has, with as many samples; unless "
                message += "these are the same samples, stop the run and use the same data or another output_dir"
                _log.warning(message, checkpoint)
        except BaseException:
            session.release_lock()
            raise
        return Session(accelerator, *chosen, lock=session.lock)


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

    with watched(recipe, session.accelerator.process_index, "the building of the model"):
        engine = build_engine(session.accelerator, launch, recipe.optim, recipe.data.global_batch_size)
        # A stage may start its optimisers afresh, without the checkpoint's moments.
        num_steps = 0 if first.resets_optimizer else session.state.get("optimizer_steps", 0)
        engine.build(config, configure, fill, model_class, first.stage.frozen, reader, num_steps)
    return engine


def _shared_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that all processes must have in common. Paths may differ between machines."""
    launch, fields = launch_of(os.environ), yaml.safe_load(to_yaml(recipe))
    settings = deciding_part(fields, name_of=lambda path: "") | {name: fields[name] for name in ("log", "save")}
    settings["eval"] = {name: fields["eval"][name] for name in ("every_samples", "every_share")}
    return settings | {"launch": [launch.engine, launch.precision, launch.shard_size]}


def _refuse_other_settings(accelerator: Accelerator, mine: dict[str, Any]) -> None:
    """Collective. Raise UserError on all processes if one has other settings than the first."""
    first = from_main_process(accelerator, lambda: mine)
    for rank, (host, changed) in enumerate(gather_objects([(platform.node(), sorted(changed_fields(first, mine)))])):
        if changed:
            raise UserError(
                f"process {rank} on {host} has other settings than process 0 ({'; '.join(changed)}); start all "
                "processes with one recipe, the same flags, launch file and test sets"
            )


@contextmanager
def watched(recipe: Recipe, rank: int, work: str) -> Iterator[None]:
    """End the run if a `with` block shows no sign of life for `log.hang_seconds`."""
    with Watchdog(Path(recipe.output_dir), recipe.log.hang_seconds, rank) as watch:
        watch.begin(work)
        yield


def _check_same_run(setup: TrainingSetup, contents: Contents) -> None:
    changed = conflicts(setup.recipe, dict(contents.recipe))
    if changed:
        raise CorruptFile(f"it is of a run of another recipe: {'; '.join(changed)}")
    step, samples, total = contents.state["step"], contents.state["samples_seen"], setup.schedule.total_steps
    if total is not None and step > total:
        raise CorruptFile(f"it is of step {step}, and the recipe has {total}")
    if samples != step * setup.batch_size:
        raise CorruptFile(f"state.json has {samples} samples_seen in {step} steps of {setup.batch_size}")
