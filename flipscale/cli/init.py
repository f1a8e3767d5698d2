"""Write a recipe for your data, your machine and your time. Comments give the reasons for its fields."""

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import TYPE_CHECKING, Any

from flipscale.io.cores import usable_cores
from flipscale.io.errors import UserError
from flipscale.io.options import Count, MinutesAboveZero, Positive
from flipscale.io.paths import check_writable, is_utf8, quoted
from flipscale.process.state import changed_environment

if TYPE_CHECKING:
    from flipscale.data.samples import Source
    from flipscale.planning.proposal import Proposal, Survey
    from flipscale.recipe.data import SourceRecipe
    from flipscale.studies.finetuning import Start

_MINUTES, _START_MINUTES = 30.0, 10.0
# Steps of each stage for measuring the speed.
_MEASURED_STEPS = 12


@dataclass(frozen=True)
class Init:
    """Write a recipe for your data, your machine and your time.

    With --start, the recipe fine-tunes a model. Short trials on a held-out part of the pairs choose what is trained,
    the rate and the length. They take three times as long as the training. No recipe is written if the model is better
    as it is.

    Args:
        recipe: The file to write, such as mine.yaml. It must not exist.
        shards: The training data, as in data.shards of a recipe, or a saved data set or Parquet files with images.
        start: A model to fine-tune: a run, a model folder, a Hub name, or an open_clip model as
            open_clip:NAME,PRETRAINED. Or an image tower and a text tower, see model.vision and model.text of a recipe.
        guards: With --start: labelled test sets of old abilities, whose losses are reported first. Default: the
            zero-shot and retrieval tasks of the start's own recipe, or small ones prepared in data/tasks.
        replay: Old pairs with --start, as in --shards. Half of each batch is drawn from them, against forgetting.
            Default: the pairs of the start's own recipe, if they are on this machine.
        tokenizer: A folder that `flipscale prepare tokenizer` wrote, or a name on the Hub. Default: bert, or the
            tokenizer of the start.
        tests: A labelled test set that `flipscale prepare shards --labels` wrote.
        minutes: Training time on this machine. Its speed is measured. Default: 30, or 10 with --start. With
            --start, trials before the training take three times as long.
        gpu: The kind of GPU for training elsewhere, such as h100 or rtx_4090.
        num_gpus: Number of these GPUs.
        hours: Training time on these GPUs. Their speed is computed.
    """

    recipe: Path
    _: KW_ONLY
    shards: str
    start: list[str] = field(default_factory=list)
    guards: list[str] = field(default_factory=list)
    replay: str | None = None
    tokenizer: str | None = None
    tests: str | None = None
    minutes: MinutesAboveZero | None = None
    gpu: str | None = None
    num_gpus: Count = 1
    hours: Positive | None = None

    def run(self) -> None:
        """Survey the data, propose a recipe, find its speed, and write it."""
        _check_options(self)
        with _claimed(self.recipe):
            self._propose()

    def _propose(self) -> None:
        # Imported here, because torch and transformers take seconds and --help should not wait.
        import torch

        from flipscale.data.sources.opening import open_source
        from flipscale.data.tokenizers import check_tokenizer, load_tokenizer, num_entries
        from flipscale.objectives.build_objective import build_config
        from flipscale.planning.proposal import LEAST_PAIRS, propose, survey
        from flipscale.preparation.lists import source_of
        from flipscale.process.console import start_logging
        from flipscale.recipe.data import DataRecipe

        start_logging()
        named = source_of(self.shards)
        source = open_source(DataRecipe(sources=[named], max_bad_fraction=1.0))
        if len(source) < LEAST_PAIRS:
            raise UserError(f"{self.shards} has {len(source)} pairs; training needs at least {LEAST_PAIRS}")
        if self.start:
            return _write_from_start(self, source, named)
        name = self.tokenizer or "bert"
        try:
            tokenizer = load_tokenizer(name, 64)
        except ValueError as error:
            raise UserError(
                f"{error}; `flipscale prepare tokenizer {quoted(self.shards)} DIR` makes one of captions"
            ) from error
        data = survey(source, tokenizer)
        print(f"{self.shards}: {data}", flush=True)
        num_gpus = self.num_gpus if self.gpu else int(torch.cuda.is_available())
        minutes = 60 * self.hours if self.hours else self.minutes or _MINUTES
        proposal = propose(
            *(data, minutes, usable_cores(), num_gpus),
            source=named,
            tokenizer=name,
            # A folder's vocab_size follows from the folder.
            vocab_size=None if Path(name).is_dir() else num_entries(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            packs=tokenizer.padding_side == "right",
            tasks=list(_tasks(self.tests)) if self.tests else [],
            output_dir=f"runs/{self.recipe.stem}",
        )
        check_tokenizer(tokenizer, build_config(proposal.recipe()).text_config)
        budget, speed = _length(self, proposal, data, minutes)
        free = _free(self)
        command = _command(free)
        facts = [f"Data: {data}", f"Time: {speed}", *(f"Warning: {warning}" for warning in proposal.warnings)]
        _write(free.recipe, proposal.text([*(f"{fact}." for fact in facts), command], budget))
        for warning in proposal.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if reason := proposal.values["few_classes"]:
            print(f"{reason}; if their names are all you need, see loss.kind classify in docs/your_pictures.md")
        print(f"{free.recipe}: {speed}")
        print(f"next: {command}")


@contextmanager
def _claimed(recipe: Path) -> Iterator[None]:
    """Hold the lock of a recipe that is to be written. Raise UserError if another command holds it."""
    from filelock import FileLock, Timeout

    recipe.parent.mkdir(parents=True, exist_ok=True)
    file = recipe.with_name(f".{recipe.name}.lock")
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another `flipscale init` writes {recipe}; wait for it to end, or name another file") from None
    before = dict[signal.Signals, Any]()

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)  # so that the lock and the trials are removed

    is_main = current_thread() is main_thread()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1) if is_main else ():
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, end)
    wakeup = (
        signal.set_wakeup_fd(-1) if is_main else -1
    )  # else the command's own listener would end the process at once
    try:
        yield
    finally:
        if is_main:
            signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        file.unlink(missing_ok=True)  # while it is held, so that no other process waits for a removed file
        lock.release()


def _write_from_start(args: Init, source: "Source", named: "SourceRecipe") -> None:
    """Write a recipe that fine-tunes the start. A start that was converted for a recipe is removed without one."""
    from flipscale.studies.finetuning import open_start

    converted = Path("models") / f"{args.recipe.stem}_start"
    was_there = converted.exists()
    start = open_start(args.start, converted)
    try:
        _search(args, start, source, named)
    finally:
        if start.name == str(converted) and not was_there and not args.recipe.exists():
            shutil.rmtree(converted)


def _search(args: Init, start: "Start", source: "Source", named: "SourceRecipe") -> None:
    """Search for a recipe that fine-tunes the start, print the report, and write the recipe if it wins anything."""
    import torch

    from flipscale.data.samples import contents_digest
    from flipscale.data.sources.opening import open_source
    from flipscale.data.tokenizers import load_tokenizer
    from flipscale.engines.launch import faster_precision
    from flipscale.planning.proposal import survey
    from flipscale.preparation.lists import source_of
    from flipscale.pretrain import pretrain
    from flipscale.process.preemption import Stopped
    from flipscale.recipe.data import DataRecipe
    from flipscale.studies.finetuning import find_replay, half_of_batches, propose_finetuning

    named_old = [source_of(args.replay)] if args.replay else find_replay(start.name)
    digest = contents_digest(source)
    replay = [one for one in named_old if contents_digest(open_source(DataRecipe(sources=[one]))) != digest]
    if len(replay) < len(named_old):
        print(f"{args.shards}: these are old pairs too. None are replayed, so that no trial sees held-out pairs")
    start = replace(start, replay=(replay := half_of_batches(replay)))
    tokenizer = load_tokenizer(start.tokenizer, 64)
    data = survey(source, tokenizer)
    print(f"{args.shards}: {data}", flush=True)
    for old in replay:
        print(f"{old.shards or old.dataset}: old pairs, {old.weight:.3g} of each batch", flush=True)
        survey(open_source(DataRecipe(sources=[old], max_bad_fraction=1.0)), tokenizer)  # refuses bad pairs
    tests = [{**task, "name": f"new_{task['kind']}"} for task in (_tasks(args.tests) if args.tests else ())]
    several = len(args.guards) > 1
    guards = [
        {**task, "name": f"old{number if several else ''}_{task['kind']}"}
        for number, folder in enumerate(args.guards, 1)
        for task in _tasks(folder, "guards")
    ]
    faster = faster_precision(os.environ)
    # The trials' own lines, and transformers' about the weights of each trial.
    levels = {logger: logger.level for logger in map(logging.getLogger, ("flipscale", "transformers"))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder, changed_environment(**faster):
            lines, recipe, alpha = propose_finetuning(
                *(pretrain, start, source, named, data, args.minutes or _START_MINUTES, Path(folder), tests, guards),
                output_dir=f"runs/{args.recipe.stem}",
                num_workers=None if torch.cuda.is_available() else 0,
            )
    except Stopped:
        raise KeyboardInterrupt from None
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
    print("\n".join(["", *lines]))
    if not recipe:
        return
    free = _free(args)
    _write(free.recipe, recipe)
    print(f"next: {_command(free)}")
    if alpha < 1.0:
        mixed = f"--interpolate {quoted(start.name)} --alpha {alpha:g} --out models/{quoted(args.recipe.stem)}"
        print(f"then: flipscale export runs/{quoted(args.recipe.stem)} {mixed}")


def _free(args: Init) -> Init:
    """Return the arguments with another recipe file, if something was given its name since the start."""
    file, number = args.recipe, 1
    while os.path.lexists(file):
        number += 1
        file = args.recipe.with_stem(f"{args.recipe.stem}_{number}")
    if file != args.recipe:
        print(f"warning: {args.recipe} was made meanwhile, so the recipe is {file}", file=sys.stderr)
    return replace(args, recipe=file)


def _write(file: Path, text: str) -> None:
    """Write a new recipe, and check it."""
    from flipscale.start.complete_recipe import parse_recipe

    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "x", encoding="utf-8") as opened:
        opened.write(text)
    parse_recipe(["--config", str(file.absolute())])


def _check_options(args: Init) -> None:
    for name in ("recipe", "shards", "tokenizer", "tests", "start", "guards", "replay"):
        if not is_utf8(str(getattr(args, name))):
            raise UserError(f"{name} is not UTF-8, and a recipe is; rename it")
    if os.path.lexists(args.recipe):
        raise UserError(f"{args.recipe} is there already; name another file, or remove it")
    check_writable(args.recipe, "recipe")
    if args.recipe.suffix not in (".yaml", ".yml"):
        raise UserError(f"{args.recipe} has no ending .yaml; name a file such as mine.yaml")
    for name, value in () if args.start else (("guards", " ".join(args.guards)), ("replay", args.replay)):
        if value:
            raise UserError(f"{name} is {value}, of what a model must not lose; add --start MODEL")
    for name in ("tokenizer", "gpu") if args.start else ():
        if (value := getattr(args, name)) is not None:
            own = "the start has its own" if name == "tokenizer" else "trials run on this machine"
            raise UserError(f"{name} is {value!r} and start is {' '.join(args.start)}; {own}, so leave {name} out")
    if (args.gpu is None) != (args.hours is None):
        raise UserError("gpu and hours go together, for machines elsewhere; give both, or minutes for this machine")
    if args.gpu is not None and args.minutes is not None:
        raise UserError("minutes is for this machine and gpu for others; leave one of them out")
    if args.gpu is None and args.num_gpus != 1:
        raise UserError("num_gpus is for machines elsewhere; add gpu and hours, or leave it out")
    if args.gpu is not None:
        from flipscale.engines.device import gpu_named
        from flipscale.planning.memory import GPUS_OF_A_NODE

        gpu_named(args.gpu)
        if args.num_gpus > GPUS_OF_A_NODE and args.num_gpus % GPUS_OF_A_NODE:
            raise UserError(f"num_gpus is {args.num_gpus}; above {GPUS_OF_A_NODE}, take whole nodes, a multiple of it")


def _tasks(folder: str, option: str = "tests") -> Iterator[dict[str, Any]]:
    """Yield the evaluations that a test set allows: by its class names, and by its captions."""
    from flipscale.data.samples import SampleNumbers
    from flipscale.evaluation.test_set import TestSet

    source = (test_set := TestSet.open(folder)).source
    # A single class is right for every image.
    named = (Path(folder) / "classnames.txt").exists() and len(test_set.class_names()) > 1
    captioned = len(source) > 0 and bool(source.read_captions(*SampleNumbers(source)[0]))  # a shard may be empty
    if named:
        yield {"kind": "zero_shot", "data": folder}
    if captioned:
        yield {"kind": "retrieval", "data": folder, "group_by_caption": True}
    if not named and not captioned:
        raise UserError(
            f"{option} {folder} has neither two names in classnames.txt nor captions, so no evaluation is possible; "
            "`flipscale prepare shards --labels` writes a test set"
        )


def _length(args: Init, proposal: "Proposal", data: "Survey", minutes: float) -> tuple[float, str]:
    """Return the useful part of `minutes` of training, and a text with its speed, pairs and epochs."""
    import torch

    from flipscale.engines.device import GPUS, gpu_named
    from flipscale.planning.measured_speed import measured_rates
    from flipscale.planning.time import UnknownHardware, planned_hardware, step_time

    if args.gpu:
        name = gpu_named(args.gpu)
        recipe, launch = proposal.fit(args.num_gpus, GPUS[name].gib)
        try:
            hardware = planned_hardware(recipe, name, args.num_gpus, "", None, None)
        except UnknownHardware as unknown:
            return minutes, f"{minutes / 60:g} hours of training; {unknown}"
        how = f"as computed for {args.num_gpus} {name} (docs/planning.md)"
        rates = [proposal.batch_size / step_time(recipe, launch, stage, hardware).seconds for stage in recipe.stages]
    else:
        if torch.cuda.is_available():
            proposal.fit(1, torch.cuda.get_device_properties(0).total_memory // 2**30)
        print(f"measuring the speed: a trainer starts and takes {_MEASURED_STEPS} steps of each stage", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            rates, how = measured_rates(proposal.recipe(), _MEASURED_STEPS, Path(folder)), "as measured here"
    in_time = proposal.samples_in(60 * minutes, rates)
    if in_time < proposal.batch_size:
        raise UserError(f"{minutes:g} minutes are less than a step takes; give more minutes or hours")
    samples = min(in_time, proposal.most_samples)
    took, epochs = minutes * samples / in_time, samples / data.pairs
    unit, factor = ("hours", 1 / 60) if took / 60 >= 2 else ("minutes", 1) if took >= 2 else ("seconds", 60)
    words = f"about {samples:,} pairs in {took * factor:,.0f} {unit} of training, at {rates[0]:,.0f} pairs/s masked, "
    words += f"and {rates[1]:,.0f} whole, {how}; "
    words += f"{epochs:,.0f} times each pair" if epochs >= 2 else f"{epochs:.0%} of the pairs"
    words += "; more pairs would teach it more than more time" if samples < in_time else ""
    return float(f"{took:.3g}"), words


def _command(args: Init) -> str:
    """Return the command that trains the recipe on the machines of the options."""
    from flipscale.planning.memory import GPUS_OF_A_NODE

    files = "" if Path("ds_configs/ddp.yaml").exists() else "flipscale launch_files . && "
    recipe, run_dir = quoted(args.recipe), quoted(f"runs/{args.recipe.stem}")
    if args.gpu and args.num_gpus > GPUS_OF_A_NODE:
        nodes = args.num_gpus // GPUS_OF_A_NODE
        where = f"RECIPE={recipe} RUN={run_dir} LAUNCH_FILE=ds_configs/ddp.yaml"
        return f"{files}{where} bash slurm/pretrain.sh --nodes={nodes}"
    if args.gpu and args.num_gpus > 1:
        launcher = f"accelerate launch --config_file ds_configs/ddp.yaml --num_processes {args.num_gpus}"
        return f"{files}{launcher} -m flipscale.pretrain --config {recipe}"
    from flipscale.engines.launch import faster_precision

    faster, verb = {} if args.gpu else faster_precision(os.environ), "finetune" if args.start else "pretrain"
    return "".join(f"{name}={value} " for name, value in faster.items()) + f"flipscale {verb} --config {recipe}"
