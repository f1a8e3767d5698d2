"""LoRA: what it trains, what it exports, and the same under every engine."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOWER, losses
from distributed.crowd import Crowds
from distributed.test_engines import Trainings, assert_learned_alike, close
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from flipscale.cli import main
from flipscale.start.complete_recipe import parse_recipe
from flipscale.start.setup import open_setup

long = partial(pytest.param, marks=pytest.mark.long)
LORA = {"rank": 4, "alpha": 8, "modules": ["q_proj", "v_proj", "fc1"]}
TEXT = {**TOWER, "max_position_embeddings": 8}
FAMILIES: dict[str, dict] = {
    "flip": {},
    "clip": {"model": {"family": "clip", "text_config": TEXT}},
    "siglip": {"model": {"family": "siglip", "text_config": TEXT}, "loss": {"kind": "sigmoid"}},
}


@pytest.fixture(scope="module")
def trainings(
    recipe: dict, caption_tokenizer: Path, crowds: Crowds, tmp_path_factory: pytest.TempPathFactory
) -> Trainings:
    data = {**recipe["data"], "tokenizer": str(caption_tokenizer)}
    return Trainings(tmp_path_factory.mktemp("lora"), {**recipe, "data": data}, crowds)


@pytest.fixture(scope="module")
def starts(trainings: Trainings) -> Callable[[str], Path]:
    """The folder of a start model of a family, as another program would have made it."""
    return lambda family: trainings.run("ddp", 1, **FAMILIES[family]) / "model"


@pytest.fixture(scope="module")
def changes(starts: Callable[[str], Path]) -> Callable[..., dict]:
    def changes(family: str, **optim: Any) -> dict:
        model = {"init_from": str(starts(family)), "family": family, "text_config": {}, "vision_config": {}}
        if family == "flip":
            model = {"init_from": str(starts(family))}
        stages = [{"name": "tuned", "samples": 320, "mask_ratio": 0.5, "base_lr": 0.05}]
        return {**FAMILIES[family], "model": model, "optim": {"lora": LORA, **optim}, "stages": stages}

    return changes


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.long
@pytest.mark.parametrize(("family", "engine"), [("flip", "fsdp2"), ("siglip", "zero3")])
def test_engines_learn_what_one_process_does(
    trainings: Trainings, changes: Callable[..., dict], family: str, engine: str
) -> None:
    fields = changes(family)
    one, many = trainings.run("ddp", 1, **fields), trainings.run(engine, 2, **fields)
    assert_learned_alike(one, many, 0.01)
    trainings.assert_resumed_alike(many, 10, engine, 2, **fields)


@pytest.mark.parametrize("family", ["clip", long("flip"), long("siglip")])
def test_only_the_chosen_layers_change_and_peft_agrees(
    trainings: Trainings, changes: Callable[..., dict], starts: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    run_dir = trainings.run("ddp", 1, **changes(family))
    before, after = weights(starts(family)), weights(run_dir / "model")
    assert before.keys() == after.keys()
    for name, value in before.items():
        changed = re.search(r"encoder\.layers\.\d+\..*(q_proj|v_proj|fc1)\.weight$", name)
        assert torch.equal(value, after[name]) != bool(changed), name
    if family == "clip":
        peft = pytest.importorskip("peft")
        main(["export", str(run_dir), "--adapter", "--out", str(tmp_path / "adapter")])
        config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (4, 8)
        assert config["base_model_name_or_path"] == str(starts(family))
        adapted = peft.PeftModel.from_pretrained(CLIPModel.from_pretrained(starts(family)), tmp_path / "adapter")
        whole = CLIPModel.from_pretrained(run_dir / "model")
        pixels, words = torch.randn(3, 3, 32, 32), torch.tensor([[12, 4, 8, 13, 0, 0, 0, 0]])
        with torch.no_grad():
            ours, theirs = (model.eval()(input_ids=words, pixel_values=pixels) for model in (whole, adapted))
        assert (ours.logits_per_image - theirs.logits_per_image).abs().max() < 1e-5
        merged = adapted.merge_and_unload().state_dict()
        assert all(torch.allclose(merged[name], value, atol=1e-6) for name, value in after.items())
        card = (run_dir / "model/README.md").read_text()
        assert "| trained | low-rank changes (LoRA) of rank 4 in `q_proj`, `v_proj`, `fc1` of `vision_model`" in card


@pytest.mark.long
def test_averages_micro_batches_and_recomputation(trainings: Trainings, changes: Callable[..., dict]) -> None:
    fields = changes("clip", ema_decay=0.9, part_lr_ratios={"vision_model": 0.5})
    fields["model"] = {**fields["model"], "gradient_checkpointing": True}
    fields["data"] = {"micro_batch_size": 4}
    plain = trainings.run("ddp", 1, **changes("clip", part_lr_ratios={"vision_model": 0.5}))
    many = trainings.run("fsdp2", 2, **fields)
    assert close(losses(many), losses(plain))
    again = trainings.resume(many, 5, "ddp", 1, **fields)
    ours, theirs = weights(many / "model"), weights(again / "model")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    # The averages lag behind, so they are exported, and not the weights.
    assert any(not torch.allclose(ours[name], value, atol=1e-4) for name, value in weights(plain / "model").items())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"optim": {"lora": {"rank": 4, "modules": ["qkv"]}}},
            "optim.lora.modules is ['qkv']; expected some of vision_model's: q_proj, k_proj, v_proj, out_proj, fc1",
        ),
        *(
            ({"optim": {"lora": {"rank": 4, field: [name, name]}}}, f"optim.lora.{field} has {name!r} twice")
            for field, name in (("modules", "q_proj"), ("towers", "vision_model"))
        ),
        (
            {"optim": {"part_lr_ratios": {"vision_model": -1.0}}},
            "part_lr_ratios.vision_model is -1.0; it must be above 0",
        ),
    ],
)
def test_refused(
    write_recipe: Callable[..., Path], starts: Callable[[str], Path], tmp_path: Path, fields: dict, said: str
) -> None:
    both = {"model": {"init_from": str(starts("flip"))}, "optim": {"lora": LORA}} | fields
    with pytest.raises(ValueError, match=re.escape(said)):
        open_setup(parse_recipe(["--config", str(write_recipe(tmp_path / "refused", **both))]))


def test_without_peft(
    write_recipe: Callable[..., Path], starts: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    model = {"init_from": str(starts("flip"))}
    file = write_recipe(tmp_path / "refused", model=model, optim={"lora": LORA})
    with pytest.raises(ValueError, match=r"optim.lora needs the package peft; pip install 'flipscale\[lora\]'"):
        open_setup(parse_recipe(["--config", str(file)]))
    open_setup(parse_recipe(["--config", str(write_recipe(tmp_path / "plain", model=model))]))


def test_an_adapter_only_where_it_fits(
    trainings: Trainings, starts: Callable[[str], Path], changes: Callable[..., dict], refused: Callable, tmp_path: Path
) -> None:
    assert "optim.lora.rank of" in refused("export", starts("clip").parent, "--adapter", "--out", tmp_path / "a")
    fields, base = changes("clip"), shutil.copytree(starts("clip"), tmp_path / "base")
    fields["model"]["init_from"] = str(base)
    run_dir = trainings.run("ddp", 1, **fields)
    assert "leave --interpolate and --dtype out" in refused("export", run_dir, "--adapter", "--dtype", "bf16")
    (tmp_path / "mine").mkdir()
    assert "exists and is not an adapter" in refused("export", run_dir, "--adapter", "--out", tmp_path / "mine")
    main(["export", str(run_dir), "--adapter", "--out", str(tmp_path / "mine/adapter")])
    (tmp_path / "mine/adapter/notes.txt").write_text("mine")
    said = refused("export", run_dir, "--adapter", "--out", tmp_path / "mine/adapter")
    assert f"{tmp_path / 'mine/adapter'} holds notes.txt" in said
    assert (tmp_path / "mine/adapter/notes.txt").read_text() == "mine"
    stored = weights(base)
    save_file({**stored, "logit_scale": stored["logit_scale"] + 1}, base / "model.safetensors")
    assert "logit_scale of the run is not that of" in refused("export", run_dir, "--adapter", "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()
