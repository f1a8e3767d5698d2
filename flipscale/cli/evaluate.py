"""Evaluate models by one protocol: the tasks of a suite, or any task that a recipe may list, as one table."""

import itertools
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flipscale.evaluation.results import RESULTS_FILE, as_metrics
from flipscale.evaluation.task_page import SUITES, read_prepared, suite_pages
from flipscale.io.atomic import write_text
from flipscale.io.command_line import REPEATED, OutputFolder
from flipscale.io.cores import decoding_workers
from flipscale.io.errors import UserError
from flipscale.io.model_folder import fetch_folder, local_folder
from flipscale.io.options import Count, Pairs, Pixels, ShareBelowOne, Workers
from flipscale.io.paths import check_writable, quoted
from flipscale.io.yaml_text import check_yaml
from flipscale.process.console import start_logging
from flipscale.process.state import set_defaults
from flipscale.recipe.outputs import TASKS_DIR

# Everything that embeds and scores is imported where it is needed, because it takes seconds and `--help` needs none.
if TYPE_CHECKING:
    from flipscale.evaluation.embedding import Embedder
    from flipscale.evaluation.kinds.task import Task
    from flipscale.evaluation.masked_images import ImageMask
    from flipscale.evaluation.presentation.masked_results import MaskedResults
    from flipscale.evaluation.presentation.results_page import Column

EVALUATIONS = Path("evaluations")
# Before the name of a model that a Slurm job has still to write; such a model is not looked up.
PENDING = "pending:"
_PREFIX = re.compile(rf"^(?:open_clip:|hf:|untrained:|{PENDING})")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a trained model by zero-shot classification, retrieval or other tasks.

    Args:
        models: A run, such as runs/l16, a model folder, a Hub name, an open_clip model as open_clip:NAME,PRETRAINED, or
            any CLIP or SigLIP of transformers as hf:NAME. few_shot and probe also accept untrained:FOLDER (random
            weights). Several models share one table. Name them first, before the options.
        tasks: Folder in which `flipscale prepare tasks` put the tasks' data. Without --suite and --only, all tasks in
            this folder run. Default: data/tasks.
        suite: Run the prepared tasks of a suite, such as paper, robustness or composition, or all.
        only: Run these tasks, such as cars food101.
        zero_shot: Classify the images of these folders, each with KEY.cls and classnames.txt.
        retrieval: Retrieve images and captions of these folders: shards with KEY.txt. Only an image's own captions are
            right. Where captions name classes, use --task '{kind: retrieval, data: DIR, group_by_caption: true}'.
        task: Run a task in the form of a recipe's eval.tasks, such as '{kind: retrieval, data: DIR, ks: [1, 100]}'. The
            kinds are zero_shot, zero_shot_multilabel, zero_shot_memory, retrieval, multilingual_retrieval,
            multilingual_zero_shot, image_caption_selection, worst_group, few_shot, probe, captioning, likelihood, vqa,
            classification. May be given several times.
        without: Folder that `flipscale prepare audit --tests` wrote. Each result is also reported without the test
            images that are in the training data.
        memory: Also classify --zero_shot with the captions of the nearest training pairs in this folder of `flipscale
            prepare embed`. The images of --validation choose their number and weight.
        validation: Folder like those of --zero_shot, for --memory.
        output_dir: Write results.md and results.png to this folder, and each model's results.jsonl to its own folder in
            it. By default, results.jsonl is written to the model folder, or to evaluations/NAME for other models.
        batch_size: Images or texts embedded at once.
        num_workers: Processes that decode images; 0 decodes in this process. Default: its share of the cores, less one.
        image_size: Image size for tasks that set none, a multiple of the patch size. Default: the model's own.
        dims: Cut the embeddings to their first numbers. Several widths, such as 16 32 64, make a table.
        mask_ratio: Remove this fraction of each image's patches. Several ratios make a table of accuracy against the
            encoder's FLOPs.
        mask_views: Average the embeddings of this many disjoint views of an image. Each number is combined with each
            ratio that leaves room for disjoint views.
        mask_kind: Kind of masks: random, grid, block or centre.
        json: Print one JSON line instead of a table.
        dry_run: Find the models and the test sets, and evaluate nothing.
    """

    models: list[str]
    _: KW_ONLY
    tasks: Path | None = None
    suite: str | None = None
    only: list[str] = field(default_factory=list)
    zero_shot: list[str] = field(default_factory=list)
    retrieval: list[str] = field(default_factory=list)
    task: list[str] = field(default_factory=list, metadata=REPEATED)
    without: Path | None = None
    memory: str | None = None
    validation: str | None = None
    output_dir: OutputFolder | None = None
    batch_size: Pairs = 256
    num_workers: Workers | None = None
    image_size: Pixels | None = None
    dims: list[Count] = field(default_factory=list)
    mask_ratio: list[ShareBelowOne] = field(default_factory=lambda: [0.0])
    mask_views: list[Count] = field(default_factory=lambda: [1])
    mask_kind: str = "random"
    json: bool = False
    dry_run: bool = False

    def run(self) -> None:
        """Print the results as one table and write them next to the models. If a model cannot be loaded, the other
        models still get their results, and the command ends with the error."""
        # Beside other work, torch's OpenMP threads would spend most of their time on spinning for each other: on two
        # busy cores, an evaluation of 10 seconds of work used 30. The variable counts only before torch is imported.
        set_defaults(OMP_WAIT_POLICY="passive")
        models = name_models(self.models, self.output_dir)  # before the slow imports
        from flipscale.engines.build_engine import start_accelerator
        from flipscale.evaluation import masked_images
        from flipscale.evaluation.decontaminated import with_clean_tasks
        from flipscale.evaluation.embedding import agreed
        from flipscale.evaluation.foreign_models import OPEN_CLIP
        from flipscale.evaluation.model_results import evaluate_model, read_result_lines
        from flipscale.evaluation.presentation.masked_results import MaskedResults
        from flipscale.evaluation.presentation.results_page import Column
        from flipscale.hub.card import refresh_card
        from flipscale.hub.loading import OTHERS, open_embedder

        start_logging()
        tasks, masks = _tasks(self), (self.mask_ratio, self.mask_views, self.mask_kind)
        others = [model.given for model in models if model.given.startswith(tuple(OTHERS))]
        masked_images.check_mask_arguments(*masks, others, tasks)
        for task in tasks:
            task.check()
        if self.dry_run:
            for model in models:
                if not model.given.startswith((OPEN_CLIP, PENDING)):
                    fetch_folder(_PREFIX.sub("", model.given), ["config.json"])
            return print(f"can evaluate {', '.join(self.models)} on {', '.join(task.name for task in tasks)}")
        if self.without:
            tasks = with_clean_tasks(tasks, self.without)
        workers = decoding_workers(self.num_workers)  # before accelerate binds this process to some cores
        accelerator = start_accelerator([], ".")
        home = self.output_dir or (models[0].home if len(models) == 1 else EVALUATIONS)
        if accelerator.is_main_process:
            for folder in (home, *(model.home for model in models)):
                check_writable(folder, "the folder of results")
            for model in models:
                read_result_lines(model.home / RESULTS_FILE)
        columns: list[Column] = []
        widths: list[int | None] = [*dict.fromkeys(self.dims)] or [None]
        widest = max(self.dims, default=None)
        by_mask: list[MaskedResults] = []
        faults: list[UserError | OSError] = []
        for model in models:
            opened = partial(open_embedder, model.given, accelerator, self.batch_size, workers, widest)
            try:
                embedder = agreed(accelerator, opened)
            except (UserError, OSError) as error:
                if len(models) == 1:
                    raise
                _log.warning("%s; the other models are evaluated", error)
                faults.append(error)
                continue
            embedder = embedder.at(self.image_size)
            for dims, mask in itertools.product(widths, masked_images.asked_masks(*masks, embedder)):
                seen = masked_images.masked_embedder(replace(embedder, dims=dims), mask)
                lines = evaluate_model(seen, model.name, model.home / RESULTS_FILE, tasks, model.folder)
                cuts = [*([f"{dims} numbers"] if dims else []), *([] if mask == masked_images.WHOLE else [mask.label])]
                columns.append(Column(", ".join([model.name, *cuts]), lines))
                if any(self.mask_ratio):
                    name = f"{model.name}, {dims} numbers" if dims else model.name
                    cost = _image_flops(embedder, mask), _image_flops(embedder, masked_images.WHOLE)
                    by_mask.append(MaskedResults(name, mask, *cost, [line.result for line in lines]))
                if accelerator.is_main_process and model.home == model.folder:
                    refresh_card(model.folder, lines)
            del embedder  # frees its memory for the next model
        if accelerator.is_main_process and columns:
            self._show(columns, by_mask, home)
        if faults:
            messages = "; ".join(map(str, faults))
            raise type(faults[0])(f"{len(faults)} of {len(models)} models were not evaluated: {messages}")
        accelerator.end_training()

    def _show(self, columns: Sequence["Column"], by_mask: Sequence["MaskedResults"], home: Path) -> None:
        """Write the table and the figure of results to folder `home`, and print them as the arguments say."""
        from flipscale.evaluation.presentation.figures import can_draw
        from flipscale.evaluation.presentation.masked_results import draw_masked_results, mask_table
        from flipscale.evaluation.presentation.results_page import draw_results, results_table, suite_tables

        is_all = self.suite or (self.tasks and not self.only)
        suites = [self.suite] if self.suite in SUITES else list(SUITES) if is_all else []
        home.mkdir(parents=True, exist_ok=True)
        write_text(home / "results.md", results_table(columns, suites))
        (home / "results.png").unlink(missing_ok=True)  # it may show other models or tasks
        if can_draw() and by_mask:
            draw_masked_results(by_mask, home / "results.png")
        elif can_draw():
            draw_results(columns, home / "results.png")
        if by_mask:
            print(json.dumps([row.as_json() for row in by_mask]) if self.json else mask_table(by_mask))
        elif self.json:
            metrics = {column.name: as_metrics(line.result for line in column.lines) for column in columns}
            print(json.dumps(metrics if len(self.models) > 1 or self.dims else metrics[columns[0].name]))
        else:
            print(suite_tables(columns, suites))


@dataclass(frozen=True)
class NamedModel:
    """A model to evaluate.

    Args:
        name: name in tables and lines, without the path of a folder.
        folder: local flipscale model folder; None for other models.
        home: folder of its `results.jsonl`.
    """

    given: str
    name: str
    folder: Path | None
    home: Path


def name_models(given: Sequence[str], output_dir: Path | None) -> list[NamedModel]:
    """Return the models of a command.

    Results of a local model folder go into the folder itself, results of other models into `evaluations/NAME/`. With
    `output_dir`, all go into `OUTPUT_DIR/NAME/`."""
    names = [_short_name(text) for text in given]
    # Runs in different folders may have one name. Then the whole path is the name.
    names = [text if names.count(name) > 1 else name for text, name in zip(given, names, strict=True)]
    slugs = [re.sub(r"[^\w.,-]+", "-", os.path.normpath(name)).strip("-") for name in names]
    models = []
    for text, name, slug in zip(given, names, slugs, strict=True):
        if slugs.count(slug) > 1:
            raise UserError(f"{slugs.count(slug)} models are called {name!r}; name each model once ({text})")
        folder = None if _PREFIX.match(text) else local_folder(text)
        home = (output_dir or EVALUATIONS) / slug if output_dir or folder is None else folder
        models.append(NamedModel(text, name, folder, home))
    return models


def _short_name(text: str) -> str:
    """Return a run's name for `RUN/model`, the last part of a path, and any other text unchanged."""
    prefix, names = (_PREFIX.match(text) or [""])[0], []
    for name in text.removeprefix(prefix).split(","):
        parts = Path(name).absolute().parts if Path(name).exists() else (name,)
        names.append(parts[-2] if parts[-1] == "model" and len(parts) > 2 else parts[-1])
    return prefix + ",".join(names)


def _image_flops(embedder: "Embedder", mask: "ImageMask") -> float:
    """Return the operations of the image tower and its projection for an image under `mask`, all views together."""
    from flipscale.model import FlipForConditionalGeneration
    from flipscale.model.configuration_flip import embedded_towers
    from flipscale.objectives.captioning import CaptionLoss
    from flipscale.planning.flops import PLAIN, StepShape, forward_flops

    config = embedder.model.config
    loss = CaptionLoss() if isinstance(embedder.model, FlipForConditionalGeneration) else PLAIN
    stored = ("texts",) if "text_model" in embedded_towers(config) else ()
    step = StepShape(1, mask.ratio, mask.views, image_size=embedder.pixels, stored=stored)
    count = forward_flops(config, step, loss).modules
    # A CLIPModel has its own name of the projection, and a SiglipModel has no projection.
    return sum(count.get(part, 0) for part in ("vision_model", "image_projection", "visual_projection"))


def _tasks(args: Evaluate) -> list["Task"]:
    """Return the tasks that the arguments ask for; tasks on the same data are consecutive."""
    from flipscale.evaluation.suite import build_tasks

    listed: list[str | dict[str, Any]] = []
    for kind in ("zero_shot", "retrieval"):
        listed += _tasks_of_folders(kind, getattr(args, kind))
    if (args.memory or args.validation) and not (args.memory and args.validation and args.zero_shot):
        raise UserError("--memory FEATURES needs --validation DIR and --zero_shot DIR; give all three or none")
    for one in _tasks_of_folders("zero_shot", args.zero_shot if args.memory else []):
        blended = {"kind": "zero_shot_memory", "memory": args.memory, "validation": args.validation}
        listed.append({**one, **blended, "name": f"{one['name']}_memory"})
    for text in args.task:
        try:
            check_yaml(text, "--task")
            task = yaml.safe_load(text)
        except yaml.YAMLError:
            task = None
        if not isinstance(task, dict):
            raise UserError(f"--task is {text!r}; write it like '{{kind: retrieval, data: DIR}}'")
        listed.append(task)
    tasks_dir = args.tasks or Path(TASKS_DIR)
    listed += _pages(args, tasks_dir)
    if not listed:
        raise UserError(
            "nothing to evaluate; give --suite NAME, --only NAME ..., --zero_shot DIR ..., --retrieval DIR ... or "
            "--task '{kind: ..., data: ...}'"
        )
    tasks = build_tasks(listed, tasks_dir)
    if args.image_size is not None:
        tasks = [replace(task, image_size=task.image_size or args.image_size) for task in tasks]
    first = {task.data: number for number, task in reversed(list(enumerate(tasks)))}
    return sorted(tasks, key=lambda task: first[task.data])


def _tasks_of_folders(kind: str, folders: Sequence[str]) -> list[dict[str, str]]:
    """Return a task for each folder. Several are named by their folders, or by the paths of folders of one name."""
    from flipscale.evaluation.model_results import data_name

    places = {os.path.normpath(folder): folder for folder in folders}
    names = [*map(data_name, places)]
    names = [path if names.count(name) > 1 else name for path, name in zip(places, names, strict=True)]
    slugs = [re.sub(r"[^\w.-]+", "-", name).strip("-") for name in names]
    own = [f"{kind}_{slug}" if len(slugs) > 1 else kind for slug in slugs]
    return [{"kind": kind, "name": name, "data": data} for name, data in zip(own, places.values(), strict=True)]


def _pages(args: Evaluate, tasks_dir: Path) -> list[str]:
    """Return the names of tasks with a page: `--only`, or the prepared ones of a suite."""
    if args.only and args.suite:
        raise UserError("--only and --suite are both given; give one of them")
    if args.only:
        return args.only
    if args.suite is None and args.tasks is None:
        return []
    pages = suite_pages(args.suite or "all")
    prepared = [page.name for page in pages if read_prepared(tasks_dir / page.data) is not None]
    if not prepared:
        which = f"of suite {args.suite} " if args.suite else ""
        raise UserError(
            f"no task {which}is prepared in {tasks_dir}; run `flipscale prepare tasks {quoted(tasks_dir)} --suite "
            f"{args.suite or 'paper'}`"
        )
    missing = [page.name for page in pages if page.name not in prepared]
    if args.suite and missing:
        _log.info("not prepared in %s, so left out: %s", tasks_dir, ", ".join(missing))
    return prepared
