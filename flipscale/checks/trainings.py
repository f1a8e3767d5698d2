"""Short trainings by the trainer itself: equal losses, a resume, a stalled and a killed rank. And the node's loader."""

import functools
import os
import shutil
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import yaml
from torch.distributed.elastic.utils.distributed import get_free_port

from flipscale.checks.node import LIMIT_SECONDS, Bench, CheckError, CheckProcesses, Row, descendants
from flipscale.checks.steps import ALONE, engine_variables, first_stage, steps_of
from flipscale.checks.timing import over_starts
from flipscale.data.loader import restartable_batches
from flipscale.data.pairs import InputShape, PairDataset
from flipscale.data.sources.opening import open_source
from flipscale.data.sources.tar import add_member
from flipscale.data.tokenizers import load_tokenizer, train_sentencepiece
from flipscale.io import json_lines
from flipscale.io.cores import usable_cores, workers_of
from flipscale.objectives.build_objective import build_config
from flipscale.recipe.outputs import EvalRecipe, LogRecipe, SaveRecipe
from flipscale.recipe.recipe import to_yaml

_PAIRS, _STEPS, _SAVED = 8, 12, 6
# Steps of a record of the trainer.
_RECORDED = 5
_TOWER = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
# Losses in fp32 differ by the order of sums, after a dozen steps by less than this.
LOSS_TOLERANCE = 1e-3
_STALL_SECONDS, _END_SECONDS, _LOADER_SECONDS = 4.0, 90.0, 15.0
_PICTURES, _SHARDS = 2048, 8
_WORDS = ["a", "photo", "of", "the", "red", "green", "blue", "grey", "disc", "bar", "ring", "cross"]


def make_pairs(folder: Path) -> Path:
    """Write shards of noisy pictures of 500 x 400 with captions, 43 kB each, and a tokenizer next to them."""
    shards, random = folder / "pairs", np.random.default_rng(0)
    if not shards.exists():
        shards.mkdir()
        captions = [" ".join(random.choice(_WORDS, 8)) for _ in range(_PICTURES)]
        train_sentencepiece(captions, folder / "tokenizer", 64, 16)
        for shard in range(_SHARDS):
            with tarfile.open(shards / f"{shard:05d}.tar", "w") as tar:
                for number in range(shard, _PICTURES, _SHARDS):
                    coarse = random.integers(0, 256, (50, 62, 3), dtype=np.uint8)
                    picture = cv2.resize(coarse, (500, 400), interpolation=cv2.INTER_CUBIC)
                    jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 76])[1].tobytes()
                    add_member(tar, f"{number:06d}.jpg", jpeg)
                    add_member(tar, f"{number:06d}.txt", captions[number].encode())
    return shards


def _data(bench: Bench, shards: str | None = None) -> dict[str, Any]:
    """Return a recipe's fields of some shards, by default the made-up ones. It loses its own data and what was stored
    of them."""
    own = {"shards": shards} if shards else {"shards": str(bench.folder / "pairs"), "lanes": 1}
    stored = dict.fromkeys(("weights", "captions", "image_features", "text_features"))
    return {**stored, "sources": [], "teachers": [], **own, "tokenizer": str(bench.folder / "tokenizer")}


class Training:
    """A run by the trainer's own command: of a recipe's text, by default a small model on made-up pairs in fp32."""

    def __init__(self, bench: Bench, name: str, steps: int = _STEPS, text: str = ""):
        self.bench, self.directory = bench, bench.folder / name
        batch = _PAIRS * bench.num_gpus
        tower = {"vision_config": {**_TOWER, "image_size": 64}, "text_config": {**_TOWER, "vocab_size": 64}}
        data = {**_data(bench), "num_workers": 1}
        small = {
            "model": {"size": "b16", **tower},
            "data": {**data, "global_batch_size": batch},
            "stages": [{"name": "masked", "samples": steps * batch, "mask_ratio": 0.5, "base_lr": 1e-3}],
            "log": {"every_samples": batch, "report_to": []},
            "save": {"every_samples": _SAVED * batch},
        }
        self.logs = bench.folder / f"{name}.logs"
        if bench.nodes.index == 0:
            make_pairs(bench.folder)
            self.logs.mkdir()
            (self.logs / "recipe.yaml").write_text(text or yaml.safe_dump(small), encoding="utf-8")
        bench.nodes.gather("written")

    def start(
        self, processes: int, engine: str, *launcher: str, **variables: str
    ) -> AbstractContextManager[CheckProcesses]:
        """Return the context in which the trainer runs in some processes. `launcher` is a module and its arguments."""
        nodes = len(self.bench.nodes.hosts)
        own = {**engine_variables(engine, processes, nodes), "ACCELERATE_MIXED_PRECISION": "no", **variables}
        command = [*launcher, "flipscale.pretrain", "--config", str(self.logs / "recipe.yaml")]
        command += ["--output_dir", str(self.directory)]
        return self.bench.group(command[0], command[1:], self.logs, processes, own)

    def run(self, processes: int, engine: str = "ddp", **variables: str) -> dict[int, float]:
        """Train to the end, and return the loss of each step. Raise CheckError if a loss is not finite."""
        with self.start(processes, engine, **variables) as group:
            group.wait()
        losses = {record["step"]: record["loss"] for record in self.records("metrics") if "loss" in record}
        if lost := [step for step, loss in losses.items() if loss is None]:
            raise CheckError(
                f"run {self.directory.name}: the loss of step {lost[0]} is not finite; see {self.directory}"
            )
        return losses

    def records(self, name: str) -> list[dict[str, Any]]:
        """Return the records of one of the run's files so far."""
        file = self.directory / f"{name}.jsonl"
        return json_lines.read(file) if file.exists() else []

    def await_steps(self, group: CheckProcesses, count: int) -> None:
        """Wait until the run has taken some steps."""
        group.await_true(lambda: len(self.records("metrics")) >= count, LIMIT_SECONDS, f"step {count}")


def _difference(losses: Mapping[int, float], others: Mapping[int, float]) -> float:
    """Return the largest relative difference of the losses of shared steps."""
    shared = losses.keys() & others.keys()
    return max((abs(losses[step] - others[step]) / abs(others[step]) for step in shared), default=float("inf"))


def check_losses(bench: Bench) -> None:
    """The losses of all GPUs, of one and of the CPU must be equal."""
    one = Training(bench, "one").run(1)
    others = {"the CPU": Training(bench, "cpu").run(1, CUDA_VISIBLE_DEVICES="")}
    if bench.num_gpus > 1:
        others[f"{bench.num_gpus} GPUs"] = Training(bench, "all").run(bench.num_gpus)
    found = {name: _difference(losses, one) for name, losses in others.items()}
    bench.figures["losses"] = found
    faults = [f"{name} differs" for name, difference in found.items() if not difference <= LOSS_TOLERANCE]
    words = ", ".join(f"{name} {difference:.1e}" for name, difference in found.items())
    bench.add("losses", f"{_STEPS} steps in fp32, largest difference from one GPU: {words}", faults)


def check_resume(bench: Bench) -> None:
    """A run that goes on with half of the GPUs and another engine must have the same losses."""
    bench.need_gpus(2)
    whole, half = Training(bench, "whole"), Training(bench, "half")
    losses = whole.run(bench.num_gpus, "fsdp2")
    left_out = shutil.ignore_patterns("model", "DONE", "report.html", f"step-{_STEPS:08d}")
    shutil.copytree(whole.directory, half.directory, ignore=left_out)
    resumed = half.run(bench.num_gpus // 2)
    later = {step: loss for step, loss in resumed.items() if step > _SAVED}
    difference = _difference(later, losses)
    faults = [] if len(later) == _STEPS - _SAVED and difference <= LOSS_TOLERANCE else ["the losses differ"]
    words = f"fsdp2 on {bench.num_gpus} GPUs to ddp on {bench.num_gpus // 2}"
    bench.add("resume", f"{words}, {len(later)} steps, largest difference {difference:.1e}", faults)


def check_stall(bench: Bench) -> None:
    """A rank whose batches stop for some seconds must be named; of several nodes, the first rank of the last one.

    Its workers are stopped, because a rank that stops inside of a message holds up all alike, and none is late."""
    bench.need_gpus(2)
    training, chosen = Training(bench, "stalled", 100_000), max(bench.num_gpus - bench.local_gpus, 1)
    with training.start(bench.num_gpus, "ddp") as group:
        training.await_steps(group, 15)  # the usual time of a step is known after ten
        stalled = max(_STALL_SECONDS, bench.nodes.gather(training.records("metrics")[-1]["trained_seconds"])[0])
        if chosen in group.ranks:
            workers = descendants(group.processes[group.ranks.index(chosen)].pid)
            for worker in workers:
                with suppress(psutil.NoSuchProcess):  # one has just ended
                    worker.suspend()
            time.sleep(stalled)
            for worker in workers:
                with suppress(psutil.NoSuchProcess):
                    worker.resume()
        # A stall between two steps belongs to the second, and both are recorded.
        slow_steps = functools.partial(training.records, "slow_steps")
        what = "the report of the slow step"
        group.await_true(lambda: any(one["late_s"] > stalled / 2 for one in slow_steps()), _END_SECONDS, what)
        record = max(slow_steps(), key=lambda one: one["late_s"])
        bench.nodes.gather("seen")  # before any node ends its ranks
    bench.figures["stall"] = record
    late = record["late_rank"]
    faults = [] if late == chosen else [f"rank {chosen} stalled, and the record names rank {late}"]
    bench.add("stalled rank", f"rank {late} named, {record['late_s']:.1f} s late in {record['phase']}", faults)


def check_kill(bench: Bench) -> None:
    """All ranks must end soon after one is killed. torchrun starts them, because it is what notices on GPUs."""
    bench.need_gpus(2)
    training, nodes = Training(bench, "killed", 100_000), bench.nodes
    chosen, port = max(bench.num_gpus - bench.local_gpus, 1), nodes.gather(get_free_port())[0]
    meeting = ("--nnodes", f"{len(nodes.hosts)}", "--node_rank", f"{nodes.index}", "--master_addr", nodes.address)
    launcher = ("torch.distributed.run", *meeting, "--master_port", f"{port}", "--nproc_per_node")
    with training.start(1, "ddp", *launcher, f"{bench.local_gpus}", "-m") as group:
        training.await_steps(group, 5)
        started = descendants(group.processes[0].pid)
        place = f"{chosen - nodes.index * bench.local_gpus}"
        victims = [one for one in started if one.environ().get("LOCAL_RANK") == place]
        nodes.gather("ready")
        for victim in victims[:1]:  # the rank's own workers have its variables too
            victim.kill()
        killed = time.monotonic()
        while group.processes[0].poll() is None and time.monotonic() < killed + _END_SECONDS:
            time.sleep(0.05)
        ended = max(nodes.gather(time.monotonic() - killed))
    bench.figures["kill_s"] = ended
    faults = [] if ended < _END_SECONDS else ["the other ranks went on"]
    bench.add("killed rank", f"torchrun and the other ranks ended {ended:.1f} s later", faults)


def loaded(recipe: str, batch_size: int, changes: dict[str, Any], seconds: float) -> Iterator[Row]:
    """Yield the images that this rank's workers prepare in a second, while all ranks do so."""
    world, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    planned = first_stage(recipe, batch_size * world)
    data, shape, stage = replace(planned.data, **changes), InputShape.of(build_config(planned)), planned.stages[0]
    tokenizer = load_tokenizer(data.tokenizer, shape.max_tokens)
    given = (open_source(data), tokenizer, data, shape.at(stage.image_size), planned.seed, stage.mask_ratio)
    dataset = PairDataset(*given, planned.mask)
    batches = restartable_batches(dataset, 0, 1_000_000, rank, world)
    list(islice(batches, max(data.num_workers or 0, 2)))  # the workers start, all at once
    start, images = time.monotonic(), 0
    while time.monotonic() < start + seconds:
        images += sum(len(part["patches"]) for part in next(batches))
    yield {"images_per_s": images / (time.monotonic() - start)}
    batches.close()


def check_loader(bench: Bench) -> None:
    """The node's workers must prepare images faster than the steps use them."""
    make_pairs(bench.folder)
    num_gpus = bench.num_gpus
    workers = workers_of(usable_cores(), num_gpus)
    for recipe in bench.recipes:
        changes = {**_data(bench, bench.shards), "num_workers": workers}
        given: Row = {"recipe": recipe, "batch_size": bench.batch_size, "changes": changes, "seconds": _LOADER_SECONDS}
        rows = bench.run(loaded, num_gpus, **given)
        rate = sum(row["images_per_s"] for (row,) in rows)
        bench.figures["loader"] = {"images_per_s": rate, "images_per_worker_s": rate / workers / num_gpus}
        needed = max((num_gpus * row["pairs_per_s"] for row in steps_of(bench, recipe)), default=0.0)
        faults = [f"the fastest step uses {needed:,.0f} images/s"] if rate < needed else []
        kind = "own shards" if bench.shards else "made-up 500 x 400"
        words = f"{rate:,.0f} images/s by {num_gpus} x {workers} workers, {kind}; needed {needed:,.0f}"
        bench.add(f"loader {Path(recipe).stem}", words, faults)


def check_trainer(bench: Bench) -> None:
    """Measure the trainer with its own loader on all GPUs, under the engine whose steps are fastest on a node."""
    usual: Row = {"engine": "ddp", "compiled": True, "recomputes": False}
    for name in bench.trained:
        own = min(steps_of(bench, name), key=lambda row: row["seconds"], default=usual)
        best = bench.figures.setdefault("fastest", {}).setdefault(name, {part: own[part] for part in usual})
        engine = "ddp" if best["engine"] == ALONE else best["engine"]
        recipe = first_stage(name, bench.batch_size * bench.num_gpus, best["compiled"], best["recomputes"])
        batch = recipe.data.global_batch_size
        data = replace(recipe.data, **_data(bench, bench.shards))
        log = LogRecipe(every_samples=_RECORDED * batch, report_to=[])
        recipe = replace(recipe, data=data, log=log, save=SaveRecipe(), eval=EvalRecipe())
        starts = []
        for number in range(bench.starts):
            training = Training(bench, f"{Path(name).stem}-{number}", text=to_yaml(recipe))
            with training.start(bench.num_gpus, engine, ACCELERATE_MIXED_PRECISION="bf16") as group:
                training.await_steps(group, 1 + bench.timed_steps // _RECORDED)
                bench.nodes.gather("seen")  # before any node ends its ranks
            starts.append([_trained(bench, training, batch)])
        row = {**best, "recipe": name, "engine": engine, "gpus": bench.num_gpus, **over_starts(starts)}
        bench.figures.setdefault("trainer", []).append(row)
        words = f"{row['data_wait_share']:.0%} of the time waits for data"
        bench.add(f"trainer {Path(name).stem}", f"{bench.num_gpus * row['pairs_per_s']:,.0f} pairs/s, {words}")


def _trained(bench: Bench, training: Training, batch: int) -> Row:
    """Return the row of a run's records without the first, in which it began. A time is a record's mean."""
    first, *records = (record for record in training.records("metrics") if "images_per_s" in record)
    kwh = [one["energy_parts"].get("GPUs", 0.0) for one in training.records("energy")[: 1 + len(records)]] or [0.0]
    joules = 3.6e6 * (kwh[-1] - kwh[0]) / bench.num_gpus / _RECORDED
    return {
        "pairs": bench.batch_size,
        "times": [batch / record["images_per_s"] for record in records],
        "joules": joules or None,
        "mhz": None,
        "peak_s": first["mfu"] * batch / first["images_per_s"] if "mfu" in first else None,
        "data_wait_share": float(np.mean([record["data_wait_share"] for record in records])),
    }
