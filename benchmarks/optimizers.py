"""Train on the icons with AdamW and with Muon for equal time, each with its own rate and decay, and compare accuracy.

    python examples/icons/data.py data/icons
    flipscale prepare weights data/icons/train data/icons_counts --caption_counts
    python benchmarks/optimizers.py --data data/icons --weights data/icons_counts --output_dir runs/optimizers

Towers of two widths learn in batches of two sizes. In each of these four cases, both optimisers have as many trials of
their rate and decay on `validation`. The best setting is trained with each seed and tested on `test`. One core trains
one model at a time. A run has as many pairs as its optimiser trains in its time, by the processor time of steps
measured in turn. So the cost of an optimiser's step counts, and other work on the machine changes nothing. After a
stop, the same command resumes.
"""

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.race_open_clip import RECIPES, RunFolder, mean_rank, plain, watch
from flipscale.engines.build_engine import start_accelerator
from flipscale.evaluation.presentation.curves import estimate
from flipscale.evaluation.results import Result, read_results
from flipscale.hub.loading import open_embedder
from flipscale.io.atomic import write_text
from flipscale.io.text_table import markdown_table
from flipscale.recipe.files import read_recipes
from flipscale.recipe.recipe import Recipe

WIDTHS, BATCHES = (64, 128), (128, 512)
MASK, WARMUP = 0.5, 0.05
# Rate and decay of the first trial: open_clip's usual ones, and those of examples/icons.
FIRST = {"adamw": (1e-3, 0.2), "muon": (2e-3, 0.3)}
TRIALS, TRIAL = 5, 0.5  # trials of an optimiser, and the length of each in parts of a last run
WINDOW, WINDOWS = 4096, 4  # pairs of a window of the calibration, and windows of a run


@dataclass(frozen=True)
class Arm:
    """An optimiser at a width of the image tower and a batch size."""

    width: int
    batch: int
    optimizer: str

    @property
    def name(self) -> str:
        return f"{self.optimizer}, width {self.width}, batch {self.batch}"


class Runs(RunFolder):
    """The runs of one comparison."""

    def __init__(self, data: Path, weights: Path, folder: Path):
        super().__init__(folder)
        self.data, self.weights = data.absolute(), weights.absolute()

    def command(
        self, name: str, arm: Arm, rate: float, decay: float, pairs: int, seed: int = 0, **changes: Any
    ) -> list[str]:
        """Write the recipe of a run, and return the command that trains it."""
        path = self.folder / f"{plain(name)}.yaml"
        fields = yaml.safe_load(read_recipes([str(RECIPES / "icons_32.yaml")], Recipe))
        fields["model"]["vision_config"] |= {"hidden_size": arm.width, "intermediate_size": 4 * arm.width}
        fields["data"] |= {
            "shards": str(self.data / "train"), "tokenizer": str(self.data / "tokenizer"),
            "weights": str(self.weights), "global_batch_size": arm.batch,
        }  # fmt: skip
        fields["optim"] = {"name": arm.optimizer, "weight_decay": decay}
        stage = {"name": "masked", "samples": pairs, "mask_ratio": MASK, "base_lr": rate}
        fields["stages"] = [stage | {"warmup_samples": round(WARMUP * pairs / arm.batch) * arm.batch}]
        fields["eval"] = {"tasks": [], "num_workers": 0}
        fields |= {"seed": seed, "output_dir": str(path.with_suffix("")), **changes}
        write_text(path, yaml.safe_dump(fields))
        return [sys.executable, "-m", "flipscale.pretrain", "--config", str(path)]

    def train(self, name: str, arm: Arm, rate: float, decay: float, pairs: int, seed: int = 0, **changes: Any) -> Path:
        """Train a run, unless that is done, and return its folder."""
        run_dir = self.folder / plain(name)
        if not (run_dir / "DONE").exists():
            shutil.rmtree(run_dir, ignore_errors=True)
            command = self.command(name, arm, rate, decay, pairs, seed, **changes)
            with open(run_dir.with_suffix(".log"), "ab") as log:
                subprocess.run(command, check=True, stdout=log, stderr=log)
        return run_dir

    def calibrate(self, arms: Sequence[Arm], repeats: int) -> dict[str, float]:
        """Return the pairs per second of each arm: medians over the windows of all repeats, arms in turn."""
        speeds: dict[str, list[float]] = {arm.name: [] for arm in arms}
        for _, arm in itertools.product(range(repeats), arms):
            run_dir = self.folder / "calibration"
            shutil.rmtree(run_dir, ignore_errors=True)
            log = {"every_samples": WINDOW}
            command = self.command("calibration", arm, *FIRST[arm.optimizer], WINDOWS * WINDOW, log=log)
            pattern = r'"samples_seen": (\d+).*"stage": "(\w+)"'
            points = watch(command, run_dir / "metrics.jsonl", pattern, run_dir.with_suffix(".log"))
            steps = [(b[1] - a[1], b[2] - a[2]) for a, b in itertools.pairwise(points) if b[1] > a[1]]
            speeds[arm.name] += [pairs / seconds for pairs, seconds in steps]
        return {name: statistics.median(values) for name, values in speeds.items()}

    def tune(self, arm: Arm, pairs: int) -> dict[str, Any]:
        """Return the rate and decay of the best trial, and the mean rank of the right names in each trial."""

        def rank(rate: float, decay: float) -> float:
            run_dir = self.train(f"trial {arm.name}, {rate:.5f}, {decay:.3f}", arm, rate, decay, pairs)
            model = open_embedder(str(run_dir / "model"), start_accelerator([], "."))
            value = mean_rank(model, self.data / "validation")
            print(f"{arm.name}, rate {rate:g}, decay {decay:g}: mean rank {value:.1f}", flush=True)
            return value

        ranks = walk(rank, *FIRST[arm.optimizer])
        rate, decay = min(ranks, key=ranks.__getitem__)
        return {
            "rate": rate,
            "decay": decay,
            **{f"rate {one[0]:g}, decay {one[1]:g}": value for one, value in ranks.items()},
        }


def walk(rank: Callable[[float, float], float], rate: float, decay: float) -> dict[tuple[float, float], float]:
    """Return the ranks of `TRIALS` pairs of rate and decay, the lower the better.

    Each trial is beside the best so far: twice the rate, half of it, a third of the decay, three times the decay. If
    all four are tried, the walk ends.
    """
    ranks = {(rate, decay): rank(rate, decay)}
    while len(ranks) < TRIALS:
        rate, decay = min(ranks, key=ranks.__getitem__)
        beside = [(2 * rate, decay), (rate / 2, decay), (rate, decay / 3), (rate, 3 * decay)]
        following = next((one for one in beside if not any(_near(one, tried) for tried in ranks)), None)
        if following is None:
            break
        ranks[following] = rank(*following)
    return ranks


def _near(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return all(abs(a / b - 1) < 0.01 for a, b in zip(one, other, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that examples/icons/data.py wrote")
    parser.add_argument("--weights", type=Path, required=True, help="weights by counts of the names")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1.2, help="length of the last runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="calibrations of each arm")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="batch sizes to train now")
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)), help="the core that trains")
    args = parser.parse_args(arguments)
    os.sched_setaffinity(0, {args.core})
    torch.set_num_threads(1)
    runs, seconds = Runs(args.data, args.weights, args.output_dir), 60 * args.minutes
    arms = [Arm(*one) for one in itertools.product(WIDTHS, args.batches, FIRST)]
    batches = " ".join(map(str, args.batches))
    pace = runs.kept(f"pairs per second {batches}", lambda: runs.calibrate(arms, args.repeats))
    rows = [["width", "batch", "optimiser", "rate", "decay", "pairs/s", "pairs", "validation, top-1", "test, top-1"]]
    for arm in arms:
        pairs, short = (round(part * seconds * pace[arm.name] / arm.batch) * arm.batch for part in (1, TRIAL))
        best = runs.kept(f"tuned {arm.name}", lambda arm=arm, short=short: runs.tune(arm, short))
        results: dict[str, list[Result]] = {"validation": [], "test": []}
        for seed in range(args.seeds):
            tasks = [{"kind": "zero_shot", "data": str(runs.data / name), "name": name} for name in results]
            evaluations = {"eval": {"tasks": tasks, "num_workers": 0}}
            name = f"{arm.name}, seed {seed}"
            run_dir = runs.train(name, arm, best["rate"], best["decay"], pairs, seed, **evaluations)
            for one in read_results(run_dir):
                if one.result.metric == "top1":
                    results[one.result.task].append(one.result)
            print(f"{name}: {results['test'][-1].estimate_text}", flush=True)
        setting = [f"{best['rate']:g}", f"{best['decay']:.2g}", f"{pace[arm.name]:,.0f}", f"{pairs:,}"]
        rows.append([str(arm.width), str(arm.batch), arm.optimizer, *setting, *map(estimate, results.values())])
    table = markdown_table(rows, 3)
    write_text(runs.folder / f"{plain(f'table {batches}')}.md", table + "\n")
    print(f"\n{table}")


if __name__ == "__main__":
    main()
