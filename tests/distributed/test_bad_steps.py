"""A step that is not finite on one process leaves every engine as it was: the run is one that never had it."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import cut
from distributed.crowd import Crowds
from safetensors.torch import load_file

from flipscale.io.digests import digest_of, digests_to_json, read_digests

BAD = 2


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero1", "zero3"])
def test_weights_are_those_of_a_run_without_the_step(crowds: Crowds, recipe: dict, tmp_path: Path, engine: str) -> None:
    stages = [{"name": "masked", "samples": 112, "mask_ratio": 0.75, "base_lr": 0.012}]
    changes = {"stages": stages, "save": {"every_samples": 32, "total_limit": 9}, "optim": {"ema_decay": 0.5}}
    with_it, without = tmp_path / "with", tmp_path / "without"
    for run_dir in (with_it, without):
        (tmp_path / f"{run_dir.name}.yaml").write_text(
            yaml.safe_dump({**recipe, **changes, "output_dir": str(run_dir)})
        )
    assert crowds(2).run("train_with_a_bad_step", engine, tmp_path / "with.yaml") == ["done"] * 2

    # What was saved before the step, as if it had been saved after it.
    cut(with_it, without, BAD)
    before = without / f"checkpoints/step-{BAD:08d}"
    state = json.loads((before / "state.json").read_text())
    assert (state["step"], state["optimizer_steps"]) == (BAD, BAD)
    text = json.dumps({**state, "step": BAD + 1, "samples_seen": 16 * (BAD + 1)})
    (before / "state.json").write_text(text)
    digests = {**read_digests(before / "digests.json"), "state.json": digest_of(text.encode())}
    (before / "digests.json").write_text(digests_to_json(digests))
    before.rename(without / f"checkpoints/step-{BAD + 1:08d}")
    assert crowds(2).run("train", engine, tmp_path / "without.yaml") == ["done"] * 2

    ends = [run_dir / "checkpoints/step-00000007" for run_dir in (with_it, without)]
    assert [json.loads((end / "state.json").read_text())["optimizer_steps"] for end in ends] == [6, 6]
    for part in ("part-00000.safetensors", "part-00001.safetensors"):
        ours, theirs = (load_file(end / part) for end in ends)
        assert {name.partition(".")[0] for name in ours} == {"weight", "exp_avg", "exp_avg_sq", "ema"}
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("engine", "optimizer"),
    [
        *((engine, {"max_grad_norm": 0.1}) for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3")),
        ("ddp", {"name": "muon"}),
        ("fsdp2", {"name": "muon"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_steps_left_out_leave_no_trace(
    crowds: Crowds, recipe: dict, tmp_path: Path, engine: str, optimizer: dict
) -> None:
    file = tmp_path / "recipe.yaml"
    changes = {"optim": {"ema_decay": 0.5, **optimizer}, "output_dir": str(tmp_path / "run")}
    file.write_text(yaml.safe_dump({**recipe, **changes}))
    assert crowds(2).run("leave_out", engine, file) == ["done"] * 2
