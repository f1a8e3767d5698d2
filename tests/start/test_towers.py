"""A run of the family `towers` from two folders of other programs: a timm ViT and a BERT."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_towers
import numpy as np
import pytest
import torch
import yaml
from conftest import TOWER, cut, losses
from foreign_towers import (
    END,
    OTHER_TEXTS,
    SMALL_TIMM,
    START,
    VISION,
    image_difference,
    opened,
    save_text,
    save_timm,
    text_difference,
)
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModel,
    AutoProcessor,
    DINOv3ViTModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    VisionTextDualEncoderModel,
    ViTModel,
)

from flipscale.cli import main
from flipscale.data.captions import tokenise
from flipscale.data.tokenizers import load_tokenizer
from flipscale.evaluation.suite import build_tasks
from flipscale.hub.export import build_processor, export_model
from flipscale.hub.loading import load_dual_encoder, load_with_tokenizer
from flipscale.model.patches import patchify
from flipscale.pages import run_page
from flipscale.pretrain import pretrain
from flipscale.start.complete_recipe import parse_recipe
from flipscale.start.pretrained_fields import warn_of_pixels

STAGES = [
    {"name": "masked", "samples": 160, "mask_ratio": 0.5, "base_lr": 0.004},
    {"name": "small", "samples": 32, "image_size": 16},
    {"name": "whole", "samples": 32},
]

# One step that changes nothing but the projections.
TOGETHER = ["--model.frozen", "[vision_model, text_model]", "--stages", "[{name: none, samples: 16, base_lr: 1e-9}]"]


@pytest.fixture
def file(recipe: dict, tmp_path: Path) -> Path:
    """A recipe that trains on from a timm ViT and a BERT."""
    save_timm("vit_tiny_patch16_224", tmp_path / "vit", **SMALL_TIMM)
    save_text("bert", tmp_path / "bert", initializer_range=0.2)
    data = {name: value for name, value in recipe["data"].items() if name != "tokenizer"}
    fields = {"projection_dim": 24, "caption_tokens": 8}
    model = {"family": "towers", "vision": str(tmp_path / "vit"), "text": str(tmp_path / "bert"), "text_config": fields}
    file, run_dir = tmp_path / "recipe.yaml", str(tmp_path / "run")
    file.write_text(yaml.safe_dump({**recipe, "model": model, "data": data, "stages": STAGES, "output_dir": run_dir}))
    return file


def test_a_recipe_takes_what_the_folders_have(file: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(["--config", str(file), "--model.text_config.hidden_dropout_prob", "0.1"])
    vision, text = recipe.model.vision_config, recipe.model.text_config
    assert (vision["model_type"], vision["image_size"], vision["image_mean"]) == ("vit", 32, [0.5, 0.5, 0.5])
    assert (text["model_type"], text["vocab_size"], text["max_position_embeddings"]) == ("bert", 16, 20)
    # Dropout is off, unless a recipe asks for it.
    assert (text["attention_probs_dropout_prob"], text["hidden_dropout_prob"]) == (0.0, 0.1)
    assert recipe.data.tokenizer == str(tmp_path / "bert")


def test_it_trains_on_and_exports_a_plain_folder(
    file: Path,
    shards: Path,
    tmp_path: Path,
    assert_evaluated_alike: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = f"[{{kind: zero_shot, data: {shards}}}]"
    pretrain(parse_recipe(["--config", str(file), "--eval.tasks", task]))
    run_dir = tmp_path / "run"
    assert losses(run_dir)[-1] < losses(run_dir)[0] - 0.1
    before, after = load_file(tmp_path / "bert/model.safetensors"), load_file(run_dir / "model/model.safetensors")
    # The names of weights are those of transformers 4, and BERT's are its own.
    assert "vision_model.encoder.layer.1.attention.attention.query.weight" in after
    assert {f"text_model.{name}" for name in before} == {name for name in after if name.startswith("text_model.")}
    model = AutoModel.from_pretrained(run_dir / "model")
    assert (type(model), type(model.vision_model)) == (VisionTextDualEncoderModel, ViTModel)
    assert not list((run_dir / "model").glob("*.py"))
    # Its processor pads captions, and the model leaves the padding out.
    processor = AutoProcessor.from_pretrained(run_dir / "model")
    tokens = processor(text=["a red circle", "the blue square"], return_tensors="pt", padding="max_length")
    assert tokens["input_ids"].shape == (2, 8)
    # Evaluated alone, it is as good as in its run.
    assert_evaluated_alike(run_dir)
    lengths: list[int] = []
    noted = lambda *given: lengths.append(given[2]) or tokenise(*given)  # noqa: E731
    monkeypatch.setattr(run_page, "tokenise", noted)
    tasks = build_tasks([{"kind": "zero_shot", "data": str(shards)}])
    run_page.answer_pictures(tasks[0], str(run_dir / "model"), load_dual_encoder)
    assert {*lengths} == {8}, "its page reads captions as the evaluations do"
    main(["export", str(run_dir), "--out", str(run_dir / "model"), "--interpolate", str(run_dir / "model")])
    # Another run starts from the folder of both, and its tokens and projections come with it.
    flags = ["--model.init_from", str(run_dir), "--output_dir", str(tmp_path / "next")]
    again = tmp_path / "again.yaml"
    content = yaml.safe_load(file.read_text())
    again.write_text(yaml.safe_dump({**content, "model": {"family": "towers"}}))
    follower = parse_recipe(["--config", str(again), *flags])
    assert [follower.model.text_config[name] for name in ("projection_dim", "caption_tokens")] == [24, 8]
    pretrain(follower)
    assert losses(tmp_path / "next")[0] < losses(run_dir)[0] - 0.1
    # LoRA takes each tower's own names of layers, and its changes are exported as the folder names the weights.
    lora = ["--optim.lora.rank", "4", "--optim.lora.modules", "[q_proj, query]", "--output_dir", str(tmp_path / "lora")]
    pretrain(parse_recipe(["--config", str(again), *flags, *lora]))
    changed = load_file(tmp_path / "lora/model/model.safetensors")
    assert {name.split(".", 2)[0] for name in after if not torch.equal(after[name], changed[name])} == {
        "text_model", "vision_model",
    }  # fmt: skip
    assert all(torch.equal(after[name], changed[name]) for name in after if "query" not in name)


def test_projections_of_two_layers_learn_from_stored_features(
    file: Path, shards: Path, tmp_path: Path, refused
) -> None:
    """As in align_cc12m_day: a folder of both towers, their features of smaller images, and projections of these."""
    main(["pretrain", "--config", str(file), *TOGETHER, "--output_dir", str(tmp_path / "two")])
    embed = ["prepare", "embed", str(shards), "--image_size", "16", "--num_workers", "0", "--model"]
    main([*embed, str(tmp_path / "two"), str(tmp_path / "pooled"), "--features", "pooled"])
    content = yaml.safe_load(file.read_text())
    fields = {"projection_dim": 24, "projection_hidden_size": 40}
    content["model"] = {"family": "towers", "init_from": str(tmp_path / "two"), "text_config": fields}
    content["data"] |= {"image_features": str(tmp_path / "pooled"), "text_features": str(tmp_path / "pooled")}
    content["stages"] = [{"name": "align", "samples": 320, "image_size": 16, "base_lr": 0.05, "warmup_samples": 32}]
    file.write_text(yaml.safe_dump({**content, "loss": {"kind": "sigmoid"}}))
    said = refused("pretrain", "--config", file, "--stages.align.image_size", "null")
    assert "image_size 16, and this recipe [32]" in said
    main(["pretrain", "--config", str(file)])
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.1
    theirs = AutoModel.from_pretrained(tmp_path / "run/model", trust_remote_code=True).eval()
    assert "transformers_modules" in type(theirs).__module__
    before, after = (load_file(tmp_path / name / "model/model.safetensors") for name in ("two", "run"))
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith(("vision_m", "text_m")))
    assert after["text_projection.0.weight"].shape == (40, 32)
    # The whole model embeds as its projections do with the features. It goes on from its own folder.
    main([*embed, str(tmp_path / "run"), str(tmp_path / "embeds")])
    for tower, projection in (("images", theirs.visual_projection), ("texts", theirs.text_projection)):
        pooled, embeds = (
            torch.from_numpy(np.load(tmp_path / kind / tower / "00003.npy")).float() for kind in ("pooled", "embeds")
        )
        with torch.no_grad():
            found = torch.nn.functional.normalize(projection(pooled), dim=1)
        assert (found - embeds).abs().max() < 4e-3
    follower = parse_recipe(["--config", str(file), "--model.init_from", str(tmp_path / "run")])
    assert follower.model.text_config["projection_hidden_size"] == 40


def test_a_text_encoder_without_pooling_needs_code_in_the_folder(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A caption is the mean of its tokens, whatever its padding; transformers computes it from the folder alone."""
    save_text("modernbert", tmp_path / "modern", **OTHER_TEXTS["modernbert"], initializer_range=0.2)
    pretrain(parse_recipe(["--config", str(file), "--model.text", str(tmp_path / "modern")]))
    assert f"{tmp_path / 'modern'}' has no pooled output" in caplog.text
    folder = tmp_path / "run/model"
    theirs = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert "transformers_modules" in type(theirs).__module__
    ours, tokenizer = load_with_tokenizer(str(folder))
    short, long = (tokenizer(["a red circle"], padding="max_length", max_length=size) for size in (4, 8))
    with torch.no_grad():
        found = [
            model.get_text_features(
                torch.tensor(tokens["input_ids"]), torch.tensor(tokens["attention_mask"])
            ).pooler_output
            for model, tokens in ((ours, short), (ours, long), (theirs, long))
        ]
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert torch.allclose(found[1], found[2], atol=1e-5)


@pytest.mark.long
def test_a_dinov3_is_trained_under_masks(
    file: Path, shards: Path, tmp_path: Path, assert_evaluated_alike: Callable[[Path], None]
) -> None:
    """Half and three quarters of its patches hidden, stopped in between, exported, and loaded by transformers alone."""
    VISION["`DINOv3ViTModel`"](tmp_path / "dino")
    content = yaml.safe_load(file.read_text())
    content["model"]["vision"] = str(tmp_path / "dino")
    content["stages"] = [
        {"name": "half", "samples": 160, "mask_ratio": 0.5, "base_lr": 0.004},
        {"name": "most", "samples": 160, "mask_ratio": 0.75},
    ]
    content["save"] = {"every_samples": 64, "total_limit": 20}
    file.write_text(yaml.safe_dump({**content, "eval": {"tasks": [{"kind": "zero_shot", "data": str(shards)}]}}))
    flags, run_dir = ["--config", str(file)], tmp_path / "run"
    pretrain(parse_recipe(flags))
    assert losses(run_dir)[-1] < losses(run_dir)[0] - 0.1
    whole = load_file(run_dir / "model/model.safetensors")
    cut(run_dir, tmp_path / "cut", 12)
    shutil.rmtree(run_dir)
    (tmp_path / "cut").rename(run_dir)
    pretrain(parse_recipe(flags))
    resumed = load_file(run_dir / "model/model.safetensors")
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    # The names of weights are the published ones.
    published = load_file(tmp_path / "dino/model.safetensors")
    names = {name.removeprefix("vision_model.") for name in whole if name.startswith("vision_model.")}
    assert names == published.keys()
    model = AutoModel.from_pretrained(run_dir / "model").eval()
    assert (type(model), type(model.vision_model)) == (VisionTextDualEncoderModel, DINOv3ViTModel)
    assert not list((run_dir / "model").glob("*.py"))
    pixels = torch.randn(2, 3, 32, 32)
    ours, _ = load_with_tokenizer(str(run_dir))
    with torch.no_grad():
        found = ours.eval().get_image_features(patches=patchify(pixels, 8)).pooler_output
        assert torch.allclose(found, model.get_image_features(pixels).pooler_output, atol=1e-5)
    assert_evaluated_alike(run_dir)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.vision", "{tmp}/none"], "there is no folder '.*none'"),
        (["--model.vision", "{tmp}/bert"], "model.vision '.*bert' is of the type 'bert', which is not a plain ViT"),
        (["--model.text_config.caption_tokens", "21"], "caption_tokens is 21.*has 20"),
        (["--model.text_config.hidden_dropout", "0"], "model.text_config.hidden_dropout .*hidden_dropout_prob"),
        (["--model.text_config.auto_map", "{}"], "model.text_config.auto_map"),
        (
            ["--model.text_config.max_position_embeddings", "30"],
            r"position_embeddings.weight has the shape \[20, 32\] there, \[30, 32\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    file: Path, tmp_path: Path, refused: Callable[..., str], flags: list[str], expected: str
) -> None:
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    assert re.search(expected, refused("pretrain", "--config", file, *flags))


@pytest.mark.parametrize(
    ("section", "field", "value", "expected"),
    [
        ("pretrained_cfg", "architecture", "vit_base_patch16_224", "architecture is 'vit_base_patch16_224'; expected"),
        ("pretrained_cfg", "hf_hub_id", "timm/vit_tiny_patch16_224.dino", "hf_hub_id is 'timm/vit_tiny.*'; expected"),
        ("pretrained_cfg", "url", "https://example.org/a.pth", "url is 'https://example.org/a.pth'; expected none"),
        ("pretrained_cfg", "mean", [123.7, 116.3, 103.5], r"image_mean is \[123.7, 116.3, 103.5\]"),
        ("pretrained_cfg", "std", [0.5, 0.5], r"image_std is \[0.5, 0.5\]"),
        ("pretrained_cfg", "std", None, "'image_std' with value None"),
        ("model_args", "depth", 3, "built by its config.json and its weights .*blocks.2.norm1"),
        ("model_args", "depth", 1, "built by its config.json and its weights .*blocks.1.attn"),
        ("model_args", "patch_size", 4, "built by its config.json and its weights .*patch_embed.proj.weight"),
        ("model_args", "img_size", 64, "built by its config.json and its weights .*pos_embed"),
    ],
)
def test_a_timm_config_of_another_model_is_refused(
    file: Path, tmp_path: Path, refused: Callable[..., str], section: str, field: str, value: Any, expected: str
) -> None:
    save_timm("vit_tiny_patch16_224", tmp_path / "vit", **{**SMALL_TIMM, "num_classes": 5})
    name = tmp_path / "vit/config.json"
    content = json.loads(name.read_text())
    name.write_text(json.dumps({**content, section: {**content[section], field: value}}))
    assert re.search(expected, refused("pretrain", "--config", file))


def test_a_timm_model_without_a_mean_is_warned_of(file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_pixels(parse_recipe(["--config", str(file)]).model)
    assert not caplog.text
    name = tmp_path / "vit/config.json"
    content = json.loads(name.read_text())
    del content["pretrained_cfg"]["mean"]
    name.write_text(json.dumps(content))
    warn_of_pixels(parse_recipe(["--config", str(file)]).model)
    assert "vit has no mean and deviation of its images; they are taken to be image_mean [0.485" in caplog.text


@pytest.mark.parametrize(
    ("kind", "field"), [("distilbert", "dropout"), ("modernbert", "mlp_dropout"), ("modernbert", "embedding_dropout")]
)
def test_two_passes_refuse_any_dropout(
    file: Path, tmp_path: Path, refused: Callable[..., str], kind: str, field: str
) -> None:
    save_text(kind, tmp_path / kind, **OTHER_TEXTS[kind])
    flags = ["--model.text", tmp_path / kind, "--data.micro_batch_size", "4", f"--model.text_config.{field}", "0.3"]
    assert re.search(rf"model\.text_config\.{field} is 0\.3 ", refused("pretrain", "--config", file, *flags))


def test_a_folder_of_other_towers_is_refused(shards: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    save_text("bert", tmp_path / "both")
    content = {"model_type": "vision-text-dual-encoder", "vision_config": {"model_type": "swin"}}
    content["text_config"] = {**json.loads((tmp_path / "both/config.json").read_text())}
    (tmp_path / "both/config.json").write_text(json.dumps(content))
    expected = "is of the type 'swin', which does not fit"
    start = ["--model.family", "towers", "--model.init_from", tmp_path / "both"]
    assert expected in refused("pretrain", "--config", "b16_cc3m", *start)
    assert expected in refused("evaluate", tmp_path / "both", "--zero_shot", shards)


def test_a_tokenizer_without_padding_is_refused(file: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    name = tmp_path / "bert/tokenizer_config.json"
    content = {key: value for key, value in json.loads(name.read_text()).items() if key != "pad_token"}
    name.write_text(json.dumps(content))
    assert "no padding token" in refused("pretrain", "--config", file)


def test_other_image_towers_are_refused(file: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    for name, kind in (("timm, EVA02", "Eva"), ("`Siglip2VisionModel` (NaFlex)", "siglip2_vision_model")):
        VISION[name](tmp_path / kind)
        assert f"is of the type '{kind}'" in refused("pretrain", "--config", file, "--model.vision", tmp_path / kind)
    save_timm("vit_tiny_patch16_224", tmp_path / "normed", **SMALL_TIMM, qk_norm=True)
    assert "attn.k_norm" in refused("pretrain", "--config", file, "--model.vision", tmp_path / "normed")
    save_timm("vit_tiny_patch16_224", tmp_path / "steep", **SMALL_TIMM, act_layer="relu")
    assert "activation of a tower's blocks is ReLU" in refused(
        "pretrain", "--config", file, "--model.vision", tmp_path / "steep"
    )


@pytest.mark.long
def test_the_page_lists_what_fits(tmp_path: Path) -> None:
    """Each row of the table is tried, and equal to its own library to 1e-5."""
    page = (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8")
    assert page.partition(START)[2].partition(END)[0] == foreign_towers.table(tmp_path)


def test_a_timm_vit_and_a_bert_embed_as_in_their_own_libraries(file: Path, tmp_path: Path) -> None:
    assert image_difference("timm", tmp_path / "vit", tmp_path / "bert")[1] < 1e-5
    assert text_difference(tmp_path / "bert", tmp_path / "vit")[1] < 1e-5


def test_an_image_processor_of_the_folder_counts(tmp_path: Path) -> None:
    save_text("bert", tmp_path / "bert")
    VISION["`Dinov2Model`"](tmp_path / "dino")
    config = opened(tmp_path / "dino", tmp_path / "bert").config
    assert (list(config.vision_config.image_mean), config.squashes) == ([0.1, 0.2, 0.3], False)


def test_in_other_programs(tmp_path: Path) -> None:
    """sentence-transformers embeds captions alike, and the image tower trains as the encoder of a LLaVA."""
    save_text("xlm-roberta", tmp_path / "text")
    VISION["`Dinov2Model`"](tmp_path / "dino")
    ours = opened(tmp_path / "dino", tmp_path / "text")
    torch.nn.init.normal_(ours.text_projection.weight)
    plain = VisionTextDualEncoderModel(ours.config.exported())
    weights = {name: weight.reshape(plain.state_dict()[name].shape) for name, weight in ours.state_dict().items()}
    plain.load_state_dict(weights)
    processor = build_processor(ours.config, load_tokenizer(str(tmp_path / "text"), 8))
    folder = export_model(plain, processor, tmp_path / "both")
    texts = ["a red circle", "the blue square and the green triangle"]
    tokens = torch.tensor(processor.tokenizer(texts, padding="max_length", max_length=8, truncation=True)["input_ids"])
    with torch.no_grad():
        expected = torch.nn.functional.normalize(ours.get_text_features(tokens).pooler_output)
    found = SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True)
    assert torch.allclose(found, expected, atol=1e-5)

    tower = AutoModel.from_pretrained(folder).vision_model
    words = LlamaConfig(**TOWER, vocab_size=50, pad_token_id=0)
    towers = {"vision_config": tower.config, "text_config": words}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(**towers, image_token_index=49, vision_feature_layer=-1))
    model.model.vision_tower.load_state_dict(tower.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.cat([torch.full((2, 16), 49), torch.tensor([[3, 4, 5], [6, 7, 8]])], dim=1)
    pixels, found_losses = torch.randn(2, 3, 32, 32), []
    for _ in range(3):
        loss = model(input_ids=ids, pixel_values=pixels, labels=ids.masked_fill(ids == 49, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found_losses.append(loss.item())
    assert found_losses[2] < found_losses[1] < found_losses[0]
    assert not torch.equal(model.model.vision_tower.embeddings.cls_token, tower.embeddings.cls_token)
