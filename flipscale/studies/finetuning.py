"""`flipscale init --start`: a fine-tuning recipe for a model and other pairs, by short trials on a held-out part.

Three rungs of successive halving have the minutes of the training each. Each trial is a whole schedule, and the last
one is as long as the training. Rates are multiples of 5e-4 at a width of 128, and fall with the width's square: 1.4e-5
for B/16. A mask needs a grid of 14 patches, as B/16 has at 224 pixels.
"""

import hashlib
import math
import re
import shutil
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flipscale.data.captions import choose_captions
from flipscale.data.decode import decode_whole
from flipscale.data.samples import BadSample, Source
from flipscale.data.sources.opening import open_shards, open_source
from flipscale.data.sources.pair_set import named_shards
from flipscale.data.sources.tar import TarSource, add_member
from flipscale.engines.build_engine import start_accelerator
from flipscale.engines.checkpoint import latest_checkpoint
from flipscale.engines.first_weights import model_without_storage
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.intervals import Estimate, mean_estimate, student
from flipscale.evaluation.kinds.task import Task
from flipscale.evaluation.metrics import recall_chance, recall_hits
from flipscale.evaluation.results import LOST, POINTS, Result, change_of
from flipscale.evaluation.suite import build_tasks, listed_tasks, run_tasks, with_page
from flipscale.evaluation.task_page import read_prepared, suite_pages
from flipscale.hub.convert_transformers import convert_from_open_clip
from flipscale.hub.export import export_checkpoint
from flipscale.hub.loading import load_dual_encoder, open_embedder
from flipscale.io.errors import UserError, first_line
from flipscale.io.json_lines import read_metrics
from flipscale.io.model_folder import fetch_folder, local_folder, read_object
from flipscale.io.progress import each
from flipscale.io.text_table import plain_table
from flipscale.io.yaml_text import read_saved_recipe
from flipscale.model.configuration_flip import FlipConfig
from flipscale.model.families import family_of
from flipscale.objectives.build_objective import build_config, build_objective
from flipscale.planning.proposal import FEW_CLASSES, MOST_REPEATED, Proposal, Survey, power_below, spread
from flipscale.preparation.weighing import WeightOptions, make_weights
from flipscale.recipe.data import DataRecipe, SourceRecipe
from flipscale.recipe.outputs import TASKS_DIR, EvalRecipe, LogRecipe
from flipscale.recipe.recipe import Recipe

OPEN_CLIP = "open_clip:"
# A fifth of the pairs chooses, at most so many: recalls of a thousand pictures are known within two points or so.
_HELD_OUT, _MOST_HELD_OUT = 0.2, 1000
# Trials draw from at most so many pairs, evenly spread: more than they can see.
_MOST_TRIED = 50_000
_MOST_OLD = 1_000_000  # old pairs of a source whose captions are not held out
_MASKED_GRID = 14
_LARGE = 30_000_000  # weights from which a CPU has smaller batches
_MOST_GUARDED = 5_000  # images of a prepared task that becomes a guard by itself
_FEW_STEPS = 20
# At most so many models are compared on the held-out pairs: trials of three rungs, and three mixtures.
_COMPARED = 19
_ALPHAS, _KS = (0.75, 0.5, 0.25), (1, 5, 10)
_TOWERS = ["vision_model", "text_model"]
# Fields of the template, and factors of the usual rate, by what is trained, from the smallest change to the largest.
PARTS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "projections": ({"frozen": _TOWERS}, (4.0, 16.0)),
    "LoRA of rank 8": ({"lora": {"rank": 8}}, (2.0, 8.0)),
    "text tower, projections": ({"frozen": _TOWERS[:1]}, (1.0, 4.0)),
    "all, early blocks less": ({"layer_decay": 0.75}, (1.0, 4.0)),
    "all": ({}, (0.25, 1.0)),
}


@dataclass(frozen=True)
class Start:
    """A model to start from.

    Args:
        model: fields of the recipe's `model`.
        tokenizer: folder or Hub name of its tokenizer.
        loss: fields of the recipe's `loss` other than the defaults.
        name: folder or Hub name; empty for two towers, whose projections are drawn.
        replay: sources of old pairs, with weights. Half of each batch is drawn from them.
    """

    model: dict[str, Any]
    tokenizer: str
    loss: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    replay: list[SourceRecipe] = field(default_factory=list)


def open_start(names: Sequence[str], converted: Path) -> Start:
    """Return a start by its name, or by those of an image tower and a text tower. A checkpoint of open_clip becomes the
    folder `converted`, which may only hold the same from a search that was killed. Raises as `load_dual_encoder`."""
    if len(names) > 2:
        raise UserError(f"start is {' '.join(names)}; name one model, or an image tower and a text tower")
    if len(names) == 2:
        return Start({"family": "towers", "vision": names[0], "text": names[1]}, names[1])
    name = str(converted) if names[0].startswith(OPEN_CLIP) else names[0]
    if name != names[0]:
        card = converted / "README.md"
        if card.is_file() and f"\nbase_model: {names[0]}\n" in card.read_text(encoding="utf-8", errors="replace"):
            shutil.rmtree(converted)
        convert_from_open_clip(names[0].removeprefix(OPEN_CLIP), converted)
    config: Any = load_dual_encoder(name)[0].config
    kind = read_object(fetch_folder(name) / "config.json").get("model_type")
    fields: dict[str, Any] = {"family": family_of(kind) or "flip", "init_from": name}
    if fields["family"] == "flip":  # other families take these fields from the folder
        usual = FlipConfig.from_size("b16")
        for part in ("vision_config", "text_config"):
            own, default = getattr(config, part), getattr(usual, part)
            known = {key: getattr(own, key) for key in FlipConfig.parts()[part]}
            fields[part] = {key: value for key, value in known.items() if value != getattr(default, key)}
        if config.decoder_config is not None:
            print(f"{name}: its decoder is left out; the fine-tuned model writes no captions", flush=True)
    loss: dict[str, Any] = {"kind": "sigmoid"} if config.logit_bias_init_value is not None else {}
    return Start(fields, str(local_folder(name) or name), loss, name)


def _own_run(start: str) -> tuple[Path, dict[str, Any]]:
    """Return the recipe file of the run that `start` is the model of, and its fields; none if it is of no run, or is
    empty. A race's model is one of its runs', which share their data."""
    folder = local_folder(start) if start else None
    if folder is None or folder.name != "model":
        return Path(), {}
    files = [folder.parent / "recipe.yaml", *sorted(folder.parent.glob("*/recipe.yaml"))]
    file = next((file for file in files if file.is_file()), None)
    return (file, read_saved_recipe(file)) if file else (Path(), {})


def find_replay(start: str) -> list[SourceRecipe]:
    """Return the sources that the start's own run was trained on, without those that are not on this machine."""
    file, recipe = _own_run(start)
    data, here = recipe.get("data") or {}, []
    for one in data.get("sources") or [{key: data.get(key) for key in ("shards", "weights")}]:
        place = one.get("shards") or one.get("dataset")
        if place and (Path(place).is_dir() or _are_here(place)):
            here.append(SourceRecipe(**one))
        elif place:
            print(f"{place}: old pairs of {file}, not on this machine; --replay names old pairs", flush=True)
    return half_of_batches(here)


def _are_here(shards: str) -> bool:
    """Return whether a glob or a range names shards on this machine."""
    try:
        return "://" not in named_shards(shards) and len(open_shards(shards)) > 0
    except (UserError, OSError):
        return False


def half_of_batches(sources: Iterable[SourceRecipe]) -> list[SourceRecipe]:
    """Return old sources with weights that add up to a half, in proportion to their own weights, or to their sizes."""
    weighed = [(one, one.weight or float(len(open_source(DataRecipe(sources=[one]))))) for one in sources]
    total = sum(weight for _, weight in weighed)
    return [replace(one, weight=float(f"{0.5 * weight / total:.3g}")) for one, weight in weighed]


def find_guards(start: str) -> tuple[list[dict[str, Any]], str]:
    """Return tasks of old abilities, and where they are from: zero-shot and retrieval tasks of the start's own run,
    else prepared tasks of at most 5,000 images."""
    kinds, (file, recipe) = ("zero_shot", "retrieval"), _own_run(start)
    section = recipe.get("eval") or {}
    evaluated = EvalRecipe(**{name: section[name] for name in ("tasks", "tasks_dir", *kinds) if section.get(name)})
    own = list[dict[str, Any]]()
    for listed in listed_tasks(evaluated):
        try:
            task = with_page(listed, evaluated.tasks_dir)
        except UserError as error:
            print(f"{file}: no guard: {error}", flush=True)
            continue
        if task.get("kind") in kinds and Path(str(task.get("data"))).is_dir():
            own.append(task)
    if usable := [{**task, "every_samples": 0} for task in own]:
        return usable, f"of {file}"
    small = [page for page in suite_pages("all") if page.kind in kinds and page.images <= _MOST_GUARDED]
    prepared = [page.name for page in small if read_prepared(Path(TASKS_DIR) / page.data) is not None]
    return [{"task": name} for name in prepared], f"prepared in {TASKS_DIR}"


@dataclass(frozen=True)
class HeldOut:
    """The pairs that choose, with a caption each, and the folder of weights by which trials draw the others. With
    `by_caption`, no trial sees their captions."""

    source: TarSource
    captions: list[str]
    weights: Path
    by_caption: bool = True

    @cached_property
    def shares(self) -> np.ndarray:
        """Weights of the pairs, float64 `(pairs,)`, of mean 1. Without `by_caption`, each caption weighs the same, so
        a model gains nothing by answering with frequent ones."""
        _, ids, counts = np.unique(self.captions, return_inverse=True, return_counts=True)
        return np.ones(len(ids)) if self.by_caption else len(ids) / (len(counts) * counts[ids])

    def scores(self, embedder: Embedder | None) -> np.ndarray:
        """Return the recall of each pair in percent, times its share: float64 `(pairs,)`. A recall is the mean over
        both ways, at 1, 5 and 10.

        All pictures with the same caption are right answers for it, and for them it is one answer. Without
        `by_caption`, only captions are asked for. Without an embedder, it is the mean of random answers.
        """
        texts = list(dict.fromkeys(self.captions))
        ids, ways = torch.tensor([texts.index(caption) for caption in self.captions]), 1 + self.by_caption
        if embedder is None:
            right = (np.ones(len(ids)), len(texts)), (torch.bincount(ids)[ids].numpy(), len(ids))
            chances = [recall_chance(num, targets, k) for num, targets in right[:ways] for k in _KS if k < targets]
            return self.shares * 100.0 * float(np.mean(chances))
        similarities = embedder.images(self.source) @ embedder.texts(texts).T
        both = (similarities, ids, torch.arange(len(texts))), (similarities.T[ids], ids, ids)
        hits = [recall_hits(*way, k).double() for way in both[:ways] for k in _KS if k < way[0].shape[1]]
        return self.shares * 100.0 * torch.stack(hits).mean(dim=0).numpy()

    def gain(self, new: np.ndarray, old: np.ndarray) -> Estimate:
        """Return the change of the mean recall. Its interval is corrected for the best of `_COMPARED` models
        (Bonferroni). With `by_caption`, the pictures of a caption are one draw."""
        mean, groups = float((new - old).mean()), np.arange(len(new))
        if self.by_caption:
            groups = np.unique(self.captions, return_inverse=True)[1]
        sums = np.bincount(groups, new - old - mean * self.shares)
        # As if one more pair changed by 100, because a few equal changes are not certain.
        variance = (float((sums**2).sum()) + 100.0**2) * len(sums) / (len(sums) - 1)
        half = student(len(sums) - 1, _COMPARED) * math.sqrt(variance) / len(new)
        return Estimate(mean, mean - half, mean + half)

    def text(self, scores: np.ndarray) -> str:
        """Return the mean recall with its 95 % interval."""
        value, low, high = mean_estimate(scores + scores.mean() * (1.0 - self.shares))
        return f"{value:.1f} % ({low:.1f} to {min(high, 100.0):.1f})"


def hold_out(
    source: Source, named: SourceRecipe, by_caption: bool, folder: Path, seed: int = 0, old: Sequence[SourceRecipe] = ()
) -> HeldOut:
    """Write the held-out pairs and the weights of the others to `folder`.

    A picture is on one side, by the digest of its bytes, and `old` pairs have none that is held out. With `by_caption`,
    the same holds for captions, so no trial has seen a name that it is asked for. If that leaves too few pairs,
    pictures are held out alone.
    """
    pairs, seen = list(_read(source, _MOST_TRIED)), set[str]()
    for one in old:
        places = _read(open_source(DataRecipe(sources=[one], max_bad_fraction=1.0)), _MOST_OLD)
        for digest, texts, *_ in each(places, "old pairs", "pairs", delay=2, leave=False):
            seen.update((digest, *texts) if by_caption else (digest,))
    chosen = _choose(pairs, by_caption, seed, seen)
    few = min(_HELD_OUT * len(pairs), _MOST_HELD_OUT) / 4
    if by_caption and (len(chosen) < few or len({pairs[row][1][0] for row in chosen}) < 2):
        by_caption, chosen = False, _choose(pairs, False, seed, seen)
    firsts, weights, captions = np.cumsum([0, *source.shard_sizes]), np.zeros(len(source)), list[str]()
    weights[[firsts[shard] + number for row, (_, _, shard, number) in enumerate(pairs) if row not in chosen]] = 1.0
    written = set[str]()
    (folder / "pairs").mkdir()
    with tarfile.open(folder / "pairs/0.tar", "w") as tar:
        for row in sorted(chosen):
            digest, texts, shard, number = pairs[row]
            if digest in written:  # a copy is no further evidence
                continue
            try:
                decode_whole(encoded := source.read(shard, number).image)
            except BadSample:
                continue
            add_member(tar, f"{len(captions):06d}.jpg", encoded)
            add_member(tar, f"{len(captions):06d}.txt", texts[0].encode())
            written.add(digest)
            captions.append(texts[0])
    if len({*captions}) < 2 or not weights.any():
        some = f"{len(captions)} of {len(source)} pairs can be held out to choose by, with {len({*captions})} captions"
        known = " and pictures that old pairs lack. Or name other old pairs by --replay" if seen else ""
        raise UserError(f"{some}; use more pairs, with different captions{known}")
    np.save(folder / "scores.npy", weights)
    (folder / "weights").mkdir()
    options = WeightOptions(scores=folder / "scores.npy")
    make_weights(source, named.shards or named.dataset or "", options, folder / "weights", 1)
    return HeldOut(open_shards(str(folder / "pairs")), captions, folder / "weights", by_caption)


def _read(source: Source, most: int) -> Iterator[tuple[str, list[str], int, int]]:
    """Yield the digest of the picture, the captions and the place of at most `most` pairs, evenly spread."""
    for shard, number in spread(source, most):
        with suppress(BadSample):  # training leaves it out too
            sample = source.read(shard, number)
            texts = choose_captions({"": sample.captions}, {"": 1.0}, [0.0] * max(len(sample.captions), 1))
            yield hashlib.blake2b(sample.image, digest_size=16).hexdigest(), texts, shard, number


def _choose(
    pairs: Sequence[tuple[str, list[str], int, int]], by_caption: bool, seed: int, seen: Collection[str]
) -> set[int]:
    """Return rows of about a fifth of the pairs, chosen by keys of the seed and the pictures: whole groups that share
    pictures, or with `by_caption` captions too, and none that was `seen`."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    names = [(digest, *texts) if by_caption else (digest,) for digest, texts, *_ in pairs]
    numbers = {name: len(pairs) + number for number, name in enumerate({name: 0 for own in names for name in own})}
    edges = np.array([(row, numbers[name]) for row, own in enumerate(names) for name in own], int).reshape(-1, 2)
    size = len(pairs) + len(numbers) + 1
    graph, members = coo_array((np.ones(len(edges)), edges.T), shape=(size, size)), dict[int, list[int]]()
    for row, group in enumerate(connected_components(graph, directed=False)[1][: len(pairs)].tolist()):
        members.setdefault(group, []).append(row)
    new = [rows for rows in members.values() if not any(name in seen for row in rows for name in names[row])]
    new.sort(key=lambda rows: min(hashlib.blake2b(f"{seed} {pairs[row][0]}".encode()).digest() for row in rows))
    count, chosen = min(int(_HELD_OUT * sum(map(len, new))), _MOST_HELD_OUT), set[int]()
    for rows in new:
        if len(chosen) < count >= len(rows):
            chosen.update(rows)
    return chosen


@dataclass(frozen=True)
class Candidate:
    """A way to fine-tune.

    Args:
        part: a name of `PARTS`, which says what is trained.
        rate: peak rate for the batch of the search.
    """

    part: str
    rate: float
    weight_decay: float = 0.1
    mask_ratio: float = 0.0

    def __str__(self) -> str:
        masked = f", mask {self.mask_ratio:.0%}" if self.mask_ratio else ""
        return f"{self.part + masked:<34} rate {self.rate:<8.2g} decay {self.weight_decay:<4g}"

    def values(self, batch_size: int) -> dict[str, Any]:
        """Return the values of the template that it decides."""
        rate = {"base_lr": float(f"{self.rate * 256 / batch_size:.2g}"), "part": self.part}
        own = {"weight_decay": self.weight_decay, "mask_ratio": self.mask_ratio, **rate}
        return {"frozen": [], "lora": None, "layer_decay": None, **PARTS[self.part][0], **own}


def trial_starts(start: Start, width: int, batch_size: int) -> list[Candidate]:
    """Return the candidates of the first rung."""
    usual = 5e-4 * (128 / max(width, 128)) ** 2 * math.sqrt(batch_size / 256)
    has_blocks = start.model.get("text_config", {}).get("num_hidden_layers") != 0
    can_adapt = start.name and has_blocks and find_spec("peft") is not None
    left_out = set[str]() if can_adapt else {"LoRA of rank 8"}
    if start.model["family"] == "siglip":  # its projections are within the towers
        left_out.add("projections")
    return [Candidate(name, usual * f) for name, (_, factors) in PARTS.items() if name not in left_out for f in factors]


def next_rung(best: Sequence[Candidate], grid: int) -> list[Candidate]:
    """Return the candidates of the second rung.

    They are the two best, the third, and the best with more decay. If the best has its part's highest rate, twice that
    rate takes the third's place. A grid of `_MASKED_GRID` patches a side, or more, adds the best with a mask.
    """
    is_highest = best[0].rate == max(one.rate for one in best if one.part == best[0].part)
    third = [replace(best[0], rate=2.0 * best[0].rate)] if is_highest else best[2:3]
    rung = [*best[:2], *third, replace(best[0], weight_decay=0.3)]
    trains_images = "vision_model" not in PARTS[best[0].part][0].get("frozen", [])
    return [*rung, replace(best[0], mask_ratio=0.5)] if grid >= _MASKED_GRID and trains_images else rung


@dataclass(frozen=True)
class Trial:
    """A trained candidate, or weights between the start's and its own, of which `alpha` are its own."""

    candidate: Candidate
    minutes: float
    run_dir: Path
    samples: int
    scores: np.ndarray = field(repr=False)
    alpha: float = 1.0
    guards: Sequence[Result] = ()

    @property
    def value(self) -> float:
        """Mean recall in percent."""
        return float(self.scores.mean())

    def lost(self, before: Sequence[Result]) -> list[Result]:
        """Return the changes of guards that are losses beyond their intervals."""
        changes = [change_of(new, old) for new, old in zip(self.guards, before, strict=True)]
        return [change for change in changes if change.who == LOST]


@dataclass(frozen=True)
class TrialSearch:
    """The trials of a start on pairs, in a folder. `train` trains a recipe."""

    train: Callable[[Recipe], Path]
    proposal: Proposal
    start: Start
    source: SourceRecipe
    held_out: HeldOut
    guards: Sequence[Task]
    folder: Path

    def run(self, minutes: float, width: int, grid: int) -> list[Trial]:
        """Return the trials of the best candidate, the shortest first. Print each trial as it ends. A rung without a
        trial that could be run ends the search. Raise UserError if it is the first."""
        rung = trial_starts(self.start, width, self.proposal.batch_size)
        finished, best = list[Trial](), list[Candidate]()
        for number in range(3):
            print(f"rung {number + 1}, {_time(minutes / len(rung))} a trial, {len(rung)} of them:", flush=True)
            trials, failure = [], ""
            for place, candidate in enumerate(rung):
                try:
                    trials.append(self._trial(candidate, minutes / len(rung), self.folder / f"trial{number}-{place}"))
                except (UserError, FloatingPointError) as error:
                    failure = first_line(error)
                    print(f"  {candidate}  failed: {failure}", flush=True)
            if not trials and best:
                break
            if not trials:
                raise UserError(f"no trial could be run: {failure}")
            trials.sort(key=lambda trial: -trial.value)
            finished += trials
            best = [trial.candidate for trial in trials]
            rung = best[:1] if number else next_rung(best, grid)
            for trial in trials[1:]:
                shutil.rmtree(trial.run_dir)
        return [trial for trial in finished if trial.candidate == best[0] and trial.run_dir.exists()]

    def _trial(self, candidate: Candidate, minutes: float, run_dir: Path) -> Trial:
        self.proposal.values |= candidate.values(self.proposal.batch_size)
        recipe = self.proposal.recipe()
        new = replace(self.source, weights=str(self.held_out.weights), weight=0.5 if self.start.replay else None)
        data = replace(recipe.data, shards=None, sources=[new, *self.start.replay])
        log, place = LogRecipe(every_samples=0, report_to=[]), str(run_dir)
        self.train(replace(recipe, data=data, log=log, eval=EvalRecipe(), budget_minutes=minutes, output_dir=place))
        scores = self.held_out.scores(self.open(place))
        samples = int(read_metrics(run_dir)[-1]["samples_seen"])
        print(f"  {candidate}  {self.held_out.text(scores):<24}  {samples:>9,} pairs", flush=True)
        return Trial(candidate, minutes, run_dir, samples, scores)

    def open(self, name: str) -> Embedder:
        return open_embedder(name, start_accelerator([], "."))

    def measured(self, embedder: Embedder) -> tuple[np.ndarray, list[Result]]:
        """Return the recalls of the held-out pairs, and the guards' headline results."""
        guards = [result for result in run_tasks(embedder, self.guards) if result.headline]
        return self.held_out.scores(embedder), guards

    def mixed(self, trial: Trial, before: Sequence[Result], old: np.ndarray) -> tuple[Trial, list[Trial]]:
        """Return the best of a trial's model and, if it loses a guard, mixtures with the start (WiSE-FT), and all that
        were measured. The best wins on the held-out pairs and loses no guard; without such a mixture, it is the trial.
        """
        made: list[Trial] = []
        for alpha in (1.0, *_ALPHAS):
            name = trial.run_dir
            if alpha < 1.0 and (checkpoint := latest_checkpoint(trial.run_dir)):
                name = export_checkpoint(checkpoint, self.folder / "mixed", base=self.start.name, alpha=alpha)
            scores, guards = self.measured(self.open(str(name)))
            made.append(replace(trial, alpha=alpha, scores=scores, guards=guards))
            if not made[0].lost(before):
                break
        kept = [one for one in made if not one.lost(before) and self.held_out.gain(one.scores, old).low > 0]
        return max(kept, key=lambda one: one.value, default=made[0]), made


def propose_finetuning(
    train: Callable[[Recipe], Path],
    start: Start,
    source: Source,
    named: SourceRecipe,
    data: Survey,
    minutes: float,
    folder: Path,
    tests: Sequence[dict[str, Any]],
    guards: Sequence[dict[str, Any]],
    **values: Any,
) -> tuple[list[str], str, float]:
    """Search in an empty folder for the recipe that fine-tunes `start` on pairs for `minutes`.

    Args:
        train: function that trains a recipe.
        tests, guards: tasks of new and old abilities, named. Tests choose nothing. `find_guards` finds missing guards.
        values: further values of the template: `output_dir` and `num_workers`.

    Returns:
        The report, its verdict first; the recipe, empty if the start is better as it is; and the share of the trained
        weights that keeps the guards.

    Raises:
        UserError: the pairs cannot be divided, the model cannot be trained, or a guard cannot be evaluated.
    """
    guards, where = (guards, "given by --guards") if guards or not start.name else find_guards(start.name)
    tasks = [*tests, *guards]
    proposal, width, grid = _propose(start, named, data, tasks=tasks, **values)
    built = build_tasks(tasks)
    for task in built:
        task.check()
    by_caption = data.repeated(64) <= FEW_CLASSES * 64
    held_out = hold_out(source, named, by_caption, folder, old=start.replay)
    known = "" if held_out.by_caption else ", whose captions other pairs have too"
    print(f"held out to choose by: {len(held_out.captions):,} pictures, each on one side{known}", flush=True)
    search = TrialSearch(train, proposal, start, named, held_out, built[len(tests) :] if start.name else [], folder)
    old, before = held_out.scores(None), list[Result]()
    if start.name:
        old, before = search.measured(search.open(start.name))
        print(f"before: mean recall {held_out.text(old)}", flush=True)
        if old.mean() > 99.99:
            verdict = f"{start.name} is better on the held-out pairs as it is. No recipe is proposed."
            return [verdict, "It is right on all of them, so no trial was run."], "", 1.0
    print(f"search: {_time(3 * minutes)} for a training of {_time(minutes)}", flush=True)
    lengths = search.run(minutes, width, grid)
    best = max(lengths, key=lambda trial: trial.value)
    chosen, made = search.mixed(best, before, old)
    gain, text = held_out.gain(chosen.scores, old), gain_text(held_out.gain(chosen.scores, old))
    # A line for the model before, and for each mixture.
    rows = [["", "held-out pairs, mean recall", *(f"{guard.task}, {guard.shown}" for guard in before)]]
    rows.append(["before" if start.name else "chance", held_out.text(old), *(one.estimate_text for one in before)])
    for one in made:
        changes = [change_of(*both) for both in zip(one.guards, before, strict=True)]
        own = (f"{'LOST ' * (change.who == LOST)}{change.estimate_text}" for change in changes)
        change = held_out.gain(one.scores, old)
        rows.append([f"alpha {one.alpha:g}", gain_text(change) + ", not clear" * (change.low <= 0), *own])
    courses = ", ".join(f"{_time(trial.minutes)} {trial.value:.1f} %" for trial in lengths)
    steps = min(trial.samples for trial in lengths) // proposal.batch_size
    chose = [f"Chosen: {' '.join(str(best.candidate).split())}. Mean recall by length: {courses}."]
    if steps < _FEW_STEPS:
        chose.append(f"Trials had as few as {steps} steps: a longer --minutes makes a surer choice.")
    if not start.name:
        chose.append("No guards: two towers that are joined anew have no old ability to lose.")
    else:
        unknown = "No guards: what it loses elsewhere is unknown; name some by --guards."
        chose.append(f"Guards are those {where}." if before else unknown)
    lines = [*plain_table(rows, range(1, len(rows[0]))).splitlines(), *chose]
    if gain.value <= 0:
        known = f"{start.name} is better on the held-out pairs as it is" if start.name else "No trial is above chance"
        return [f"{known}. No recipe is proposed.", *lines], "", 1.0
    if gain.low <= 0:
        needed = len(old) * ((gain.value - gain.low) / gain.value) ** 2
        if needed <= _MOST_HELD_OUT:
            lines.append(f"To show such a gain takes about {needed / _HELD_OUT:,.0f} pairs.")
        verdict = f"No gain was shown: {text} of mean recall on the held-out pairs. No recipe is proposed."
        return [verdict, *lines], "", 1.0
    verdict = f"Gained {text} of mean recall on the held-out pairs."
    if lost := made[0].lost(before):
        words = "; ".join(f"{one.task} {one.shown} {one.estimate_text}" for one in lost)
        remedy = f"Mixed with the start at alpha {chosen.alpha:g}, it keeps them and gains {text}."
        if chosen.alpha == 1.0:
            fewer = "a larger share of old pairs" if start.replay else "old pairs in each batch (--replay)"
            remedy = f"No mixture keeps them. What may: {fewer}, or fewer trained parts (docs/finetuning.md)."
        verdict = f"LOST {words}. {remedy}"
    length = f"{_time(best.minutes)} at the speed of the trials"
    proposal.values |= {**best.candidate.values(proposal.batch_size), "samples": best.samples, "length": length}
    return [verdict, *lines], proposal.written([verdict, *chose]), chosen.alpha


def gain_text(gain: Estimate) -> str:
    """Return a gain with its interval."""
    return f"{gain.value:+.1f} {POINTS} ({gain.low:+.1f} to {gain.high:+.1f})"


def _propose(start: Start, named: SourceRecipe, data: Survey, **values: Any) -> tuple[Proposal, int, int]:
    """Return the template's proposal, the width of the image tower and its grid of patches. Print the model."""
    values |= {"model": start.model, "tokenizer": start.tokenizer, "loss": start.loss, "length": ""}
    mixed = [replace(named, weight=0.5 if start.replay else None), *start.replay]
    default = asdict(SourceRecipe())
    values["sources"] = [{key: value for key, value in asdict(one).items() if value != default[key]} for one in mixed]
    values |= {"has_sides": any(re.search(r"\b(left|right)\b", caption) for caption in data.captions)}
    values |= {"recomputes": False, "micro_batch_size": None, "samples": 25_600, **Candidate("all", 1e-4).values(256)}
    values["captions"] = len(data.captions)
    recipe = Proposal("finetune", 256, 0.0, 0, values).recipe()
    config: Any = build_config(recipe)
    model, vision = model_without_storage(config, build_objective(recipe).trained_class(config)), config.vision_config
    count = model.num_parameters()
    most = 256 if torch.cuda.is_available() or count < _LARGE else 32
    batch_size = max(min(power_below(data.pairs // 4), power_below(len(data.captions) // 2), most), 8)
    if "kind" in start.loss and data.repeated(batch_size) > MOST_REPEATED * batch_size:
        values["loss"] = {**start.loss, "positives": "equal_captions"}
    proposal = Proposal("finetune", batch_size, 0.0, 0, values)
    if torch.cuda.is_available():
        proposal.fit(1, torch.cuda.get_device_properties(0).total_memory // 2**30)
    print(
        f"start: family {start.model['family']}, {count / 1e6:,.1f} M weights, {vision.image_size} pixels in "
        f"patches of {vision.patch_size}, captions of {config.caption_config.max_position_embeddings} tokens",
        flush=True,
    )
    return proposal, vision.hidden_size, vision.image_size // vision.patch_size


def _time(minutes: float) -> str:
    return f"{minutes:.3g} minutes" if minutes >= 2 else f"{60 * minutes:.3g} seconds"
