"""A run of the family `clip` or `siglip` from a model folder takes its towers, pixels and tokenizer."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TOWER, losses
from safetensors.torch import load_file
from transformers import AutoModel, CLIPConfig, CLIPModel, CLIPProcessor, SiglipConfig, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flipscale.cli import main
from flipscale.data.tokenizers import load_tokenizer
from flipscale.pretrain import pretrain
from flipscale.start.complete_recipe import parse_recipe

VISION = {**TOWER, "image_size": 32, "patch_size": 8, "projection_dim": 24}
TEXT = {**TOWER, "vocab_size": 16, "max_position_embeddings": 12, "projection_dim": 24, "eos_token_id": 13}
STAGES = [{"name": "masked", "samples": 96, "mask_ratio": 0.5, "base_lr": 0.012}, {"name": "whole", "samples": 32}]


@pytest.fixture
def foreign(caption_tokenizer: Path, tmp_path: Path) -> Path:
    """The folder of a CLIPModel of another program: its own pixels, activation and width of embeddings."""
    torch.manual_seed(0)
    config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
    folder = tmp_path / "foreign"
    CLIPModel(config).save_pretrained(folder)
    tokenizer = load_tokenizer(str(caption_tokenizer), 12)
    tokenizer.add_bos_token = tokenizer.add_eos_token = True
    square = {"height": 32, "width": 32}
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square, image_mean=[0.1, 0.2, 0.3])
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def file(recipe: dict, foreign: Path, tmp_path: Path) -> Path:
    """A recipe that trains on from it."""
    data = {name: value for name, value in recipe["data"].items() if name != "tokenizer"}
    model = {"family": "clip", "init_from": str(foreign)}
    file, run_dir = tmp_path / "recipe.yaml", str(tmp_path / "run")
    file.write_text(yaml.safe_dump({**recipe, "model": model, "data": data, "stages": STAGES, "output_dir": run_dir}))
    return file


def test_a_recipe_takes_what_the_folder_has(file: Path, foreign: Path) -> None:
    recipe = parse_recipe(["--config", str(file), "--model.vision_config", "{attention_dropout: 0.1}"])
    vision, text = recipe.model.vision_config, recipe.model.text_config
    assert (vision["hidden_act"], vision["projection_dim"], vision["image_size"]) == ("quick_gelu", 24, 32)
    assert (vision["image_mean"], vision["attention_dropout"]) == ([0.1, 0.2, 0.3], 0.1)
    assert (text["vocab_size"], text["max_position_embeddings"], text["eos_token_id"]) == (16, 12, 13)
    assert recipe.data.tokenizer == str(foreign)


def test_it_trains_on_from_the_weights_and_exports_a_plain_folder(
    file: Path, foreign: Path, shards: Path, tmp_path: Path, assert_evaluated_alike: Callable[[Path], None]
) -> None:
    task = f"[{{kind: zero_shot, data: {shards}}}]"
    pretrain(parse_recipe(["--config", str(file), "--eval.tasks", task]))
    run_dir = tmp_path / "run"
    # It evaluates before the first step, as each run from weights does.
    assert '"step": 0' in (run_dir / "results.jsonl").read_text()
    assert losses(run_dir)[-1] < losses(run_dir)[0] - 0.1
    before, after = (load_file(folder / "model.safetensors") for folder in (foreign, run_dir / "model"))
    assert {name: w.shape for name, w in before.items()} == {name: w.shape for name, w in after.items()}
    assert 0 < (before["logit_scale"] - after["logit_scale"]).abs() < 0.1
    assert type(AutoModel.from_pretrained(run_dir / "model")) is CLIPModel
    assert not list((run_dir / "model").glob("*.py"))
    # Evaluated alone, it is as good as in its run.
    assert_evaluated_alike(run_dir)
    main(["export", str(run_dir), "--out", str(run_dir / "model")])  # its own folder is replaced
    with pytest.raises(SystemExit):
        main(["export", str(run_dir), "--out", str(foreign)])


def test_a_resume_needs_the_tokenizer_only(file: Path, foreign: Path, caption_tokenizer: Path) -> None:
    """The run directory has the towers, so the start weights may be gone."""
    longer = ["--model.text_config", "{max_position_embeddings: 16}", "--model.text_positions", "stretched"]
    flags = ["--config", str(file), "--data.tokenizer", str(caption_tokenizer), *longer]
    run_dir = pretrain(parse_recipe(flags))
    assert CLIPModel.from_pretrained(run_dir / "model").config.text_config.max_position_embeddings == 16
    shutil.rmtree(foreign)
    again = parse_recipe(flags)
    assert again.model.vision_config["image_mean"] == [0.1, 0.2, 0.3]
    pretrain(again)


@pytest.fixture
def other_words(caption_tokenizer: Path, tmp_path: Path) -> Path:
    """The folder of a tokenizer with two rows swapped and `mint` in place of `grey`."""
    folder = Path(shutil.copytree(caption_tokenizer, tmp_path / "words"))
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["red"], vocabulary["ring"] = vocabulary["ring"], vocabulary["red"]
    vocabulary["mint"] = vocabulary.pop("grey")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_another_vocabulary_is_refused(file: Path, other_words: Path, refused: Callable[..., str]) -> None:
    message = refused("pretrain", "--config", file, "--data.tokenizer", other_words)
    assert re.search(r"data.tokenizer .*words.* 3 pieces .*model.text_rows", message)


def test_rows_are_matched_by_their_pieces(
    file: Path, foreign: Path, other_words: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "flipscale")
    stages = "[{name: still, samples: 16, base_lr: 1e-12}]"
    flags = ["--data.tokenizer", str(other_words), "--model.text_rows", "matched", "--stages", stages]
    pretrain(parse_recipe(["--config", str(file), *flags]))
    name = "text_model.embeddings.token_embedding.weight"
    before, after = (load_file(folder / "model.safetensors")[name] for folder in (foreign, tmp_path / "run/model"))
    own, start = (load_tokenizer(str(folder), 12).get_vocab() for folder in (other_words, foreign))
    for piece, index in own.items():
        if piece != "mint":
            assert torch.allclose(after[index], before[start[piece]], atol=1e-6), piece
    assert not torch.allclose(after[own["mint"]], before[start["grey"]], atol=1e-3)
    assert after[own["mint"]].std() == pytest.approx(before.std(), rel=0.5)
    assert "13 of 14 pieces" in caplog.text
    pretrain(parse_recipe(["--config", str(file), *flags]))  # the resume of a run that is done


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.family", "siglip"], "model_type 'clip', not 'siglip'.*family to clip"),
        (["--model.family", "flip"], "model_type 'clip'.*model.family to clip"),
        (["--model.vision_config", "{_attn_implementation: x/y}"], "model.vision_config._attn_implementation"),
        (["--data.tokenizer", "words"], r"ends a caption with id \[2\].*eos_token_id \[13\]"),
    ],
)
def test_what_does_not_fit_is_refused(
    file: Path, tokenizer_dir: Path, refused: Callable[..., str], flags: list[str], expected: str
) -> None:
    flags = [str(tokenizer_dir) if flag == "words" else flag for flag in flags]
    assert re.search(expected, refused("pretrain", "--config", file, *flags))


def test_siglip_keeps_its_bias_without_learning_it(
    recipe: dict, caption_tokenizer: Path, tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    """The softmax loss does not see a bias."""
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": 16, "max_position_embeddings": 12}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**TOWER, "image_size": 32, "patch_size": 8}))
    model.logit_bias.data.fill_(-3.0)
    model.save_pretrained(tmp_path / "siglip")
    changes = {
        "model": {"family": "siglip", "init_from": str(tmp_path / "siglip"), "vision_config": {}, "text_config": {}},
        "data": {"tokenizer": str(caption_tokenizer)},
        "stages": STAGES,
    }
    pretrain(parse_recipe(["--config", str(write_recipe(tmp_path / "run", **changes))]))
    assert load_file(tmp_path / "run/model/model.safetensors")["logit_bias"].item() == -3.0
