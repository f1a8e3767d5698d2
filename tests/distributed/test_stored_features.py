"""Training on stored features: every engine learns what one process does, and the exported folder has whole towers."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TOWER, losses, metrics, write_shards
from distributed.crowd import Crowds
from distributed.test_engines import Trainings, assert_learned_alike
from evaluation.tiny_model import tiny_embedder
from foreign_towers import VISION, save_text
from safetensors.torch import load_file
from torch import nn

from flipscale.cli import main
from flipscale.hub.export import build_processor, export_model
from flipscale.model import FlipModel
from flipscale.planning.flops import stage_flops
from flipscale.start.complete_recipe import parse_recipe

STAGES = [{"name": "align", "samples": 320, "base_lr": 0.05, "warmup_samples": 32}]
MLP = {"vision_config": {"projection_hidden_size": 48}, "text_config": {"projection_hidden_size": 40}}
BOTH = {"model": MLP, "data": {"image_features": "a", "text_features": "b"}}
# The case, and what it changes.
CASES: dict[str, dict] = {
    "both": BOTH,
    "both, sigmoid": {**BOTH, "loss": {"kind": "sigmoid"}, "data": {**BOTH["data"], "micro_batch_size": 4}},
    "the text tower learns": {"data": {"image_features": "a"}},
    "other libraries' towers": {"model": MLP, "data": {"image_features": "c", "text_features": "d"}},
    "the image tower learns": {"data": {"text_features": "b"}, "optim": {"ema_decay": 0.9}},
}


def export_tiny(folder: Path, tokenizer_dir: Path, seed: int) -> Path:
    """Export a model of two small towers whose weights are all random."""
    ours = tiny_embedder(tokenizer_dir, batch_size=16)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in ours.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return export_model(ours.model, build_processor(ours.model.config, ours.tokenizer), folder)


def embed(shards: Path, out: Path, model: Path | str, *options: str) -> None:
    main(["prepare", "embed", str(shards), str(out), "--model", str(model), "--num_workers", "0", *options])


@pytest.fixture(scope="module")
def folder(shards: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models A and B, the image features of A and the text features of B."""
    folder = tmp_path_factory.mktemp("stored")
    for seed, name, tower in ((1, "A", "images"), (2, "B", "texts")):
        export_tiny(folder / name, tokenizer_dir, seed)
        embed(shards, folder / name.lower(), folder / name, "--features", "pooled", "--towers", tower)
    VISION["`DINOv3ViTModel`"](folder / "C")
    save_text("llama", folder / "D")
    for name, tower in (("C", "images"), ("D", "texts")):
        embed(shards, folder / name.lower(), f"hf:{folder / name}", "--features", "pooled", "--towers", tower)
    return folder


@pytest.fixture(scope="module")
def trainings(recipe: dict, folder: Path, crowds: Crowds) -> Trainings:
    data = {name: value for name, value in recipe["data"].items() if name != "tokenizer"}
    trainings = Trainings(folder, {**recipe, "data": data}, crowds)
    trainings.recipe |= {"stages": STAGES, "model": {"vision": str(folder / "A"), "text": str(folder / "B")}}
    trainings.recipe["eval"] = {"tasks": [{"kind": "zero_shot", "data": data["shards"]}]}
    for case in CASES.values():
        for name in case["data"].keys() & {"image_features", "text_features"}:
            case["data"][name] = str(folder / Path(case["data"][name]).name)
    others = {"vision": f"hf:{folder / 'C'}", "text": f"hf:{folder / 'D'}"}
    CASES["other libraries' towers"]["model"] = {**MLP, **others}
    return trainings


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "engine"),
    [
        ("both", "ddp"),
        ("both, sigmoid", "zero3"),
        ("other libraries' towers", "fsdp2"),
        ("the text tower learns", "ddp"),
        ("the image tower learns", "ddp"),
    ],
)
def test_two_processes_learn_what_one_does(trainings: Trainings, case: str, engine: str) -> None:
    one, many = trainings.run("ddp", 1, **CASES[case]), trainings.run(engine, 2, **CASES[case])
    assert_learned_alike(one, many, 0.05)


@pytest.mark.parametrize("case", ["both", "the text tower learns"])
def test_a_resumed_run_ends_with_the_same_bits(trainings: Trainings, case: str) -> None:
    whole = trainings.run("ddp", 1, **CASES[case])
    trainings.assert_resumed_alike(whole, 10, "ddp", 1, **CASES[case])


def test_the_exported_model_has_whole_towers(trainings: Trainings, folder: Path, shards: Path, tmp_path: Path) -> None:
    """The towers are those of the start, bit for bit, and the whole model embeds as the projections of the features."""
    run_dir = trainings.run("ddp", 1, **CASES["both"])
    weights, start = load_file(run_dir / "model/model.safetensors"), {"vision_model": "A", "text_model": "B"}
    for tower, name in start.items():
        stored = load_file(folder / name / "model.safetensors")
        names = [key for key in weights if key.startswith(f"{tower}.")]
        assert len(names) > 20
        assert all(torch.equal(weights[key], stored[key]) for key in names)
    model = FlipModel.from_pretrained(run_dir / "model")
    embed(shards, tmp_path / "embeds", run_dir)
    for tower, features, projection in (
        ("images", "a", model.image_projection),
        ("texts", "b", model.text_projection),
    ):
        for file in (folder / features / tower).glob("*.npy"):
            pooled = torch.from_numpy(np.load(file)).float()
            expected = nn.functional.normalize(projection(pooled), dim=-1).detach().numpy()
            assert np.abs(np.load(tmp_path / "embeds" / tower / file.name) - expected).max() < 4e-3
    assert any("zero_shot" in name for record in metrics(run_dir) for name in record)


def test_only_the_parts_that_run_are_counted(trainings: Trainings, folder: Path) -> None:
    recipe = parse_recipe(["--config", str(trainings.file(folder / "counted", **CASES["both"]))])
    assert recipe.model.frozen == ["vision_model", "text_model"]
    (flops,) = stage_flops(recipe).values()
    assert flops.forward == sum(2 * (32 * hidden + hidden * 512) for hidden in (48, 40))
    # The first layer's input needs no gradient.
    assert flops.backward == sum(2 * (32 * hidden + 2 * hidden * 512) for hidden in (48, 40))


def test_samples_without_features_are_replaced(
    trainings: Trainings, folder: Path, recipe: dict, tmp_path: Path, shards: Path
) -> None:
    """Three rows without features are counted, and no neighbour moves into their place."""
    shutil.copytree(folder / "a", tmp_path / "a")
    rows = np.load(tmp_path / "a/images/00003.npy")
    rows[5:8] = np.nan
    np.save(tmp_path / "a/images/00003.npy", rows)
    for case in ("both", "the text tower learns"):
        run_dir = tmp_path / case
        changes = {**CASES[case], "data": {**CASES[case]["data"], "image_features": str(tmp_path / "a")}}
        changes["data"]["max_bad_fraction"] = 0.5
        main(["pretrain", "--config", str(trainings.file(run_dir, **changes))])
        lines = [json.loads(line) for line in (run_dir / "bad_samples.jsonl").read_text().splitlines()]
        assert {(line["cause"], line["number"]) for line in lines} == {("missing_features", n) for n in (5, 6, 7)}
        assert all(np.isfinite(losses(run_dir)))


def change_caption(shard: Path) -> None:
    """Give a shard a caption of the same length, and its old time, as `rsync -a` and `cp -p` of a mended copy do."""
    times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
    shard.write_bytes(shard.read_bytes().replace(b"a red ", b"a ted ", 1))
    os.utime(shard, ns=times)


@pytest.mark.parametrize(
    ("name", "model"),
    [("text_features", "B"), pytest.param("image_features", "A", marks=pytest.mark.long)],
)
def test_a_changed_shard_is_refused_until_it_is_embedded_again(
    trainings: Trainings, folder: Path, shards: Path, tmp_path: Path, name: str, model: str,
    refused: Callable[..., str], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data, stored, words = tmp_path / "data", tmp_path / "stored", (folder / model, "--features", "pooled")
    shutil.copytree(shards, data)
    embed(data, stored, *words)
    before = json.loads((stored / "shards/00003.json").read_text())
    os.utime(data / "00003.tar")
    stages = [{**STAGES[0], "samples": 64}]
    changes = {"data": {name: str(stored), "shards": str(data)}, "stages": stages, "eval": {"tasks": []}}
    start = ["pretrain", "--config", str(trainings.file(tmp_path / f"run_{name}", **changes)), "--output_dir"]
    main([*start, str(tmp_path / "touched")])
    touched = json.loads((stored / "shards/00003.json").read_text())
    assert touched["digest"] == before["digest"]
    assert touched["state"] != before["state"], "the next start reads nothing"
    change_caption(data / "00003.tar")
    said = refused(*start, tmp_path / "changed")
    assert "00003.tar has the digest " in said
    assert f"{stored}. Fix: run the same `flipscale prepare embed` again" in said
    capsys.readouterr()
    embed(data, stored, *words)
    assert "embedded 48 samples of 1 shards" in capsys.readouterr().out
    main([*start, str(tmp_path / "changed")])
    embed(data, tmp_path / "fresh", *words)
    for array in (tmp_path / "fresh").glob("*/*.npy"):
        assert array.read_bytes() == (stored / array.relative_to(tmp_path / "fresh")).read_bytes()
    shutil.rmtree(stored / "shards")  # features of an older version
    main([*start, str(tmp_path / "old")])
    assert f"{stored} has no digests of its shards" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(
    trainings: Trainings, folder: Path, shards: Path, tmp_path: Path, refused: Callable[..., str], tokenizer_dir: Path
) -> None:
    def line(*flags: object, **changes: object) -> str:
        file = trainings.file(tmp_path / "run", **{**CASES["both"], **changes})
        return refused("pretrain", "--config", file, *flags)

    other = export_tiny(tmp_path / "other", tokenizer_dir, 3)
    said = line("--model.vision", other)
    assert "vision_model is not that of the features in" in said
    write_shards(tmp_path / "shards", [30, 17, 1, 48], seed=1)
    assert "in other shards" in line("--data.shards", tmp_path / "shards")
    embed(shards, tmp_path / "embeds", folder / "A")
    assert "--features pooled" in line("--data.image_features", tmp_path / "embeds")
    assert "no features of texts" in line("--data.text_features", folder / "a")
    assert "image_size 32, and this recipe [64]" in line("--model.vision_config.image_size", 64)
    assert "tokens_digest" in line("--model.text_config.max_position_embeddings", 4)
    shutil.copytree(folder / "a", tmp_path / "a")
    (tmp_path / "a/images/00002.npy").unlink()
    assert "images/00002.npy and 0 others are missing" in line("--data.image_features", tmp_path / "a")
    file = trainings.file(tmp_path / "fresh", **{**CASES["both"], "model": {"vision": None, "text": str(folder / "B")}})
    assert "has no start weights" in refused("pretrain", "--config", file)


@pytest.mark.long
@pytest.mark.parametrize(("family", "towers"), [("clip", ["images", "texts"]), ("siglip", ["images"])])
def test_towers_of_other_families(
    recipe: dict, shards: Path, caption_tokenizer: Path, tmp_path: Path, family: str, towers: list[str]
) -> None:
    """SigLIP has no projections, so its text tower learns."""
    model: dict = {**recipe["model"], "family": family, "text_config": {**TOWER, "max_position_embeddings": 8}}
    data = {**recipe["data"], "tokenizer": str(caption_tokenizer)}
    changes = {"model": {**model, "size": "s16"}, "data": data, "stages": [{**STAGES[0], "samples": 64}]}

    def train(run_dir: Path, **changed: dict) -> dict[str, torch.Tensor]:
        file = tmp_path / f"{run_dir.name}.yaml"
        content = {**recipe, **changes, "output_dir": str(run_dir), **changed}
        file.write_text(yaml.safe_dump(content))
        main(["pretrain", "--config", str(file)])
        return load_file(run_dir / "model/model.safetensors")

    start = train(tmp_path / "start")
    embed(shards, tmp_path / "features", tmp_path / "start", "--features", "pooled")
    stored = {f"{tower[:-1]}_features": str(tmp_path / "features") for tower in towers}
    init = {"family": family, "init_from": str(tmp_path / "start")}
    aligned = train(tmp_path / "aligned", model=init, data={**data, **stored}, stages=STAGES)
    assert losses(tmp_path / "aligned")[-1] < losses(tmp_path / "aligned")[0]
    changed = {name.split(".")[0] for name in start if not torch.equal(start[name], aligned[name])}
    learns = {"visual_projection", "text_projection"} if family == "clip" else {"text_model"}
    assert changed == {*learns, "logit_scale"}
