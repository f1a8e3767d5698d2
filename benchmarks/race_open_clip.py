"""Train with flipscale and with open_clip's own trainer for equal time, and compare their accuracy.

    python examples/demo/data.py data/demo
    python benchmarks/race_open_clip.py --data data/demo --minutes 6 20 60 --seeds 3 --output_dir runs/race_demo
    python examples/icons/data.py data/icons
    python benchmarks/race_open_clip.py --data data/icons --minutes 6 20 60 --seeds 3 --output_dir runs/race_icons

One core trains one model at a time. Both trainers have the same shards, word pieces, batch size and crops, image towers
of equal sizes, and a text tower of `--text_layers` with the mean over the words. open_clip's optimisers are its AdamW,
and timm's Muon and AdaMuon by `--opt`. At each length, each trainer with each optimiser has four trials of rate and
decay. They are measured on the icons' `validation`, or on one of the demo's seven artists. The last runs are tested on
`test`. Then the differences between the trainers are changed one at a time, at the shortest length.

Times are pairs divided by the pairs per second of processor time that the arms reach in turn, so other work on the
machine slows all arms alike. After a stop, the same command resumes, and runs no finished arm again. The tables in
`race.md` and the figure `race.png` are written anew after each run.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
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

from flipscale import cli
from flipscale.data.sources.tar import TarSource, add_member
from flipscale.engines.build_engine import start_accelerator
from flipscale.engines.device import is_faster_in_bf16
from flipscale.engines.launch import PRECISION
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.intervals import mean_of
from flipscale.evaluation.kinds.zero_shot import classifier
from flipscale.evaluation.presentation.curves import Curve, estimate, seconds_to
from flipscale.evaluation.results import NOTHING, append_results, read_results
from flipscale.evaluation.suite import build_tasks, run_tasks
from flipscale.evaluation.test_set import TestSet
from flipscale.hub.loading import open_embedder
from flipscale.io.atomic import atomic_write, new_folder, write_text
from flipscale.io.json_lines import read_metrics
from flipscale.io.progress import each
from flipscale.io.text_table import markdown_table
from flipscale.preparation.shard_writer import write_classes
from flipscale.recipe.files import read_recipes
from flipscale.recipe.recipe import Recipe, to_yaml
from flipscale.start.complete_recipe import parse_recipe
from flipscale.studies.runs import in_time
from flipscale.studies.study_figures import draw_study_curves

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = EXAMPLES / "icons"
WARMUP, EVALUATIONS = 0.05, 5
PAIRS_PER_SHARD = 8192
WINDOW, WINDOWS = 3, 5  # steps of a window of the calibration, and windows of each stage
LOADED = 20  # batches that the loader makes in a calibration
SHORTER = (4, 8)  # flipscale also has complete schedules of these parts of the shortest length
MASK = 0.75
VALIDATION_ARTIST = "fxemoji"  # the only artist of the demo's seven without a relative among them and in the test
# The changes of colour of demo_path.
COLORS = {"color_jitter": {"brightness": 0.32, "contrast": 0.32, "saturation": 0.32, "hue": 0.08, "probability": 0.8}}
# Rates and decays of the trials. flipscale's rates are for 256 pairs.
TRIALS: dict[tuple[str, str], tuple[tuple[float, float, float], float]] = {
    ("open_clip", "adamw"): ((1e-3, 2e-3, 4e-3), 0.2),
    ("open_clip", "timm/muon"): ((2e-3, 4e-3, 8e-3), 0.2),
    ("open_clip", "timm/adamuon"): ((2e-3, 4e-3, 8e-3), 0.2),
    ("flipscale", "adamw"): ((1e-3, 2e-3, 4e-3), 0.2),
    ("flipscale", "muon"): ((1e-3, 2e-3, 4e-3), 0.3),
}
# flipscale's trainer, with a clock that a step moves by the time of its pairs at a pace.
PACED_MAIN = """
import json, sys
from flipscale import pretrain
from flipscale.process.slow_steps import StepWatch

class PacedWatch(StepWatch):
    def timed(self, *arguments):
        for batch in super().timed(*arguments):
            yield batch
            self._seconds_before += {batch_size} / {pace}[batch.step.stage.name]

    trained_seconds = property(lambda self: self._seconds_before)

pretrain.StepWatch = PacedWatch
pretrain.main()
"""

# open_clip's trainer on a core without bf16. timm's Muon always iterates in bf16, which is two thirds of a step there.
# In fp32 it is a ninth.
FP32_MAIN = """
import functools, sys, torch
from open_clip_train.main import main
from timm.optim import muon

muon.zeropower_via_newtonschulz = functools.partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
main(sys.argv[1:])
"""

# Pairs per second by stage; open_clip has one, `all`.
Pace = dict[str, float]


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Args:
        label: name in tables and figures.
        optimizer: the trainer's own name of it.
        stages: flipscale's stages, `masked`, `schedule` or `whole`; empty for open_clip, whose images are `MASK`ed by
            its patch dropout.
        words_only: whether the text tower has no layer.
        recolored: whether the images change their `COLORS`.
        counted: whether pairs are drawn by the counts of their captions.
        slowed: what makes flipscale's pace slower: `trainer` is the pace of open_clip with Muon, `loader` adds the time
            that the loader takes longer for whole images.
    """

    label: str
    optimizer: str
    stages: str = ""
    words_only: bool = False
    recolored: bool = False
    counted: bool = False
    slowed: str = ""

    @property
    def family(self) -> tuple[str, str]:
        """The trainer and its optimiser, which trials tune."""
        return ("flipscale" if self.stages else "open_clip"), self.optimizer


ARMS = {
    "open_clip_adamw": Arm("open_clip, AdamW", "adamw"),
    "open_clip_muon": Arm("open_clip, Muon", "timm/muon"),
    "open_clip_adamuon": Arm("open_clip, AdaMuon", "timm/adamuon"),
    "masked_adamw": Arm("flipscale, AdamW, 75 % masked", "adamw", "masked"),
    "masked_muon": Arm("flipscale, Muon, 75 % masked", "muon", "masked"),
    "schedule_muon": Arm("flipscale, Muon, size schedule", "muon", "schedule"),
    "recolored_muon": Arm("flipscale, Muon, sizes and colours", "muon", "schedule", recolored=True),
}
BASE, PEER = "masked_muon", "open_clip_muon"
# One change each: flipscale's in `BASE`, open_clip's in `PEER`.
PARTS = {
    "at_open_clip_pace": Arm("at the pace of open_clip's loader and step", "muon", "masked", slowed="trainer"),
    "mask_after_pixels": Arm("masked after all pixels are loaded", "muon", "masked", slowed="loader"),
    "whole": Arm("without a mask", "muon", "whole"),
    "words_only": Arm("text tower without a layer", "muon", "masked", words_only=True),
    "counted": Arm("pairs drawn by the counts of their captions", "muon", "masked", counted=True),
    "open_clip_words_only": Arm("open_clip, Muon, text tower without a layer", "timm/muon", words_only=True),
}
ALL = {**ARMS, **PARTS}


@dataclass(frozen=True)
class Setting:
    """Rate and decay of an arm."""

    rate: float
    decay: float


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
    """The runs of one race.

    Args:
        data: folder of the demo or of the icons.
        text_layers: layers of both text towers.
        least_sets: only the icons whose names so many sets have are trained on.
    """

    def __init__(self, data: Path, folder: Path, text_layers: int = 1, least_sets: int = 1):
        super().__init__(folder)
        self.data, self.text_layers, self.least_sets = data.absolute(), text_layers, least_sets
        self.has_icons = (data / "train.tsv").exists()
        self.base = self._example("masked")
        self.batch = int(self.base["data"]["global_batch_size"])

    def _example(self, stages: str) -> dict[str, Any]:
        """Return the example's recipe with these stages."""
        kind = "icons" if self.has_icons else "demo"
        name = {"masked": kind, "whole": f"{kind}_clip", "schedule": f"{kind}_path"}[stages]
        fields: dict[str, Any] = yaml.safe_load(read_recipes([str(EXAMPLES / kind / f"{name}.yaml")], Recipe))
        return fields

    def shards(self, is_trial: bool = False) -> Path:
        """Return the folder of the training pairs, written if it is missing."""
        if self.has_icons and self.least_sets <= 1:
            return self.data / "train"
        if not self.has_icons:
            return self._by_artist("train") if is_trial else self.data / "train"
        folder = self.folder / "train"
        if not folder.exists():
            with new_folder(folder) as partial_folder:
                _write_common_pairs(self.data, partial_folder, self.least_sets)
        return folder

    def validation(self) -> Path:
        """Return the test set that trials choose by."""
        return self.data / "validation" if self.has_icons else self._by_artist("validation")

    def _by_artist(self, part: str) -> Path:
        """Return the pairs of the demo without `VALIDATION_ARTIST`, `train`, or the test set of its drawings."""
        folder = self.folder / "trial_data"
        if not folder.exists():
            with new_folder(folder) as partial_folder:
                _split_by_artist(self.data / "train", partial_folder)
        return folder / part

    def weights(self) -> Path:
        """Return the sampling weights by counts of captions, written if they are missing."""
        folder = self.folder / "caption_counts"
        if not folder.exists():
            shards = str(self.shards())
            cli.main(["prepare", "weights", shards, str(folder), "--caption_counts", "--num_workers", "1"])
        return folder

    def train(
        self, name: str, arm: Arm, setting: Setting, seconds: float, pace: Pace, seed: int = 0, tested: bool = False
    ) -> Path:
        """Train an arm, unless that is done, and return the run directory. If `tested`, evaluate it on the way; else it
        is a trial."""
        run_dir = self.folder / plain(name)
        if (run_dir / "DONE").exists():
            return run_dir
        shutil.rmtree(run_dir, ignore_errors=True)
        tasks = [{"kind": "zero_shot", "data": str(self.data / "test"), "name": "test"}] if tested else []
        epochs = EVALUATIONS if tested else 1
        samples = max(1, round(seconds * pace.get("all", 0.0) / epochs / self.batch)) * self.batch
        shards = self.shards(is_trial=not tested)
        if arm.stages:
            recipe = in_time(self.recipe(arm, setting, run_dir, shards, seed, tasks), seconds / 60)
            main = PACED_MAIN.format(batch_size=self.batch, pace=pace)
            command = [sys.executable, "-c", main, "--config", _written(recipe)]
        else:
            command = self.open_clip_command(arm, setting, run_dir, shards, seed, samples, epochs)
        with open(run_dir.with_suffix(".log"), "ab") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
        if not arm.stages:
            self.finish_open_clip(run_dir, arm, samples, pace["all"], tasks)
        return run_dir

    def recipe(
        self, arm: Arm, setting: Setting, run_dir: Path, shards: Path, seed: int, tasks: Sequence[dict[str, Any]] = ()
    ) -> Recipe:
        """Return flipscale's recipe of an arm."""
        fields = self._example(arm.stages)
        fields["model"]["text_config"]["num_hidden_layers"] = self._layers(arm)
        fields["data"] |= {"shards": str(shards), "tokenizer": str(self.data / "tokenizer")}
        fields["data"]["augment"] = COLORS if arm.recolored else {}
        if arm.counted:
            fields["data"]["weights"] = str(self.weights())
        fields["optim"] |= {"name": arm.optimizer, "weight_decay": setting.decay}
        fields["stages"][0]["base_lr"] = setting.rate
        fields["eval"] = {"tasks": list(tasks), "num_workers": 0}
        fields |= {"seed": seed, "output_dir": str(run_dir)}
        path = run_dir.with_suffix(".yaml")
        write_text(path, yaml.safe_dump(fields))
        return parse_recipe(["--config", str(path)])

    def _layers(self, arm: Arm) -> int:
        return 0 if arm.words_only else self.text_layers

    def open_clip_command(
        self, arm: Arm, setting: Setting, run_dir: Path, shards: Path, seed: int, samples: int, epochs: int, *more: str
    ) -> list[str]:
        """Return the command of open_clip's trainer for `epochs` of `samples`, with a checkpoint after each."""
        arguments: dict[str, Any] = {
            "model": f"local-dir:{self.model_folder(arm)}",
            "train-data": "::".join(map(str, sorted(shards.glob("*.tar")))),
            "dataset-type": "webdataset", "train-num-samples": samples, "epochs": epochs, "batch-size": self.batch,
            "precision": "amp_bf16" if self.precision == "bf16" else "fp32", "workers": 1, "device": "cpu",
            "opt": arm.optimizer, "lr": setting.rate, "wd": setting.decay, "force-patch-dropout": MASK,
            "warmup": max(1, round(WARMUP * epochs * samples / self.batch)),
            "seed": seed, "logs": self.folder, "name": run_dir.name,
        }  # fmt: skip
        if arm.optimizer != "adamw":
            arguments["eps"] = 1e-8  # without it, timm's optimisers get None and refuse it
        words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
        low, high = self.base["data"]["crop_scale"]
        trainer = ["-m", "open_clip_train.main"] if self.precision == "bf16" else ["-c", FP32_MAIN]
        return [sys.executable, *trainer, *words, "--aug-cfg", f"scale=({low},{high})", *more]

    def model_folder(self, arm: Arm) -> Path:
        """Return the folder of open_clip's model configuration and tokenizer, written if it is missing."""
        # Its name has "vit", for which the trainer has other betas.
        folder = self.folder / "models" / f"vit_text_{self._layers(arm)}"
        if not folder.exists():
            with atomic_write(folder) as partial_folder:
                _write_open_clip_model(partial_folder, folder, self.data, self.base["model"], self._layers(arm))
        return folder

    def finish_open_clip(
        self, run_dir: Path, arm: Arm, samples: int, pairs_per_s: float, tasks: list[dict[str, Any]]
    ) -> None:
        """Write a model folder for each checkpoint, evaluate them by flipscale, and write the files of its runs."""
        from safetensors.torch import save_file

        records = []
        for checkpoint in sorted((run_dir / "checkpoints").glob("epoch_*.pt")):
            number = int(checkpoint.stem.removeprefix("epoch_"))
            content = torch.load(checkpoint, map_location="cpu", weights_only=True)
            folder = run_dir / f"model_{number}"
            shutil.copytree(self.model_folder(arm), folder, dirs_exist_ok=True)
            weights = {name: value.contiguous() for name, value in content["state_dict"].items()}
            save_file(weights, folder / "open_clip_model.safetensors")
            place = (number * samples // self.batch, number * samples, number * samples / pairs_per_s)
            records.append(dict(zip(("step", "samples_seen", "trained_seconds"), place, strict=True)))
            if tasks:
                results = run_tasks(_embedder(folder, "open_clip:local-dir:"), build_tasks(tasks))
                append_results(run_dir, results, *place)
        records.sort(key=lambda record: record["step"])
        write_text(run_dir / "metrics.jsonl", "".join(f"{json.dumps(record)}\n" for record in records))
        shutil.rmtree(run_dir / "checkpoints")
        (run_dir / "DONE").touch()

    def trial(self, arm: Arm, seconds: float, pace: Pace, rate: float, decay: float) -> float:
        """Train an arm for a short time, and return the mean rank of the right names on `validation`."""
        name = f"trial {' '.join(arm.family)} {seconds:.0f} s {rate:.4f} {decay:.4f}"
        run_dir = self.train(name, arm, Setting(rate, decay), seconds, pace)
        model = (run_dir / "model", "") if arm.stages else (run_dir / "model_1", "open_clip:local-dir:")
        rank = mean_rank(_embedder(*model), self.validation())
        print(f"{name}: mean rank {rank:.1f}", flush=True)
        return rank

    def calibrate(self, arms: Sequence[str], repeats: int) -> dict[str, Pace]:
        """Return the pairs per second of each arm and stage: medians over the windows of all repeats, arms in turn.

        Other work on the machine also slows processor time. So arms that are added later are measured in turn with
        `BASE` again, and scaled by its first pace.
        """
        first = self.folder / f"pace_{BASE}.json"
        again = [BASE] if arms and BASE not in arms and first.exists() else []
        speeds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for _, key in itertools.product(range(repeats), [*again, *arms]):
            for stage, pairs_per_s in self._windows(ALL[key]):
                speeds[key][stage].append(pairs_per_s)
        now = {key: {stage: statistics.median(all_) for stage, all_ in own.items()} for key, own in speeds.items()}
        ratio = json.loads(first.read_text(encoding="utf-8"))["masked"] / now[BASE]["masked"] if again else 1.0
        return {key: {stage: ratio * value for stage, value in now[key].items()} for key in arms}

    def _windows(self, arm: Arm) -> list[tuple[str, float]]:
        """Train a few steps of each stage, and return the stage and the pairs per second of each window."""
        run_dir, pairs = self.folder / "calibration", WINDOW * self.batch
        shutil.rmtree(run_dir, ignore_errors=True)
        setting, shards = Setting(TRIALS[arm.family][0][0], TRIALS[arm.family][1]), self.shards()
        if arm.stages:
            recipe = self.recipe(arm, setting, run_dir, shards, 0)
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
            command = self.open_clip_command(arm, setting, run_dir, shards, 0, WINDOWS * pairs, 1, *more)
            records, pattern = "out.log", r"Train Epoch: 0 \[ *(\d+)/.*Loss()"
        ends = itertools.pairwise(watch(command, run_dir / records, pattern, run_dir.with_suffix(".log")))
        return [(last[0], (last[1] - one[1]) / (last[2] - one[2])) for one, last in ends if one[0] == last[0]]

    def loading_seconds(self, mask_ratio: float) -> float:
        """Return the processor seconds that flipscale's loader takes for a pair."""
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from benchmarks.data import DataSetting, flipscale_batches
        from flipscale.data.pairs import InputShape

        recipe = self.recipe(ALL[BASE], Setting(1e-3, 0.0), self.folder / "loading", self.shards(), 0)
        vision, text = self.base["model"]["vision_config"], self.base["model"]["text_config"]
        shape = InputShape(vision["image_size"], vision["patch_size"], text["max_position_embeddings"])
        batches = flipscale_batches(DataSetting(recipe.data, shape, mask_ratio))
        next(batches)
        begun = time.process_time()
        for _ in range(LOADED):
            next(batches)
        return (time.process_time() - begun) / LOADED / self.batch


def plain(name: str) -> str:
    """Return a name as a file name."""
    return re.sub("[^a-z0-9]+", "_", name.lower())


def _written(recipe: Recipe) -> str:
    path = Path(recipe.output_dir).with_suffix(".yaml")
    write_text(path, to_yaml(recipe))
    return str(path)


def _write_common_pairs(data: Path, folder: Path, least_sets: int) -> None:
    """Write the icons of `train` whose names `least_sets` sets have. `train.tsv` has a row for each pair."""
    rows = [line.split("\t") for line in (data / "train.tsv").read_text(encoding="utf-8").splitlines()]
    sets = defaultdict(set)
    for prefix, name in rows:
        sets[name].add(prefix)
    source = TarSource(str(data / "train"))
    places = [(shard, number) for shard, size in enumerate(source.shard_sizes) for number in range(size)]
    kept = [place for place, (_, name) in zip(places, rows, strict=True) if len(sets[name]) >= least_sets]
    firsts = range(0, len(kept), PAIRS_PER_SHARD)
    for number, first in enumerate(each(firsts, "common names", "shards")):
        with tarfile.open(folder / f"{number:05}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, place in enumerate(kept[first : first + PAIRS_PER_SHARD], first):
                pair = source.read(*place)
                add_member(tar, f"{row:06}.png", pair.image)
                add_member(tar, f"{row:06}.txt", pair.captions[0])


def _split_by_artist(shards: Path, folder: Path) -> None:
    """Write the demo's pairs to `train` without `VALIDATION_ARTIST`, and its drawings of names that others have drawn
    to `validation`, a labelled set."""
    members: dict[str, dict[str, bytes]] = defaultdict(dict)
    homes: dict[str, str] = {}
    for shard in sorted(shards.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                members[key][kind], homes[key] = content.read(), shard.name
    held = {key for key, files in members.items() if json.loads(files["json"])["artist"] == VALIDATION_ARTIST}
    known = {files["txt"] for key, files in members.items() if key not in held}
    names = sorted({members[key]["txt"].decode() for key in held if members[key]["txt"] in known})
    labels = {name.encode(): str(number).encode() for number, name in enumerate(names)}
    for part in ("train", "validation"):
        (folder / part).mkdir()
    for home, keys in itertools.groupby(sorted(members.keys() - held, key=lambda key: (homes[key], key)), homes.get):
        with tarfile.open(folder / "train" / str(home), "w", format=tarfile.USTAR_FORMAT) as tar:
            for key in keys:
                for kind in ("png", "txt"):
                    add_member(tar, f"{key}.{kind}", members[key][kind])
    with tarfile.open(folder / "validation" / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for key in sorted(key for key in held if members[key]["txt"] in labels):
            files = members[key]
            for kind, file in {"png": files["png"], "txt": files["txt"], "cls": labels[files["txt"]]}.items():
                add_member(tar, f"{key}.{kind}", file)
    write_classes(folder / "validation", names)


def _write_open_clip_model(folder: Path, final: Path, data: Path, model: Mapping[str, Any], layers: int) -> None:
    """Write the configuration and the tokenizer of a model in `folder`, which becomes `final`.

    Its image tower has the sizes of flipscale's `model`. Its text tower is BERT's with the mean over the words.
    """
    from transformers import AutoTokenizer, BertConfig, BertModel

    vision, text = model["vision_config"], model["text_config"]
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    tokenizer.save_pretrained(folder)
    width = text["hidden_size"]
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=text["num_attention_heads"], intermediate_size=text["intermediate_size"],
        max_position_embeddings=text["max_position_embeddings"], type_vocab_size=1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    # open_clip's trainer reads the weights of such a tower from a folder.
    BertModel(config, add_pooling_layer=False).save_pretrained(folder / "text_tower")
    image_tower = {
        "image_size": vision["image_size"], "patch_size": vision["patch_size"], "width": vision["hidden_size"],
        "layers": vision["num_hidden_layers"], "head_width": vision["hidden_size"] // vision["num_attention_heads"],
        "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
    }  # fmt: skip
    text_tower = {
        "width": width, "layers": layers, "heads": text["num_attention_heads"],
        "context_length": text["max_position_embeddings"], "vocab_size": len(tokenizer),
        "hf_tokenizer_name": str(final), "pad_id": tokenizer.pad_token_id, "hf_pooler_type": "mean_pooler",
        "hf_proj_type": "linear", "hf_model_name": str(final / "text_tower"),
    }  # fmt: skip
    fields = {"embed_dim": vision["hidden_size"], "vision_cfg": image_tower, "text_cfg": text_tower}
    write_text(folder / "open_clip_config.json", json.dumps({"model_cfg": fields}, indent=1))


def watch(command: list[str], records: Path, pattern: str, log: Path) -> list[tuple[str, int, float]]:
    """Run a command, and return the stages and numbers of pairs in its records, with its processor time at each.

    Args:
        pattern: regular expression of a record, with groups for the pairs and the stage.
    """
    points: list[tuple[str, int, float]] = []
    with open(log, "ab") as output:
        process = psutil.Popen(command, stdout=output, stderr=output)
    try:
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
    finally:
        if process.poll() is None:  # this process was told to end
            process.kill()
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


def tune(family: tuple[str, str], trial: Callable[..., float]) -> dict[str, float]:
    """Return the rate and the decay of the best of four trials, and the mean rank of each trial.

    Three trials differ in the rate. If the lowest or the highest is best, the fourth goes on in that direction; else it
    has a quarter of the decay.
    """
    (low, middle, high), decay = TRIALS[family]
    ranks = {(rate, decay): trial(rate=rate, decay=decay) for rate in (low, middle, high)}
    best, _ = min(ranks, key=ranks.__getitem__)
    last = {low: (low / 2, decay), middle: (middle, decay / 4), high: (2 * high, decay)}[best]
    ranks[last] = trial(rate=last[0], decay=last[1])
    rate, decay = min(ranks, key=ranks.__getitem__)
    return {"rate": rate, "decay": decay, **{f"rate {one[0]:g}, decay {one[1]:g}": rank for one, rank in ranks.items()}}


# Curves of the seeds by length in minutes and by arm.
Curves = dict[float, dict[str, list[Curve]]]
Tuned = Mapping[str, Mapping[str, float]]


def report(curves: Curves, parts: Mapping[str, Sequence[Curve]], tuned: Tuned, figure: Path) -> str:
    """Draw the figure, and return the tables: the ends, the ratios of times, the parts, and the trials.

    Args:
        parts: curves by the arms of `PARTS` and `BASE`.
        tuned: results of `tune` by a title of its trials.
    """
    rows = [["minutes", "", "seeds", "pairs/s", "pairs", "top-1", "top-5"]]
    for minutes, arms in curves.items():
        rows += [[f"{minutes:g}", ALL[key].label, *_numbers(group)] for key, group in arms.items()]
    texts = ["Ends of complete schedules:", markdown_table(rows, 2)]
    ratios = [["minutes", "", "peer", "time to the peer's end"]]
    for minutes, arms in curves.items():
        for ours, theirs in itertools.product(arms, arms):
            if ALL[ours].stages and not ALL[theirs].stages:
                ratio = ratio_of_times(arms[ours], arms[theirs])
                ratios.append([f"{minutes:g}", ALL[ours].label, ALL[theirs].label, ratio])
    if len(ratios) > 1:
        texts += ["Times by which an arm is sooner at the peer's end, in the middle of its own run:"]
        texts += [markdown_table(ratios, 3), *_complete_schedules(curves)]
    if PARTS.keys() & parts.keys():
        rows = [["one change", "seeds", "pairs/s", "pairs", "top-1", "top-5", "difference, top-1"]]
        for key, group in parts.items():
            base = parts.get(BASE if ALL[key].stages else PEER, [])
            rows.append([ALL[key].label, *_numbers(group), _difference(group, base)])
        texts += ["One difference at a time, at equal time:", markdown_table(rows, 1)]
    trials = [["trainer, optimiser, length", "trial", "mean rank"]]
    for title, own in tuned.items():
        ranks = {name: rank for name, rank in own.items() if name not in ("rate", "decay")}
        shown = [[title, name, f"{rank:.1f}"] for name, rank in ranks.items()]
        shown[list(ranks.values()).index(min(ranks.values()))][2] = f"**{min(ranks.values()):.1f}**"
        trials += shown
    texts += ["Trials:", markdown_table(trials, 2)]
    panels = {
        f"{minutes:g} minutes": {ALL[key].label: group for key, group in arms.items()}
        for minutes, arms in curves.items()
        if any(not ALL[key].stages for key in arms)
    }
    if panels:
        draw_study_curves(panels, "trained_seconds", "test/top1", "zero-shot top-1 on test, %", figure)
    return "\n\n".join(texts)


def _ends(group: Sequence[Curve], metric: str = "top1") -> list[float]:
    return [curve.course(f"test/{metric}")[-1].result.value for curve in group]


def _numbers(group: Sequence[Curve]) -> list[str]:
    ends = [curve.records[-1] for curve in group]
    seconds, seen = (statistics.mean(end[key] for end in ends) for key in ("trained_seconds", "samples_seen"))
    results = [[curve.course(f"test/{metric}")[-1].result for curve in group] for metric in ("top1", "top5")]
    texts = [one[0].estimate_text if len(one) == 1 else estimate(one) for one in results]
    return [str(len(group)), f"{seen / seconds:,.0f}", f"{seen:,.0f}", *texts]


def ratio_of_times(ours: Sequence[Curve], theirs: Sequence[Curve]) -> str:
    """Return the time of `theirs` over the time in which `ours` reaches its end, with the interval over seeds."""
    pairs = list(zip(ours, theirs, strict=False))
    reached = [seconds_to(one, "test/top1", end) for (one, _), end in zip(pairs, _ends(theirs), strict=False)]
    times = [other.course("test/top1")[-1].trained_seconds for _, other in pairs]
    logs = [math.log(whole / seconds) for whole, seconds in zip(times, reached, strict=True) if seconds]
    if len(logs) < len(pairs):
        return f"reached by {len(logs)} of {len(pairs)} seeds"
    if len(logs) == 1:
        return f"{math.exp(logs[0]):.2f} (one seed)"
    ratio, low, high = (math.exp(end) for end in mean_of(logs))
    return f"{ratio:.2f} ({low:.2f} to {high:.2f})"


def _complete_schedules(curves: Curves) -> list[str]:
    """Return a sentence for each peer's run: the shortest complete schedule of ours that ends above it in all seeds."""
    sentences = []
    for minutes, arms in curves.items():
        for theirs in (key for key in arms if not ALL[key].stages):
            above = [
                (length, ours)
                for length, own in curves.items()
                for ours in own
                if ALL[ours].stages and min(_ends(own[ours])) > max(_ends(arms[theirs]))
            ]
            text = "no complete schedule of flipscale ends above"
            if above:
                length, ours = min(above)
                shorter = f", {minutes / length:.2f} times shorter," if length < minutes else ""
                text = f"{ALL[ours].label} of {length:g} minutes{shorter} ends above"
            sentences.append(f"{text} {ALL[theirs].label} of {minutes:g} minutes in all seeds.")
    return sentences


def _difference(group: Sequence[Curve], base: Sequence[Curve]) -> str:
    differences = [own - other for own, other in zip(_ends(group), _ends(base), strict=False)]
    if not differences:
        return NOTHING
    if len(differences) == 1:
        return f"{differences[0]:+.1f}"
    mean, low, high = mean_of(differences)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def slowed_pace(race: Race, arm: Arm, pace: Mapping[str, Pace]) -> Pace:
    """Return the pace of `BASE` as an arm of `PARTS` has it."""
    base = pace[BASE]
    if arm.slowed == "trainer":
        ratio = pace[PEER]["all"] / base["masked"]
        return {stage: ratio * value for stage, value in base.items()}
    seconds = race.kept("loading", lambda: {str(mask): race.loading_seconds(mask) for mask in (0.0, MASK)})
    more = max(0.0, seconds["0.0"] - seconds[str(MASK)])
    return base | {"masked": 1 / (1 / base["masked"] + more)}


def run(race: Race, lengths: Sequence[float], seeds: int, keys: Sequence[str], trial: float, repeats: int) -> None:
    """Train the arms at each length, then the parts at the shortest, and write the tables after each run.

    Args:
        lengths: minutes, in rising order.
        keys: arms and parts to train.
        trial: length of a trial, in parts of a last run.
    """
    families = dict.fromkeys(ALL[key].family for key in keys)
    # Trials are of the first arm of a trainer and an optimiser; its other arms have the same rate and decay.
    firsts = {family: next(key for key, arm in ALL.items() if arm.family == family) for family in families}
    slowed = [key for key in keys if ALL[key].slowed]
    needed = {*keys, *firsts.values(), *((BASE, PEER) if slowed else ())}
    measured = [key for key, arm in ALL.items() if key in needed and not arm.slowed]
    new = [key for key in measured if not (race.folder / f"pace_{key}.json").exists()]
    speeds = race.calibrate(new, repeats)
    pace: dict[str, Pace] = {key: race.kept(f"pace {key}", partial(speeds.get, key)) for key in measured}
    pace |= {key: slowed_pace(race, ALL[key], pace) for key in slowed}
    curves: Curves = {}
    parts: dict[str, list[Curve]] = {}
    tuned: dict[str, dict[str, float]] = {}
    settings: dict[tuple[float, tuple[str, str]], Setting] = {}
    shortest = lengths[0]

    def one(key: str, minutes: float, seed: int, tuned_for: float) -> None:
        arm = ALL[key]
        name = f"{key} {minutes:g} minutes seed {seed}"
        run_dir = race.train(name, arm, settings[tuned_for, arm.family], 60 * minutes, pace[key], seed, tested=True)
        curve = Curve(arm.label, read_metrics(run_dir), read_results(run_dir), {}, seed=seed, learned=name)
        if key in ARMS:
            curves.setdefault(minutes, {}).setdefault(key, []).append(curve)
        if minutes == shortest and (key in PARTS or arm.stages or key == PEER):
            parts.setdefault(key, []).append(curve)
        print(f"{name}: {curve.course('test/top1')[-1].result.estimate_text}", flush=True)
        tables = report(dict(sorted(curves.items())), parts, tuned, race.folder / "race.png")
        write_text(race.folder / "race.md", tables + "\n")

    for minutes in lengths:
        for family, first in firsts.items():
            title = f"{', '.join(family)}, {minutes:g} minutes"
            of_family = partial(race.trial, ALL[first], trial * 60 * minutes, pace[first])
            tuned[title] = race.kept(f"tuned {title}", partial(tune, family, of_family))
            settings[minutes, family] = Setting(tuned[title]["rate"], tuned[title]["decay"])
        for seed, key in itertools.product(range(seeds), (key for key in ARMS if key in keys)):
            one(key, minutes, seed, minutes)
    ours = [key for key in ARMS if key in keys and ARMS[key].stages]
    for part, seed, key in itertools.product(SHORTER, range(seeds), ours):
        one(key, shortest / part, seed, shortest)
    for seed, key in itertools.product(range(seeds), (key for key in PARTS if key in keys)):
        one(key, shortest, seed, shortest)
    print(f"\n{(race.folder / 'race.md').read_text(encoding='utf-8')}\nfigure: {race.folder}/race.png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of examples/demo/data.py or examples/icons")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, nargs="+", default=[6.0, 20.0, 60.0], help="lengths of the last runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=list(ALL), default=list(ALL), help="what to train; default all")
    parser.add_argument("--trial", type=float, default=0.25, help="length of a trial, in parts of a last run")
    parser.add_argument("--text_layers", type=int, default=1, help="layers of both text towers; 0 is the words alone")
    parser.add_argument("--least_sets", type=int, default=1, help="train on icons whose names so many sets have")
    parser.add_argument("--repeats", type=int, default=3, help="calibrations of each arm")
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)), help="the core that trains")
    args = parser.parse_args(arguments)
    icons = (args.data / "train.tsv").exists()
    parts = ("train", "test", "tokenizer", *(("validation",) if icons else ()))
    if missing := [part for part in parts if not (args.data / part).exists()]:
        parser.error(f"--data {args.data} has no {', '.join(missing)}; the commands above make them")
    if args.core not in (cores := os.sched_getaffinity(0)):
        parser.error(f"--core {args.core} is not among this process's cores, {', '.join(map(str, sorted(cores)))}")
    os.sched_setaffinity(0, {args.core})
    torch.set_num_threads(1)
    # A killed race ends its trainer too, so that the next start finds no other writer.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    race = Race(args.data, args.output_dir, args.text_layers, args.least_sets)
    own = {name: getattr(args, name) for name in ("trial", "text_layers", "least_sets")} | {"data": str(race.data)}
    begun = race.kept("race", lambda: own)
    if changed := [name for name in own if own[name] != begun[name]]:
        was = ", ".join(f"{name} {begun[name]}" for name in changed)
        parser.error(f"{args.output_dir} holds a race with {was}; give the same, or name another folder")
    run(race, sorted(args.minutes), args.seeds, args.arms, args.trial, args.repeats)


if __name__ == "__main__":
    main()
