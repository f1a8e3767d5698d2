"""CONTRIBUTING: its table is the order of imports, its files exist, and its examples run."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from cli.pages import ROOT
from conftest import metrics
from data.conftest import pair_dataset
from test_structure import ORDER

from flipscale.cli import main
from flipscale.data.batches import BatchDataset
from flipscale.data.masks import IMAGE_MASKS, keep_patches
from flipscale.engines import build_engine
from flipscale.engines.launch import read_launch_file
from flipscale.evaluation import suite
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.suite import KINDS as EVALUATIONS
from flipscale.hub.loading import load_dual_encoder
from flipscale.objectives.build_objective import loss_kinds

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"\n## How to add (?:a|an) ([^\n]+)\n(.*?)(?=\n## )", PAGE, re.DOTALL))


def example(what: str, name: str) -> Any:
    """Return the object `name` of a section's Python."""
    blocks = re.findall(r"```python\n(.*?)```", SECTIONS[what], re.DOTALL)
    (code,) = (block for block in blocks if re.search(rf"(class|def) {name}\b", block))
    # Dataclasses look their module up.
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile(code, f"CONTRIBUTING.md: {what}", "exec"), names)
    return names[name]


def test_the_table_is_the_order_of_imports() -> None:
    table = PAGE.split("| row | what it holds |\n|---|---|\n")[1].split("\n\n")[0]
    assert [tuple(re.findall(r"`(\w+)`", line.split("|")[1])) for line in table.splitlines()] == list(ORDER)


def test_its_files_exist() -> None:
    named = re.findall(r"`((?:flipscale|tests|ds_configs|slurm|docs|\.ci)/[\w./]*)`(, new)?", PAGE)
    assert len(named) > 25
    for file, new in named:
        assert (ROOT / file).exists() is not bool(new), file
        assert (ROOT / file).parent.is_dir(), file


def test_a_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    monkeypatch.setitem(loss_kinds(), "aligned", example("loss", "Aligned"))
    losses = {}
    for weight in (0.0, 0.5):
        loss = {"kind": "aligned", "options": {"weight": weight}}
        run_dir = tmp_path / f"weight{weight}"
        stages = [{"name": "masked", "samples": 32, "mask_ratio": 0.75, "base_lr": 0.01}]
        main(["pretrain", "--config", str(write_recipe(run_dir, loss=loss, stages=stages))])
        losses[weight] = metrics(run_dir)[0]["loss"]
    assert losses[0.0] < losses[0.5] < losses[0.0] + 0.5 * 4


def test_a_coupled_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    """Micro-batches and views leave the loss as it is; other captions than an image's own are its negatives."""
    kind = example("loss", "Hardest")
    images, texts = torch.eye(3).repeat_interleave(2, dim=0), torch.eye(3)[[0, 2, 1]]
    value = kind().coupled_loss(images, texts, logit_scale=torch.tensor([5.0]))
    terms = torch.tensor([-5.0, 5.0, 5.0])  # the nearest wrong caption's logit minus the own one's
    assert value == pytest.approx(torch.nn.functional.softplus(terms).mean().item())
    monkeypatch.setitem(loss_kinds(), "hardest", kind)
    stages = [{"name": "masked", "samples": 32, "mask_ratio": 0.75, "base_lr": 0.01}]
    for name, size in (("whole", 16), ("parts", 4)):
        recipe = write_recipe(tmp_path / name, loss={"kind": "hardest"}, stages=stages, data={"micro_batch_size": size})
        main(["pretrain", "--config", str(recipe)])
    whole, parts = ([record["loss"] for record in metrics(tmp_path / name)] for name in ("whole", "parts"))
    assert whole == pytest.approx(parts, abs=1e-4)


def test_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMAGE_MASKS, "rows", example("kind of mask", "rows"))
    kept = keep_patches(torch.rand(5, 4, 4), 0.5, "rows")
    assert all(len(set((index // 4).tolist())) == 2 for (index,) in kept)


def test_a_column(shards: Path, tokenizer_dir: Path) -> None:
    pairs = pair_dataset(shards, tokenizer_dir)
    counts = BatchDataset(pairs.given, [*pairs.makers, example("column", "CaptionCounts")(pairs.given)])
    batch = counts.__getitems__(list(range(8)))
    assert batch.keys() - pairs.__getitems__([0]).keys() == {"caption_counts"}
    places = zip(*(part.tolist() for part in pairs.order.locate(np.arange(8))), strict=True)
    assert batch["caption_counts"].tolist() == [len(pairs.source.read(*place).captions) for place in places]


@pytest.mark.long
def test_an_evaluation(monkeypatch: pytest.MonkeyPatch, in_site: Path) -> None:
    monkeypatch.setitem(EVALUATIONS, "similarity", example("evaluation", "Similarity"))
    tasks = suite.build_tasks([{"kind": "similarity", "data": "data/demo/test"}])
    model, tokenizer = load_dual_encoder("runs/demo/model")
    (result,) = suite.run_tasks(Embedder(model, tokenizer, Accelerator(cpu=True), 32, 0), tasks)
    assert (result.name, result.n) == ("similarity/cosine", 96)
    assert -1.0 < result.value < 1.0


def test_an_engine(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    write_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    engines = {**build_engine.engine_classes(), "ddp_bf16": example("engine", "CompressedDdpEngine")}
    monkeypatch.setattr(build_engine, "engine_classes", lambda: engines)
    (text,) = re.findall(r"```yaml\n(.*?)```", SECTIONS["engine"], re.DOTALL)
    (tmp_path / "ddp_bf16.yaml").write_text(text)
    assert read_launch_file(tmp_path / "ddp_bf16.yaml").engine == "ddp_bf16"
    shipped = yaml.safe_load((ROOT / "ds_configs/ddp.yaml").read_text())
    assert yaml.safe_load(text) == {**shipped, "mpirun_config": {"role": "ddp_bf16"}}
    recipe = write_recipe(tmp_path / "run", stages=[{"name": "whole", "samples": 32, "base_lr": 0.01}])
    main(["pretrain", "--dry_run", "--launch_file", str(tmp_path / "ddp_bf16.yaml"), "--config", str(recipe)])
    assert re.search(r"^ +ddp_bf16\nprocesses +8\npairs each +2\n", capsys.readouterr().out, re.MULTILINE)
    monkeypatch.setenv("ROLE_NAME", "ddp_bf16")
    main(["pretrain", "--config", str(recipe)])
    assert len(metrics(tmp_path / "run")) == 2
