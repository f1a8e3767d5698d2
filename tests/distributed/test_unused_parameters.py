"""A loss that leaves a trained parameter out is refused at the first step, on one process as on several."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import launch, metrics

long = partial(pytest.param, marks=pytest.mark.long)
ROOT = Path(__file__).parents[2]
# `logit_scale` and, where asked, the whole text tower take no part in this loss.
PROGRAM = """
from dataclasses import dataclass
from flipscale.objectives.contrastive import Contrastive
from flipscale.objectives.build import loss_kinds
from flipscale.pretrain import main

@dataclass(frozen=True, kw_only=True)
class Unscaled(Contrastive):
    images_only: bool = False

    def coupled_loss(self, *compared, **keywords):
        images, texts = compared
        return (images.sum(1) if self.images_only else images - texts).square().mean()

loss_kinds()["unscaled"] = Unscaled
main()
"""


MICRO = ["--data.micro_batch_size", "4"]


@pytest.mark.parametrize(
    ("world", "engine", "flags"),
    [
        (1, "ddp", []),
        long(2, "ddp", []),
        long(2, "fsdp2", MICRO),
        long(2, "zero3", []),
    ],
)
def test_an_unused_parameter_is_named(
    write_recipe: Callable[..., Path], tmp_path: Path, world: int, engine: str, flags: list[str]
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / f"ds_configs/{engine}.yaml")]
    launcher += ["--num_processes", str(world), "--mixed_precision", "no", "--main_process_port", "0"]
    start = [sys.executable, *(launcher if world > 1 else []), str(tmp_path / "program.py")]
    stages = [{"name": "whole", "samples": 32, "base_lr": 0.01}]
    recipe = write_recipe(tmp_path / "run", loss={"kind": "unscaled"}, stages=stages)
    start += ["--config", str(recipe), *flags]
    done = launch(start, cwd=ROOT, ACCELERATE_USE_CPU="1")
    assert done.returncode == (2 if world == 1 else 1)
    assert "RuntimeError" not in done.stderr
    (line,) = {line for line in done.stderr.splitlines() if line.startswith("flipscale: error: ")}
    assert "[logit_scale] to model.frozen" in line
    assert not (tmp_path / "run/metrics.jsonl").exists()
    if (world, flags) == (1, []):
        done = launch([*start, "--loss.options", "{images_only: true}", "--output_dir", str(tmp_path / "other")])
        assert "[logit_scale, text_model, text_projection] to model.frozen" in done.stderr
    done = launch(
        [*start, "--model.frozen", "[logit_scale]", "--output_dir", str(tmp_path / "mended")],
        cwd=ROOT,
        ACCELERATE_USE_CPU="1",
    )
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "mended")) == 2
