"""Two passes over micro-batches move the weights as one pass over the whole batch does, under every engine."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import changed_recipe, metrics
from distributed.crowd import Crowds

from flipscale.engines.checkpoint import CheckpointReader

# Two steps at each mask ratio; 8 pairs for each of two processes, 2 at once.
STAGES = [{"name": f"mask {ratio}", "samples": 32, "mask_ratio": ratio, "base_lr": 0.012} for ratio in (0.0, 0.5, 0.75)]
# At the usual 1e-8 AdamW makes a step of the rounding noise of gradients that are zero, such as a key bias's.
OPTIM = {"adam_epsilon": 0.001}
SAVE = {"every_samples": 32, "total_limit": 9}
ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]
LOSSES = {
    "infonce": {"kind": "infonce"},
    "sigmoid": {"kind": "sigmoid"},
    "captions": {"caption_weight": 2.0, "caption_kind": "mixed"},
}

Train = Callable[[str, int | None, str], Path]


@pytest.fixture(scope="module")
def train(recipe: dict, caption_tokenizer: Path, crowds: Crowds, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains on two processes, under an engine, in micro-batches of a size or in one pass, with a loss; each once."""
    folder = tmp_path_factory.mktemp("cached")

    def run(engine: str, micro_batch_size: int | None, loss: str = "infonce") -> Path:
        run_dir = folder / f"{engine}-{micro_batch_size}-{loss}"
        if not run_dir.exists():
            changes = {"data": {"micro_batch_size": micro_batch_size}, "loss": LOSSES[loss], "optim": OPTIM}
            if loss == "captions":
                changes["data"]["tokenizer"] = str(caption_tokenizer)
                changes["model"] = {"decoder_config": {"num_hidden_layers": 1}}
            changed = changed_recipe(recipe, {**changes, "stages": STAGES, "save": SAVE})
            file = folder / f"{run_dir.name}.yaml"
            file.write_text(yaml.safe_dump({**changed, "output_dir": str(run_dir)}))
            assert crowds(2).run("train", engine, file) == ["done"] * 2
        return run_dir

    return run


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(run_dir / f"checkpoints/step-{step:08d}")
    return {name: reader.tensor("weight", name) for name in reader.shapes}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("engine", ENGINES)
def test_micro_batches_move_the_weights_as_one_batch_does(train: Train, engine: str, loss: str) -> None:
    runs = [train(engine if loss == "infonce" or micro else "fsdp2", micro, loss) for micro in (None, 2)]
    whole, cached = ([r for r in metrics(run_dir) if "loss" in r] for run_dir in runs)
    assert len(whole) == len(cached) == 6
    for a, b in zip(whole, cached, strict=True):
        for name in ("loss", "logit_scale"):
            assert b[name] == pytest.approx(a[name], rel=2e-6), name
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    ours, theirs = (weights(run_dir, 6) for run_dir in runs)
    for name, value in ours.items():
        assert (value - theirs[name]).abs().max() <= 1e-6, name


def test_the_weights_moved_at_all(train: Train) -> None:
    first, last = (weights(train("ddp", 2), step) for step in (2, 6))
    assert min((last[name] - first[name]).abs().max() for name in last if "k_proj.bias" not in name) > 1e-4
