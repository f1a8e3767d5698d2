"""Two passes over micro-batches move the weights as one pass over the whole batch does."""

from pathlib import Path

import pytest
import yaml
from conftest import metrics, pretrain
from safetensors.torch import load_file

# Two steps at each mask ratio; 8 pairs for each of two processes, 2 at once.
STAGES = [{"name": f"mask {ratio}", "samples": 32, "mask_ratio": ratio, "base_lr": 0.012} for ratio in (0.0, 0.5, 0.75)]

# At the usual 1e-8 AdamW makes a step of the rounding noise of gradients that are zero, such as a key bias's.
OPTIM = {"adam_epsilon": 0.001}
SAVE = {"every_samples": 32, "total_limit": 9}


@pytest.fixture(scope="module")
def runs(recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[int | None, Path]:
    """The same steps on two processes, in one pass and in micro-batches."""
    folder, found = tmp_path_factory.mktemp("cached"), {}
    for micro_batch_size in (None, 2):
        found[micro_batch_size] = folder / f"micro-{micro_batch_size}"
        data = {**recipe["data"], "micro_batch_size": micro_batch_size}
        changed = {**recipe, "data": data, "stages": STAGES, "optim": OPTIM, "save": SAVE}
        changed["output_dir"] = str(found[micro_batch_size])
        file = folder / f"{micro_batch_size}.yaml"
        file.write_text(yaml.safe_dump(changed))
        done = pretrain(file, 2)
        assert done.returncode == 0, done.stderr
    return found


def test_micro_batches_move_the_weights_as_one_batch_does(runs: dict[int | None, Path]) -> None:
    whole, cached = ([r for r in metrics(runs[size]) if "loss" in r] for size in (None, 2))
    assert len(whole) == len(cached) == 6
    for a, b in zip(whole, cached, strict=True):
        for name in ("loss", "logit_scale"):
            assert b[name] == pytest.approx(a[name], rel=2e-6), name
    ends = [load_file(runs[size] / "checkpoints/step-00000006/model.safetensors") for size in (None, 2)]
    for name, value in ends[0].items():
        assert (value - ends[1][name]).abs().max() <= 1e-6, name


def test_the_weights_moved_at_all(runs: dict[int | None, Path], recipe: dict) -> None:
    first, last = (load_file(runs[2] / f"checkpoints/step-0000000{step}/model.safetensors") for step in (2, 6))
    moved = [(value - first[name]).abs().max() for name, value in last.items() if "k_proj.bias" not in name]
    assert min(moved) > 1e-4
