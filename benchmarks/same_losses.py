"""Train equal weights on equal batches with flipscale and with open_clip's trainer, and compare every loss.

    python benchmarks/same_losses.py --shards data/demo/train --steps 200 --loss sigmoid --mask_ratio 0.5

open_clip's `train_one_epoch`, loss and groups of AdamW run as they are, on one process in fp32. With a mask, its patch
dropout keeps the patches that flipscale keeps.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from flipscale.cli import main as flipscale
from flipscale.evaluation.foreign_models import load_open_clip
from flipscale.io.json_lines import read
from flipscale.loop.inputs import TrainingSetup
from flipscale.objectives.build_objective import build_config
from flipscale.pretrain import pretrain
from flipscale.recipe.schedule import Clock
from flipscale.start.complete_recipe import parse_recipe
from flipscale.start.setup import open_setup

# A CLIP of 1.6 million parameters, most of them word pieces.
SMALL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def compare(name: str, family: str, work: Path, **settings: Any) -> tuple[list[float], list[float]]:
    """Return the losses of flipscale and of open_clip, step by step.

    Args:
        name: open_clip's `NAME,WEIGHTS`.
        family: family of the converted model, `clip` or `siglip`.
        work: folder for the converted model and the run.
        settings: arguments of `recipe_of`.
    """
    flipscale(["convert", "transformers", f"open_clip:{name}", str(work / "start")])
    recipe = parse_recipe(recipe_of(work, family, **settings))
    plan = open_setup(recipe)
    theirs = train_open_clip(name, plan, settings["loss"])
    pretrain(recipe)
    return [record["loss"] for record in read(work / "run/metrics.jsonl") if "loss" in record], theirs


def recipe_of(
    work: Path, family: str, shards: str, steps: int, loss: str, mask_ratio: float, batch_size: int = 16
) -> list[str]:
    """Return the arguments of a run of one stage."""
    stage = {"name": "all", "samples": steps * batch_size, "mask_ratio": mask_ratio, "base_lr": 0.008}
    fields = {
        "model": {"family": family, "init_from": str(work / "start")},
        "data": {"shards": shards, "global_batch_size": batch_size, "num_workers": 0},
        "loss": {"kind": loss},
        "stages": [{**stage, "warmup_samples": steps * batch_size // 4}],
        "log": {"every_samples": batch_size, "report_to": []},
        "output_dir": str(work / "run"),
    }
    (work / "recipe.yaml").write_text(json.dumps(fields), encoding="utf-8")
    return ["--config", str(work / "recipe.yaml")]


def train_open_clip(name: str, plan: TrainingSetup, loss: str) -> list[float]:
    """Return the losses of open_clip's trainer on the batches and learning rates of a plan."""
    from open_clip.loss import ClipLoss, SigLipLoss
    from open_clip_train.train import train_one_epoch

    model, _, _ = load_open_clip(name)
    model.output_dict = True
    optim, steps = plan.recipe.optim, plan.schedule.total_steps
    assert steps is not None
    # The grouping of open_clip_train.main, which is no function there.
    bare = {n: p.ndim < 2 or any(word in n for word in ("bn", "ln", "bias", "logit_scale")) for n, p in params(model)}
    groups = [
        {"params": [p for n, p in params(model) if bare[n] == is_bare], "weight_decay": decay}
        for is_bare, decay in ((True, 0.0), (False, optim.weight_decay))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_epsilon)
    rates: list[float] = []
    losses: list[float] = []
    kind = ClipLoss if loss == "infonce" else SigLipLoss

    class Recorded(kind):  # type: ignore[misc, valid-type]
        def forward(self, *arguments: Any, **keywords: Any) -> Any:
            value = super().forward(*arguments, **keywords)
            losses.append(next(iter(value.values())).item())
            return value

    def set_rate(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rates[step]

    loader = _Batches(plan, model, rates)
    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=loader)}
    args = SimpleNamespace(
        device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=False, grad_clip_norm=None,
        world_size=1, rank=0, local_rank=0, horovod=False, log_every_n_steps=10**9, batch_size=plan.batch_size,
        wandb=False, save_logs=False,
    )  # fmt: skip
    train_one_epoch(model, data, Recorded(), 0, optimizer, None, set_rate, None, args)
    return losses


def params(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Return a model's parameters with their names."""
    return list(model.named_parameters())


class _Batches:
    """flipscale's batches as open_clip's trainer takes them: pixels and ids. The model drops the same patches."""

    def __init__(self, plan: TrainingSetup, model: Any, rates: list[float]):
        self.plan, self.rates = plan, rates
        self.num_batches = plan.schedule.total_steps
        self.num_samples = plan.batch_size * (self.num_batches or 0)
        vision = build_config(plan.recipe).vision_config
        self.size, self.patch = vision.image_size, vision.patch_size
        self.mean, self.std = (torch.tensor(value)[:, None, None] for value in (vision.image_mean, vision.image_std))
        self.dropout = _SameDropout(vision.num_patches)
        target = getattr(model.visual, "trunk", model.visual)
        setattr(target, "patch_drop" if target is not model.visual else "patch_dropout", self.dropout)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        clock = Clock(self.plan.schedule, {})
        (dataset,) = self.plan.datasets.values()
        side = self.size // self.patch
        while not clock.step.is_over:
            first = clock.step.number * self.plan.batch_size
            batch = dataset.__getitems__(list(range(first, first + self.plan.batch_size)))
            index = batch.get("patch_index")
            patches = torch.zeros(len(batch["patches"]), side * side, 3 * self.patch**2)
            if index is None:
                patches = batch["patches"].float()
            else:
                patches.scatter_(1, index.long()[:, :, None].expand_as(batch["patches"]), batch["patches"].float())
            grid = patches.view(-1, side, side, 3, self.patch, self.patch).permute(0, 3, 1, 4, 2, 5)
            self.dropout.index = None if index is None else index.long()
            self.rates.append(clock.step.learning_rate)
            pixels = (grid.reshape(-1, 3, self.size, self.size) / 255 - self.mean) / self.std
            yield pixels, batch["input_ids"].long()
            clock.advance(None)


class _SameDropout(torch.nn.Module):
    """A patch dropout that keeps the patches of `index`."""

    index: torch.Tensor | None = None

    def __init__(self, num_patches: int):
        super().__init__()
        self.num_patches = num_patches

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.index is None:
            return tokens
        prefix = tokens.shape[1] - self.num_patches
        kept = torch.cat([torch.arange(prefix).expand(len(tokens), -1), self.index + prefix], dim=1)
        return tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="shards of pairs")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--loss", choices=("infonce", "sigmoid"), default="infonce")
    parser.add_argument("--mask_ratio", type=float, default=0.0)
    args = parser.parse_args()
    import open_clip

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        bias = {"init_logit_bias": -10} if args.loss == "sigmoid" else {}
        (work / "small_clip.json").write_text(json.dumps({**SMALL, **bias}))
        open_clip.add_model_config(work / "small_clip.json")
        torch.manual_seed(0)
        torch.save(open_clip.create_model("small_clip", load_weights=False).state_dict(), work / "weights.pt")
        name = f"{work}/small_clip.json,{work}/weights.pt"
        ours, theirs = compare(name, "clip", work, **vars(args))
    apart = np.abs(np.array(ours) - np.array(theirs))
    print(f"{len(ours)} steps, {args.loss}, {args.mask_ratio:.0%} masked: losses {ours[0]:.4f} to {ours[-1]:.4f}")
    print(f"largest difference from open_clip's {apart.max():.2g}, of the last loss {apart[-1]:.2g}")


if __name__ == "__main__":
    main()
