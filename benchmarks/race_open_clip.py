"""Train on the icons with flipscale and with open_clip's own trainer for equal time, and compare their accuracy.

    python examples/icons/data.py data/icons
    flipscale prepare tokenizer data/icons/train data/icons/tokenizer_ends --begin_and_end
    python benchmarks/race_open_clip.py --data data/icons --minutes 6 --seeds 3 --output_dir runs/race_open_clip

One core trains one model at a time. Both trainers have the same shards, word pieces, batch size, crops and image tower,
and a text tower of one layer. The shards have the pairs of `train` whose names at least five sets have, as the names of
`test` do; of all pairs, open_clip's trainer learns next to nothing in minutes. On `validation`, trials choose
open_clip's text tower, and each trainer's rate and decay. The last runs are tested on `test`. Times are pairs divided
by the pairs per second of processor time that the trainers reach in turn, so other work on the machine decides nothing.
After a stop, the same command goes on.
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from flipscale.data.sources.tar import TarSource, add_member
from flipscale.engines.build import start_accelerator
from flipscale.engines.device import is_faster_in_bf16
from flipscale.engines.launch import PRECISION
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.zero_shot import classifier
from flipscale.evaluation.presentation.curves import Curve, estimate, times_to_equal
from flipscale.evaluation.results import append_results, read_results
from flipscale.evaluation.suite import build_tasks, run_tasks
from flipscale.evaluation.test_set import TestSet
from flipscale.hub.loading import open_embedder
from flipscale.io.atomic import atomic_write, new_folder, write_text
from flipscale.io.json_lines import read_metrics
from flipscale.io.progress import each
from flipscale.io.text_table import markdown_table
from flipscale.recipe.files import read_recipe
from flipscale.recipe.recipe import Recipe, to_yaml
from flipscale.runs.complete_recipe import parse_recipe
from flipscale.studies.figures import draw_curves
from flipscale.studies.runs import in_time

RECIPES = Path(__file__).parents[1] / "examples/icons"
BATCH, WARMUP, EVALUATIONS = 128, 0.05, 5
LEAST_SETS = 5  # each name of the training pairs is in so many sets
PAIRS_PER_SHARD = 8192
TRIAL = 0.25  # length of a trial, in parts of a last run
SHORTER = (4, 8)  # complete schedules of flipscale in these parts of the time
WINDOW, WINDOWS = 3, 5  # steps of a window of the calibration, and windows of each stage
# Both image towers, and width, heads and layers of both text towers.
VISION = {"image_size": 64, "patch_size": 4, "width": 128, "layers": 4, "heads": 2}
TEXT = {"width": 128, "layers": 1, "heads": 2, "context_length": 16}
# Text towers that open_clip offers: CLIP's own, one with a class token that sees no padding, and BERT's with a mean.
TEXT_TOWERS: dict[str, dict[str, Any]] = {
    "causal, end token": {"pool_type": "eos"},
    "class token": {"no_causal_mask": True, "embed_cls": True},
    "mean of the words": {"hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"},
}
# Rates and decays of the trials, for each trainer. flipscale's rates are for 256 pairs.
RATES = {"open_clip": (1e-3, 2e-3, 4e-3), "flipscale": (1e-3, 2e-3, 4e-3)}
DECAY = {"open_clip": 0.2, "flipscale": 0.3}
# flipscale's trainer, with a clock that a step moves by the time of its pairs at a pace.
PACED_MAIN = """
import json, sys
from flipscale import pretrain
from flipscale.engines.slow_steps import StepWatch

class PacedWatch(StepWatch):
    def timed(self, *arguments):
        for batch in super().timed(*arguments):
            yield batch
            self._seconds_before += {batch_size} / {pace}[batch.step.stage.name]

    trained_seconds = property(lambda self: self._seconds_before)

pretrain.StepWatch = PacedWatch
pretrain.main()
"""

# Pairs per second by stage; open_clip has one, `all`.
Pace = dict[str, float]


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Args:
        recipe: flipscale's recipe in `examples/icons`; empty for open_clip.
        dropout: open_clip's patch dropout.
    """

    name: str
    recipe: str = ""
    dropout: float = 0.0

    @property
    def side(self) -> str:
        return "flipscale" if self.recipe else "open_clip"


ARMS = (
    Arm("open_clip, 75 % patch dropout", dropout=0.75),
    Arm("flipscale, size schedule", "icons_path"),
    Arm("flipscale, 75 % masked", "icons"),
    Arm("open_clip, whole images"),
)


@dataclass(frozen=True)
class Setting:
    """Rate and decay of an arm, and open_clip's text tower."""

    rate: float
    decay: float
    text: str


class RunFolder:
    """An output folder of runs that have one core each, and of JSON files that are made once."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        self.precision = "bf16" if is_faster_in_bf16() else "no"
        os.environ.update({PRECISION: self.precision, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
        self.folder.mkdir(parents=True, exist_ok=True)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the content of a JSON file of the folder, made if there is none."""
        path = self.folder / f"{plain(name)}.json"
        if not path.exists():
            write_text(path, json.dumps(make(), indent=1) + "\n")
        return json.loads(path.read_text(encoding="utf-8"))


class Race(RunFolder):
    """The runs of one race."""

    def __init__(self, data: Path, folder: Path):
        super().__init__(folder)
        self.data = data.absolute()

    def shards(self) -> Path:
        """Return the folder of the training pairs, written if it is missing: those of names of `LEAST_SETS` sets."""
        folder = self.folder / "train"
        if not folder.exists():
            with new_folder(folder) as partial_folder:
                _write_common_pairs(self.data, partial_folder)
        return folder

    def train(
        self, name: str, arm: Arm, setting: Setting, seconds: float, pace: Pace, seed: int = 0, tested: bool = False
    ) -> Path:
        """Train an arm, unless that is done, and return the run directory. If `tested`, evaluate it on the way."""
        run_dir = self.folder / plain(name)
        if (run_dir / "DONE").exists():
            return run_dir
        shutil.rmtree(run_dir, ignore_errors=True)
        tasks = [{"kind": "zero_shot", "data": str(self.data / "test"), "name": "test"}] if tested else []
        epochs = EVALUATIONS if tested else 1
        samples = round(seconds * pace.get("all", 0.0) / epochs / BATCH) * BATCH
        if arm.recipe:
            recipe = in_time(self.recipe(arm, setting, run_dir, seed, tasks), seconds / 60)
            main = PACED_MAIN.format(batch_size=BATCH, pace=pace)
            command = [sys.executable, "-c", main, "--config", _written(recipe)]
        else:
            command = self.open_clip_command(arm, setting, run_dir, seed, samples, epochs)
        with open(run_dir.with_suffix(".log"), "ab") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
        if not arm.recipe:
            self.finish_open_clip(run_dir, setting, samples, pace["all"], tasks)
        return run_dir

    def recipe(
        self, arm: Arm, setting: Setting, run_dir: Path, seed: int, tasks: Sequence[dict[str, Any]] = ()
    ) -> Recipe:
        """Return flipscale's recipe of an arm, with a text tower of `TEXT`."""
        fields = yaml.safe_load(read_recipe(str(RECIPES / f"{arm.recipe}.yaml"), Recipe))
        for tower, size in (("vision_config", VISION), ("text_config", TEXT)):
            fields["model"][tower] |= {
                "hidden_size": size["width"], "intermediate_size": 4 * size["width"],
                "num_hidden_layers": size["layers"], "num_attention_heads": size["heads"],
                "projection_dim": VISION["width"],
            }  # fmt: skip
        fields["data"] |= {"shards": str(self.shards()), "tokenizer": str(self.data / "tokenizer")}
        fields["data"]["global_batch_size"] = BATCH
        fields["optim"]["weight_decay"] = setting.decay
        fields["stages"][0]["base_lr"] = setting.rate
        fields["eval"] = {"tasks": list(tasks), "num_workers": 0}
        fields |= {"seed": seed, "output_dir": str(run_dir)}
        path = run_dir.with_suffix(".yaml")
        write_text(path, yaml.safe_dump(fields))
        return parse_recipe(["--config", str(path)])

    def open_clip_command(
        self, arm: Arm, setting: Setting, run_dir: Path, seed: int, samples: int, epochs: int, *more: str
    ) -> list[str]:
        """Return the command of open_clip's trainer for `epochs` of `samples`, with a checkpoint after each."""
        shards = sorted(self.shards().glob("*.tar"))
        arguments: dict[str, Any] = {
            "model": f"local-dir:{self.model_folder(setting.text)}", "train-data": "::".join(map(str, shards)),
            "dataset-type": "webdataset", "train-num-samples": samples, "epochs": epochs, "batch-size": BATCH,
            "precision": "amp_bf16" if self.precision == "bf16" else "fp32", "workers": 1, "device": "cpu",
            "lr": setting.rate, "wd": setting.decay, "warmup": max(1, round(WARMUP * epochs * samples / BATCH)),
            "seed": seed, "logs": self.folder, "name": run_dir.name,
        }  # fmt: skip
        if arm.dropout:
            arguments["force-patch-dropout"] = arm.dropout
        words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
        return [sys.executable, "-m", "open_clip_train.main", *words, "--aug-cfg", "scale=(0.8,1.0)", *more]

    def model_folder(self, text: str) -> Path:
        """Return the folder of open_clip's model configuration and tokenizer, written if it is missing."""
        # Its name has "vit", for which the trainer has other betas.
        folder = self.folder / "models" / f"vit_{plain(text)}"
        if not folder.exists():
            with atomic_write(folder) as partial_folder:
                _write_open_clip_model(partial_folder, folder, self.data, dict(TEXT_TOWERS[text]))
        return folder

    def finish_open_clip(
        self, run_dir: Path, setting: Setting, samples: int, pairs_per_s: float, tasks: list[dict[str, Any]]
    ) -> None:
        """Write a model folder for each checkpoint, evaluate them by flipscale, and write the files of its runs."""
        from safetensors.torch import save_file

        records = []
        for checkpoint in sorted((run_dir / "checkpoints").glob("epoch_*.pt")):
            number = int(checkpoint.stem.removeprefix("epoch_"))
            content = torch.load(checkpoint, map_location="cpu", weights_only=True)
            folder = run_dir / f"model_{number}"
            shutil.copytree(self.model_folder(setting.text), folder)
            weights = {name: value.contiguous() for name, value in content["state_dict"].items()}
            save_file(weights, folder / "open_clip_model.safetensors")
            place = (number * samples // BATCH, number * samples, number * samples / pairs_per_s)
            records.append(dict(zip(("step", "samples_seen", "trained_seconds"), place, strict=True)))
            if tasks:
                results = run_tasks(_embedder(folder, "open_clip:local-dir:"), build_tasks(tasks))
                append_results(run_dir, results, *place)
        write_text(run_dir / "metrics.jsonl", "".join(f"{json.dumps(record)}\n" for record in records))
        shutil.rmtree(run_dir / "checkpoints")
        (run_dir / "DONE").touch()

    def trial(self, arm: Arm, seconds: float, pace: Pace, text: str, rate: float, decay: float) -> float:
        """Train an arm for a short time, and return the mean rank of the right names on `validation`."""
        name = f"trial {arm.name} {text} {rate:.4f} {decay:.4f}"
        run_dir = self.train(name, arm, Setting(rate, decay, text), seconds, pace)
        model = (run_dir / "model", "") if arm.recipe else (run_dir / "model_1", "open_clip:local-dir:")
        rank = mean_rank(_embedder(*model), self.data / "validation")
        print(f"{name}: mean rank {rank:.1f}", flush=True)
        return rank

    def calibrate(self, repeats: int) -> dict[str, Pace]:
        """Return the pairs per second of each arm and stage: medians over the windows of all repeats, arms in turn."""
        speeds: dict[str, dict[str, list[float]]] = {arm.name: {} for arm in ARMS}
        for _, arm in itertools.product(range(repeats), ARMS):
            for stage, pairs_per_s in self._windows(arm):
                speeds[arm.name].setdefault(stage, []).append(pairs_per_s)
        return {name: {stage: statistics.median(all_) for stage, all_ in own.items()} for name, own in speeds.items()}

    def _windows(self, arm: Arm) -> list[tuple[str, float]]:
        """Train a few steps of each stage, and return the stage and the pairs per second of each window."""
        run_dir, pairs = self.folder / "calibration", WINDOW * BATCH
        shutil.rmtree(run_dir, ignore_errors=True)
        setting = Setting(RATES[arm.side][0], DECAY[arm.side], next(iter(TEXT_TOWERS)))
        if arm.recipe:
            recipe = self.recipe(arm, setting, run_dir, 0)
            steps: dict[str, Any] = {
                "samples": WINDOWS * pairs,
                "warmup_samples": 0,
                "share": None,
                "warmup_share": 0.0,
            }
            stages = [dataclasses.replace(stage, **steps) for stage in recipe.stages]
            log = dataclasses.replace(recipe.log, every_samples=pairs)
            changed = dataclasses.replace(recipe, stages=stages, budget_minutes=None, log=log)
            command = [sys.executable, "-m", "flipscale.pretrain", "--config", _written(changed)]
            records, pattern = "metrics.jsonl", r'"samples_seen": (\d+).*"stage": "(\w+)"'
        else:
            more = ("--log-every-n-steps", str(WINDOW))
            command = self.open_clip_command(arm, setting, run_dir, 0, WINDOWS * pairs, 1, *more)
            records, pattern = "out.log", r"Train Epoch: 0 \[ *(\d+)/.*Loss()"
        ends = itertools.pairwise(watch(command, run_dir / records, pattern, run_dir.with_suffix(".log")))
        return [(last[0], (last[1] - one[1]) / (last[2] - one[2])) for one, last in ends if one[0] == last[0]]


def plain(name: str) -> str:
    """Return a name as a file name."""
    return re.sub("[^a-z0-9]+", "_", name.lower())


def _written(recipe: Recipe) -> str:
    path = Path(recipe.output_dir).with_suffix(".yaml")
    write_text(path, to_yaml(recipe))
    return str(path)


def _write_common_pairs(data: Path, folder: Path) -> None:
    """Write the pairs of `train` whose names at least `LEAST_SETS` sets have. `train.tsv` has a row for each pair."""
    rows = [line.split("\t") for line in (data / "train.tsv").read_text(encoding="utf-8").splitlines()]
    sets = defaultdict(set)
    for prefix, name in rows:
        sets[name].add(prefix)
    source = TarSource(str(data / "train"))
    places = [(shard, number) for shard, size in enumerate(source.shard_sizes) for number in range(size)]
    kept = [place for place, (_, name) in zip(places, rows, strict=True) if len(sets[name]) >= LEAST_SETS]
    firsts = range(0, len(kept), PAIRS_PER_SHARD)
    for number, first in enumerate(each(firsts, "common names", "shards")):
        with tarfile.open(folder / f"{number:05}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, place in enumerate(kept[first : first + PAIRS_PER_SHARD], first):
                pair = source.read(*place)
                add_member(tar, f"{row:06}.png", pair.image)
                add_member(tar, f"{row:06}.txt", pair.captions[0])


def _write_open_clip_model(folder: Path, final: Path, data: Path, fields: dict[str, Any]) -> None:
    """Write the configuration and the tokenizer of a model in `folder`, which becomes `final`."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, BertConfig, BertModel

    has_ends = fields.get("pool_type") == "eos"
    tokenizer = AutoTokenizer.from_pretrained(data / ("tokenizer_ends" if has_ends else "tokenizer"))
    if has_ends:
        first, last = tokenizer.bos_token, tokenizer.eos_token
        ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (first, last)]
        template = TemplateProcessing(single=f"{first} $A {last}", special_tokens=ends)
        tokenizer.backend_tokenizer.post_processor = template
        fields["eos_id"] = tokenizer.eos_token_id
    tokenizer.save_pretrained(folder)
    if "hf_pooler_type" in fields:
        # open_clip's trainer reads the weights of such a tower from a folder.
        fields["hf_model_name"] = str(final / "text_tower")
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=TEXT["width"], num_hidden_layers=TEXT["layers"],
            num_attention_heads=TEXT["heads"], intermediate_size=4 * TEXT["width"],
            max_position_embeddings=TEXT["context_length"], type_vocab_size=1, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        BertModel(config, add_pooling_layer=False).save_pretrained(folder / "text_tower")
    text = {**TEXT, "vocab_size": len(tokenizer), "hf_tokenizer_name": str(final), "pad_id": tokenizer.pad_token_id}
    vision = {name: VISION[name] for name in ("image_size", "patch_size", "width", "layers")}
    vision["head_width"] = VISION["width"] // VISION["heads"]
    model = {"embed_dim": VISION["width"], "vision_cfg": vision, "text_cfg": {**text, **fields}}
    model["custom_text"] = "embed_cls" in fields  # the class of models that can have one
    write_text(folder / "open_clip_config.json", json.dumps({"model_cfg": model}, indent=1))


def watch(command: list[str], records: Path, pattern: str, log: Path) -> list[tuple[str, int, float]]:
    """Run a command, and return the stages and numbers of pairs in its records, with its processor time at each.

    Args:
        pattern: regular expression of a record, with groups for the pairs and the stage.
    """
    points: list[tuple[str, int, float]] = []
    with open(log, "ab") as output:
        process = psutil.Popen(command, stdout=output, stderr=output)
    while process.poll() is None:
        time.sleep(0.02)
        try:
            seconds = sum(sum(one.cpu_times()[:2]) for one in [process, *process.children(recursive=True)])
        except psutil.NoSuchProcess:
            continue
        matches = re.findall(pattern, records.read_text(encoding="utf-8")) if records.exists() else []
        pairs, stage = matches[-1] if matches else (0, "")
        if matches and (not points or (int(pairs) > points[-1][1] and seconds > points[-1][2])):
            points.append((stage or "all", int(pairs), seconds))
    assert process.returncode == 0, f"{command[2]} ended with exit code {process.returncode}; its output is in {log}"
    return points


def _embedder(folder: Path, prefix: str) -> Embedder:
    return open_embedder(f"{prefix}{folder}", start_accelerator([], "."))


def mean_rank(embedder: Embedder, data: Path) -> float:
    """Return the geometric mean, over the images of a test set, of the rank of the right name; 1 is perfect.

    Near chance, the accuracy is too rough to choose by."""
    test_set = TestSet.open(str(data))
    names = test_set.class_names()
    labels = test_set.labels(embedder, len(names))
    scores = classifier(embedder, names, test_set.templates())(embedder.images(test_set.source))
    ranks = 1 + (scores > scores.gather(1, labels[:, None])).sum(dim=1)
    return float(ranks.double().log().mean().exp())


def tune(side: str, trial: Callable[..., float]) -> dict[str, float]:
    """Return the rate and the decay of the best of four trials, and the mean rank of each trial.

    Three trials differ in the rate. If the lowest or the highest is best, the fourth goes on in that direction; else it
    has a quarter of the decay.
    """
    (low, middle, high), decay = RATES[side], DECAY[side]
    ranks = {(rate, decay): trial(rate=rate, decay=decay) for rate in (low, middle, high)}
    best, _ = min(ranks, key=ranks.__getitem__)
    last = {low: (low / 2, decay), middle: (middle, decay / 4), high: (2 * high, decay)}[best]
    ranks[last] = trial(rate=last[0], decay=last[1])
    rate, decay = min(ranks, key=ranks.__getitem__)
    return {"rate": rate, "decay": decay, **{f"rate {one[0]:g}, decay {one[1]:g}": rank for one, rank in ranks.items()}}


def report(curves: Mapping[str, Sequence[Curve]], settings: Mapping[str, Setting], figure: Path) -> str:
    """Draw the figure, and return the table and the times to equal accuracy. Curves are by arm and part of the time."""
    rows = [["", "seeds", "pairs/s", "training", "pairs", "rate", "decay", "top-1", "top-5"]]
    for name, group in curves.items():
        ends, setting = [curve.records[-1] for curve in group], settings[name.split(",")[0]]
        seconds, seen = (statistics.mean(end[key] for end in ends) for key in ("trained_seconds", "samples_seen"))
        numbers = [f"{seen / seconds:,.0f}", f"{seconds:.0f} s", f"{seen:,.0f}", str(setting.rate), str(setting.decay)]
        results = [[curve.course(f"test/{metric}")[-1].result for curve in group] for metric in ("top1", "top5")]
        texts = [one[0].estimate_text if len(one) == 1 else estimate(one) for one in results]
        rows.append([name, str(len(group)), *numbers, *texts])
    whole = {arm: curves[arm.name] for arm in ARMS}
    pairs = [(ours, theirs) for ours, theirs in itertools.product(ARMS, ARMS) if ours.recipe and not theirs.recipe]
    times = [sentence for pair in pairs for sentence in times_to_equal([curve for arm in pair for curve in whole[arm]])]
    named = {arm.name: group for arm, group in whole.items()}
    draw_curves({"": named}, "trained_seconds", "test/top1", "zero-shot top-1 on test, %", figure)
    return "\n\n".join([markdown_table(rows, 1), *times])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that examples/icons/data.py wrote")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6.0, help="length of the last runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="calibrations of each arm")
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)), help="the core that trains")
    args = parser.parse_args(arguments)
    parts = ("train", "train.tsv", "validation", "test", "tokenizer", "tokenizer_ends")
    if missing := [part for part in parts if not (args.data / part).exists()]:
        parser.error(f"--data {args.data} has no {', '.join(missing)}; the commands above make them")
    os.sched_setaffinity(0, {args.core})
    torch.set_num_threads(1)
    race, seconds = Race(args.data, args.output_dir), 60 * args.minutes
    begun = race.kept("race", lambda: {"minutes": args.minutes})["minutes"]
    if begun != args.minutes:
        parser.error(
            f"--minutes is {args.minutes:g}, and {args.output_dir} holds a race of {begun:g}; name another folder"
        )
    pace: dict[str, Pace] = race.kept("pairs_per_second", lambda: race.calibrate(args.repeats))

    # The first arm of each trainer is tuned, and the others have its setting.
    trials = {arm.side: partial(race.trial, arm, seconds=TRIAL * seconds, pace=pace[arm.name]) for arm in ARMS[1::-1]}
    usual: dict[str, Any] = {"rate": RATES["open_clip"][0], "decay": DECAY["open_clip"]}
    towers = race.kept("text_towers", lambda: {text: trials["open_clip"](text=text, **usual) for text in TEXT_TOWERS})
    texts, settings = {"open_clip": min(towers, key=towers.__getitem__), "flipscale": ""}, dict[str, Setting]()
    for side, trial in trials.items():
        tuned = race.kept(f"tuned {side}", partial(tune, side, partial(trial, text=texts[side])))
        settings[side] = Setting(tuned["rate"], tuned["decay"], texts[side])
    curves: dict[str, list[Curve]] = {}
    for part, seed, arm in itertools.product((1, *SHORTER), range(args.seeds), ARMS):
        if part == 1 or arm.recipe:
            name = arm.name if part == 1 else f"{arm.name}, 1/{part} of the time"
            setting, part_of_time = settings[arm.side], seconds / part
            run_dir = race.train(f"{name} seed {seed}", arm, setting, part_of_time, pace[arm.name], seed, tested=True)
            records, measured = read_metrics(run_dir), read_results(run_dir)
            curve = Curve(name, records, measured, {"": arm.dropout}, seed=seed, learned=name)
            curves.setdefault(name, []).append(curve)
            print(f"{name}, seed {seed}: {curve.course('test/top1')[-1].result.estimate_text}", flush=True)
    table = report(curves, settings, race.folder / "accuracy.png")
    write_text(race.folder / "table.md", table + "\n")
    print(f"\n{table}\n\nfigure: {race.folder}/accuracy.png")


if __name__ == "__main__":
    main()
