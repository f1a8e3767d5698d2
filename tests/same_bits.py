"""Whether two checkouts learn the same, to the last bit: `python tests/same_bits.py BEFORE AFTER`.

Trains small models at both, 40 steps on one process and 20 on two, and compares every loss and the finished weights.
Then AFTER goes on from checkpoints that BEFORE wrote halfway, and must end with the same bits too. Bits belong to a
machine and its libraries, so nothing is stored: run it where you changed the code. About five minutes on two cores.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from conftest import TOWER, write_shards, write_tokenizer

MASKED = {"name": "masked", "samples": 384, "mask_ratio": 0.75, "base_lr": 0.012, "warmup_samples": 64}
TUNED = {"name": "unmasked", "samples": 256, "base_lr": 0.006}
SHORT = [{**MASKED, "samples": 160}, {**TUNED, "samples": 160}]
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds_configs/zero3.json"}

# name -> (sections of the recipe, processes, the launcher's environment)
CASES: dict[str, tuple[dict, int, dict[str, str]]] = {
    "adamw": ({}, 1, {}),
    "muon": ({"optim": {"name": "muon"}}, 1, {}),
    "averages": ({"optim": {"ema_decay": 0.9, "max_grad_norm": 1.0}}, 1, {}),
    "reconstruction": ({"loss": {"reconstruction_weight": 0.5}}, 1, {}),
    "captions": ({"loss": {"caption_weight": 2.0, "caption_kind": "mixed"}}, 1, {}),
    "captioning": ({"loss": {"kind": "captioning"}, "data": {"micro_batch_size": 4}}, 1, {}),
    "sigmoid": ({"loss": {"kind": "sigmoid"}}, 1, {}),
    "views": ({"mask": {"views": 2}, "stages": [{**MASKED, "mask_ratio": 0.5}, TUNED]}, 1, {}),
    "micro_batches": ({"data": {"micro_batch_size": 4}}, 1, {}),
    "micro_reconstruction": ({"data": {"micro_batch_size": 4}, "loss": {"reconstruction_weight": 0.5}}, 1, {}),
    "text_mask": ({"stages": [{**MASKED, "text_mask_ratio": 0.5}, TUNED], "mask": {"kind": "grid"}}, 1, {}),
    "bf16": ({}, 1, {"ACCELERATE_MIXED_PRECISION": "bf16"}),
    "ddp": ({"stages": SHORT}, 2, {}),
    "ddp_muon": ({"stages": SHORT, "optim": {"name": "muon"}}, 2, {}),
    "ddp_micro": ({"stages": SHORT, "data": {"micro_batch_size": 4}}, 2, {}),
    "ddp_sigmoid": ({"stages": SHORT, "loss": {"kind": "sigmoid"}}, 2, {}),
    "fsdp2": ({"stages": SHORT}, 2, FSDP2),
    "fsdp2_muon": ({"stages": SHORT, "optim": {"name": "muon"}}, 2, FSDP2),
    "zero3": ({"stages": SHORT}, 2, ZERO3),
}
RESUMED = ("adamw", "muon", "averages", "sigmoid", "ddp", "fsdp2", "fsdp2_muon", "zero3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout; runs of it in --work are used again")
    parser.add_argument("after", type=Path, help="the checkout that must learn the same")
    parser.add_argument("--work", type=Path, default=Path("runs/same_bits"), help="where the runs lie")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    args = parser.parse_args()
    args.work = args.work.absolute()
    if not (args.work / "data").exists():
        write_shards(args.work / "data/shards", [30, 17, 1, 48])
        write_tokenizer(args.work / "data/tokenizer")
        write_tokenizer(args.work / "data/caption_tokenizer", bos_token="<s>", eos_token="</s>")
    shutil.rmtree(args.work / "after", ignore_errors=True)
    shutil.rmtree(args.work / "resumed", ignore_errors=True)
    apart = 0
    for case in args.only:
        if not (args.work / "before" / case / "DONE").exists():
            train(args.before, args.work, "before", case)
        train(args.after, args.work, "after", case)
        apart += report(args.work, case, "after")
        if case in RESUMED:
            cut(args.work / "before" / case, args.work / "resumed" / case)
            train(args.after, args.work, "resumed", case)
            apart += report(args.work, case, "resumed")
    sys.exit(f"{apart} runs differ" if apart else None)


def train(checkout: Path, work: Path, side: str, case: str) -> None:
    """One run of a case by a checkout's code."""
    sections, processes, environment = CASES[case]
    for manifest in (work / "data/shards").glob("*.manifest"):
        manifest.unlink()  # because the other checkout may have written another version
    recipe = {
        "model": {
            "size": "b16",
            "vision_config": {**TOWER, "image_size": 32, "patch_size": 8},
            "text_config": {**TOWER, "vocab_size": 16, "max_position_embeddings": 8},
        },
        "stages": [MASKED, TUNED],
        "log": {"every_samples": 16, "report_to": []},
        "output_dir": str(work / side / case),
        **sections,
    }
    steps = sum(stage["samples"] for stage in recipe["stages"]) // 16
    # Two checkpoints in all: halfway, in the middle of a stage, and at the end.
    recipe["save"] = {"every_samples": 16 * (steps // 2 + 2), "total_limit": 9}
    recipe["data"] = {
        "shards": str(work / "data/shards"),
        "tokenizer": str(work / "data" / ("caption_tokenizer" if case.startswith("caption") else "tokenizer")),
        "global_batch_size": 16,
        "num_workers": 0,
        "shards_per_block": 2,
        **sections.get("data", {}),
    }
    file = work / side / f"{case}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe))
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    variables = {"PYTHONPATH": str(checkout.absolute()), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        [*launcher, "-m", "flipscale.pretrain", "--config", str(file)],
        cwd=checkout,
        env={**os.environ, "ACCELERATE_USE_CPU": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{side} {case} failed:\n{done.stderr[-3000:]}")


def cut(run_dir: Path, copy: Path) -> None:
    """A copy of a finished run as it was right after its first checkpoint."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "model")
    (copy / "DONE").unlink()
    for checkpoint in sorted((copy / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)


def report(work: Path, case: str, side: str) -> bool:
    """Print how the runs of a case compare; whether they differ."""
    before, after = losses(work / "before" / case), losses(work / side / case)
    weights = [digest(work / folder / case / "model/model.safetensors") for folder in ("before", side)]
    first = next((step for step, pair in enumerate(zip(before, after, strict=False), 1) if pair[0] != pair[1]), None)
    same = len(before) == len(after) and first is None and weights[0] == weights[1]
    told = "the same bits" if same else f"DIFFERS: losses from step {first}, weights {weights[0]} and {weights[1]}"
    print(f"{case:<22}{side:<9}{len(after)} steps, {told}", flush=True)
    return not same


def losses(run_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


if __name__ == "__main__":
    main()
