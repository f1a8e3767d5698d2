"""Views and reconstruction under every kind of sharding, in micro-batches too: the losses of one process."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import metrics, pretrain
from distributed.crowd import Crowds

STAGES = [
    {"name": "masked", "samples": 48, "mask_ratio": 0.5, "text_mask_ratio": 0.5, "base_lr": 0.012},
    {"name": "unmasked", "samples": 16},
]
KINDS = {
    "views": {"stages": STAGES, "mask": {"views": 2}},
    "reconstruction": {"stages": STAGES, "loss": {"reconstruction_weight": 2.0}},
}


def learned(run_dir: Path) -> list[float]:
    return [record[name] for record in metrics(run_dir) if "loss" in record for name in ("loss", "grad_norm")]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_learn_what_one_does(
    crowds: Crowds, write_recipe: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    done = pretrain(write_recipe(tmp_path / "one", **KINDS[kind]))
    assert done.returncode == 0, done.stderr
    one = learned(tmp_path / "one")
    assert len(one) == 8
    for engine, micro_batch_size in (("ddp", 4), ("fsdp2", 8), ("fsdp2", 4), ("zero3", 4)):
        name = f"{engine}-{micro_batch_size}"
        file = write_recipe(tmp_path / name, **KINDS[kind], data={"micro_batch_size": micro_batch_size})
        assert crowds(2).run("train", engine, file) == ["done", "done"], name
        assert learned(tmp_path / name) == pytest.approx(one, rel=1e-4), name
