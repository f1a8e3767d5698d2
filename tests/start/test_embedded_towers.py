"""Projections between models of other libraries: stored, aligned, resumed, exported, and loaded again."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import cut, losses, metrics
from foreign_towers import SINGLE_IMAGES, save_text
from safetensors.torch import load_file
from transformers import AutoModel

from flipscale.cli import main
from flipscale.hub.loading import load_with_tokenizer
from flipscale.pages.run_page import write_run_page
from flipscale.pretrain import pretrain
from flipscale.start.complete_recipe import parse_recipe

STAGES = [{"name": "align", "samples": 640, "base_lr": 0.02, "warmup_samples": 32}]
DECODERS: dict[str, dict[str, Any]] = {"llama": {}, "qwen3": {"head_dim": 16, "num_key_value_heads": 2}}


def embed(shards: Path, tower: str, model: Path, folder: Path) -> str:
    """Store the features of a tower; return its name in a recipe."""
    words = ["prepare", "embed", str(shards), str(folder), "--model", f"hf:{model}", "--towers", tower]
    main([*words, "--features", "pooled", "--num_workers", "0"])
    return f"hf:{model}"


@pytest.fixture
def aligned(recipe: dict, shards: Path, tmp_path: Path) -> Callable[..., Path]:
    """Stores the features of an image tower and a decoder; returns a recipe of projections between them."""

    def write(image: str, text: str) -> Path:
        SINGLE_IMAGES[image](tmp_path / image)
        save_text(text, tmp_path / text, **DECODERS[text], initializer_range=0.2)
        model = {
            "vision": embed(shards, "images", tmp_path / image, tmp_path / "images"),
            "text": embed(shards, "texts", tmp_path / text, tmp_path / "texts"),
            "vision_config": {"projection_dim": 24, "projection_hidden_size": 40},
            "text_config": {"projection_dim": 24, "projection_hidden_size": 40},
        }
        data = {name: value for name, value in recipe["data"].items() if name != "tokenizer"}
        data |= {"image_features": str(tmp_path / "images"), "text_features": str(tmp_path / "texts")}
        tasks = {"tasks": [{"kind": "zero_shot", "data": str(shards)}]}
        content = {"model": model, "data": data, "stages": STAGES, "eval": tasks, "output_dir": str(tmp_path / "run")}
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({**recipe, **content}))
        return file

    return write


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("dinov3", "llama"),
        pytest.param("tipsv2", "qwen3", marks=pytest.mark.long),
        pytest.param("convnext", "qwen3", marks=pytest.mark.long),
        pytest.param("timm_convnext", "llama", marks=pytest.mark.long),
    ],
)
def test_an_aligned_run_is_stopped_continued_and_exported_with_its_towers(
    image: str, text: str, aligned: Callable[..., Path], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    flags = ["--config", str(aligned(image, text)), "--save.every_samples", "320"]
    pretrain(parse_recipe(flags))
    assert losses(run_dir)[-1] < losses(run_dir)[0] - 0.1
    whole = load_file(run_dir / "model/model.safetensors")
    cut(run_dir, tmp_path / "cut", 20)
    shutil.rmtree(run_dir)
    (tmp_path / "cut").rename(run_dir)
    pretrain(recipe := parse_recipe(flags))
    resumed = load_file(run_dir / "model/model.safetensors")
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    assert len(losses(run_dir)) == 40
    model, page = run_dir / "model", write_run_page(recipe, load_with_tokenizer).read_text()
    assert "`flipscale search` has them for models with towers of other libraries" in page
    assert "data.tokenizer" not in page
    assert f"trained on\nfeatures of `{image}` and `{text}`" in (model / "README.md").read_text()
    assert sorted({name.split(".")[0] for name in load_file(model / "model.safetensors")}) == [
        "image_projection", "logit_scale", "text_projection",
    ]  # fmt: skip
    assert str(tmp_path) not in (model / "config.json").read_text()
    card = (model / "README.md").read_text()
    assert f"hf:{image}\n" in card
    assert f"hf:{tmp_path}" not in card
    # The folder needs nothing else: the towers may be gone.
    for name in (image, text):
        shutil.move(tmp_path / name, tmp_path / f"{name}_before")
    capsys.readouterr()
    main(["evaluate", str(run_dir), "--zero_shot", str(shards), "--json"])
    found = json.loads(capsys.readouterr().out)["zero_shot/top1"]
    assert found == [row["zero_shot/top1"] for row in metrics(run_dir) if "zero_shot/top1" in row][-1]
    main(["prepare", "embed", str(shards), str(tmp_path / "embeds"), "--model", str(run_dir), "--num_workers", "0"])
    # transformers loads the projections and the towers.
    projections = AutoModel.from_pretrained(model, trust_remote_code=True).eval()
    for tower in ("image", "text"):
        pooled, embeds = (
            torch.from_numpy(np.load(tmp_path / folder / f"{tower}s/00003.npy")).float()
            for folder in (f"{tower}s", "embeds")
        )
        with torch.no_grad():
            projected = getattr(projections, f"{tower}_projection")(pooled)
        assert (torch.nn.functional.normalize(projected, dim=1) - embeds).abs().max() < 4e-3
    for part, name in (("vision_model", image), ("text_model", text)):
        assert {file.name: file.read_bytes() for file in (model / part).iterdir()} == {
            file.name: file.read_bytes() for file in (tmp_path / f"{name}_before").iterdir()
        }
        if not image.startswith("timm"):  # transformers cannot load timm's newest folders, which name num_classes
            assert type(AutoModel.from_pretrained(model / part).eval()).__name__.lower().startswith(name[:5])
    # An export again replaces the folder with its copies.
    for name in (image, text):
        shutil.move(tmp_path / f"{name}_before", tmp_path / name)
    main(["export", str(run_dir), "--out", str(model)])


@pytest.mark.long
def test_one_tower_learns_beside_an_embedded_one(
    aligned: Callable[..., Path], shards: Path, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """LiT: a text tower of ours beside stored images, and masked images beside stored texts."""
    content = yaml.safe_load(aligned("dinov3", "llama").read_text())
    projection = {"projection_dim": 24}
    for learns, stage in (("text", {}), ("vision", {"mask_ratio": 0.5})):
        model = {**content["model"], "vision_config": projection, "text_config": projection}
        tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes = {
            "text": {"vocab_size": 16, "max_position_embeddings": 8},
            "vision": {"image_size": 32, "patch_size": 8},
        }
        model |= {learns: None, f"{learns}_config": {**projection, **tower, **sizes[learns]}}
        data = {**content["data"], "tokenizer": str(tokenizer_dir)}
        data.pop({"text": "text_features", "vision": "image_features"}[learns])
        stages = [{"name": "lit", "samples": 640, "base_lr": 0.01, "warmup_samples": 32, **stage}]
        file, run_dir = tmp_path / f"{learns}.yaml", tmp_path / f"learns_{learns}"
        file.write_text(
            yaml.safe_dump({**content, "model": model, "data": data, "stages": stages, "output_dir": str(run_dir)})
        )
        pretrain(parse_recipe(["--config", str(file)]))
        assert losses(run_dir)[-1] < losses(run_dir)[0] - 0.1
        capsys.readouterr()
        main(["evaluate", str(run_dir), "--zero_shot", str(shards), "--json"])
        found = json.loads(capsys.readouterr().out)["zero_shot/top1"]
        assert found == [row["zero_shot/top1"] for row in metrics(run_dir) if "zero_shot/top1" in row][-1]
    # The tower that learned is one of ours: images may have another size and a mask, and captions its tokens.
    words = ["--image_size", "64", "--mask_ratio", "0", "0.5", "--json"]
    main(["evaluate", str(tmp_path / "learns_vision"), "--zero_shot", str(shards), *words])
    whole, masked = json.loads(capsys.readouterr().out)
    assert (whole["mask_ratio"], masked["mask_ratio"]) == (0.0, 0.5)
    assert 0.3 < masked["encoder_relative"] < 0.7
    assert {"zero_shot/top1"} < masked.keys()
    words = ["prepare", "embed", str(shards), str(tmp_path / "learned"), "--model", str(tmp_path / "learns_text")]
    main([*words, "--towers", "texts", "--features", "pooled", "--num_workers", "0"])
    text = {"text": str(tmp_path / "learns_text"), "text_config": {"projection_dim": 24}}
    data = {**content["data"], "text_features": str(tmp_path / "learned"), "tokenizer": str(tokenizer_dir)}
    file.write_text(yaml.safe_dump({**content, "model": {**content["model"], **text}, "data": data}))
    pretrain(
        parse_recipe(["--config", str(file), "--stages.align.samples", "64", "--output_dir", str(tmp_path / "on")])
    )


def rms_norm_eps(config: Path) -> None:
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 0.1}))


def other_weights(weights: Path) -> None:
    save_text("llama", weights.parent.parent / "other", initializer_range=0.3)
    shutil.copyfile(weights.parent.parent / "other/model.safetensors", weights)


def test_a_tower_that_is_gone_or_has_changed_is_not_copied(
    aligned: Callable[..., Path], shards: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """A start refuses a tower that has changed. Without one, the run ends with its model all the same, and the next
    export has the tower that is back."""
    file, model = aligned("dinov3", "llama"), tmp_path / "run/model"
    shutil.move(tmp_path / "dinov3", tmp_path / "before")
    start = ["pretrain", "--config", str(file), "--eval.tasks", "[]"]
    for name, change in (("config.json", rms_norm_eps), ("model.safetensors", other_weights)):
        content = (tmp_path / "llama" / name).read_bytes()
        change(tmp_path / "llama" / name)
        assert re.search(r"hf:.*llama has .* when its features were stored", refused(*start))
        (tmp_path / "llama" / name).write_bytes(content)
    assert not (tmp_path / "run/model").exists()
    main(start)
    assert (model / "model.safetensors").exists()
    assert [part.name for part in model.iterdir() if part.name in ("vision_model", "text_model")] == ["text_model"]
    assert re.search("there is no folder '.*dinov3'", refused("evaluate", tmp_path / "run", "--zero_shot", shards))
    shutil.move(tmp_path / "before", tmp_path / "dinov3")
    other_weights(tmp_path / "llama/model.safetensors")
    main(["export", str(tmp_path / "run"), "--out", str(model)])
    assert (model / "vision_model/model.safetensors").exists()
    said = refused("evaluate", tmp_path / "run", "--zero_shot", shards)
    assert re.search(r"hf:.*llama has weights \w{12}, and hf:.*llama had \w{12} when its features were stored", said)


def test_what_does_not_fit_is_refused(
    aligned: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    file = aligned("dinov3", "llama")

    def said(*flags: str) -> str:
        return refused("pretrain", "--config", file, *flags)

    expected = "model.text is 'hf:x' and data.text_features '.*texts' has texts of 'hf:.*llama'; expected texts of this"
    assert re.search(expected, said("--model.text", "hf:x"))
    expected = "data.image_features 'nowhere' has none; expected images of this model"
    assert expected in said("--data.image_features", "nowhere")
    # Without the prefix, the family is asked for; that names the way for what cannot be masked.
    towers = ["--model.family", "towers", "--data.image_features", "null", "--data.text_features", "null"]
    towers += ["--model.vision_config", "{}", "--model.text_config", "{}"]
    SINGLE_IMAGES["tipsv2"](tmp_path / "tips")
    vision = said(*towers, "--model.vision", str(tmp_path / "tips"), "--model.text", str(tmp_path / "llama"))
    assert re.search(r"'tipsv2_vision_model', .* or embed it by .*: hf:.*tips in family flip", vision)
    # Weights that changed after the features were stored.
    weights = tmp_path / "llama/model.safetensors"
    save_text("llama", tmp_path / "other", initializer_range=0.3)
    shutil.copyfile(tmp_path / "other/model.safetensors", weights)
    assert re.search(r"hf:.*llama has weights \w{12}, and hf:.*llama had \w{12} when its features were stored", said())


def test_verbs_of_whole_models_refuse(
    aligned: Callable[..., Path],
    shards: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretrain(parse_recipe(["--config", str(aligned("dinov3", "llama")), "--eval.tasks", "[]"]))
    said = refused("convert", "onnx", tmp_path / "run", tmp_path / "onnx")
    assert "projects features of other models" in said
    search = ["search", str(tmp_path / "run"), str(shards), "a red disc", "--out", str(tmp_path / "search.html")]
    assert "whose patches have no embeddings" in refused(*search, "--maps")
    capsys.readouterr()
    main(search)
    assert "only filters these queries: the text tower is another library's model" in capsys.readouterr().out
    assert "takes no words" in refused("search", f"hf:{tmp_path / 'dinov3'}", *search[2:])
    said = refused("pretrain", "--config", tmp_path / "recipe.yaml", "--model.vision", tmp_path / "run")
    assert re.search(r"model.vision '.*run' has no tower of its own; name 'hf:.*dinov3' instead", said)
    flags = ["--model.vision", "null", "--model.text", "null", "--output_dir", tmp_path / "next"]
    flags += ["--data.image_features", "null", "--data.text_features", "null", "--data.tokenizer", tmp_path / "llama"]
    said = refused("pretrain", "--config", tmp_path / "recipe.yaml", "--model.init_from", tmp_path / "run", *flags)
    assert re.search(r"model.init_from '.*run' projects features of other models; name them in model.vision and", said)
