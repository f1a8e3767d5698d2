"""Every recipe of the package parses, plans, and comes back from its own YAML."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from conftest import metrics

from flipscale.cli import main
from flipscale.objectives.build import build_config
from flipscale.recipe.augment import AugmentRecipe
from flipscale.recipe.files import RECIPES
from flipscale.recipe.recipe import Recipe, deciding_part, differences, parse_fields, to_yaml
from flipscale.runs.complete_recipe import parse_recipe
from flipscale.training.schedule import schedule_stages

EXAMPLES = Path(__file__).parents[2] / "examples"
DEMO = str(EXAMPLES / "demo/demo.yaml")
FILES = [
    file
    for file in (*RECIPES.glob("*.yaml"), *EXAMPLES.glob("*/*.yaml"))
    if re.search("^(model|extends):", file.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("file", sorted(FILES), ids=lambda file: file.stem)
def test_recipe(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no runs/ makes `runs/NAME` a path
    recipe = parse_recipe(["--config", str(file)])
    stages = schedule_stages(recipe.stages, recipe.data.global_batch_size, recipe.budget_minutes)
    assert stages[-1].last > 0
    assert recipe.model.config().vision_config.num_patches > 0
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert parse_recipe(["--config", str(tmp_path / "again.yaml")]) == recipe
    assert differences(recipe, yaml.safe_load(to_yaml(recipe))) == []


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text(
        "extends: small_cpu\nmodel: {text_config: {hidden_size: 64}}\noptim: {weight_decay: 1e-2}\nseed: 3\n"
    )
    (tmp_path / "sub/own.yaml").write_text(
        "# Own.\nextends: ../base.yaml\nmodel: {text_config: {pooling: first}}\nstages: [{name: a, samples: 512}]\n"
    )
    own, package = (parse_fields(["--config", name]) for name in (str(tmp_path / "sub/own.yaml"), "small_cpu"))
    assert own.model.text_config == {**package.model.text_config, "hidden_size": 64, "pooling": "first"}
    assert (own.optim.name, own.optim.weight_decay, own.seed) == ("muon", 0.01, 3)
    assert [stage.name for stage in own.stages] == ["a"], "a list replaces the other"
    assert own.data == package.data
    assert "extends" not in to_yaml(own)
    assert parse_fields(["--config", str(tmp_path / "sub/own.yaml"), "--seed", "4"]).seed == 4


def test_the_vocabulary_follows_the_tokenizer(tokenizer_dir: Path, tmp_path: Path) -> None:
    words = ["--config", DEMO, "--data.tokenizer", str(tokenizer_dir)]
    fixed = parse_recipe(words)
    assert fixed.model.text_config["vocab_size"] == 2881, "a recipe may fix it"
    free = dataclasses.asdict(fixed)
    del free["model"]["text_config"]["vocab_size"]
    (tmp_path / "free.yaml").write_text(yaml.safe_dump({**free, "data": {"tokenizer": str(tokenizer_dir)}}))
    words = ["--config", str(tmp_path / "free.yaml")]
    follows = parse_recipe(words)
    assert build_config(follows).text_config.vocab_size == 12
    assert "vocab_size: 12" in to_yaml(follows), "the run would not remember it"
    assert build_config(parse_recipe(words, is_saved=True)).text_config.vocab_size == 30523
    weights = parse_recipe([*words, "--model.init_from", "runs/other/model"])
    assert build_config(weights).text_config.vocab_size == 30523
    with pytest.raises(ValueError, match=f"data.tokenizer '{tmp_path}' cannot be loaded"):
        parse_recipe([*words, "--data.tokenizer", str(tmp_path)])


def test_the_paper_s_sizes_and_rates() -> None:
    expected = {"b16_laion400m": 1.024e-3, "h14_laion400m": 1.024e-3, "l16_laion2b": 5.12e-4, "h14_laion2b": 5.12e-4}
    for name, peak in expected.items():
        recipe = parse_recipe(["--config", name])
        stages = schedule_stages(recipe.stages, recipe.data.global_batch_size)
        assert stages[0].peak_lr == pytest.approx(peak)
        assert stages[1].peak_lr == pytest.approx(1.024e-5)
        assert [stage.mask_ratio for stage in stages] == [0.5, 0.0]


def test_the_paper_s_fine_tuning() -> None:
    recipe = parse_recipe(["--config", "finetune_l16_imagenet"])
    (stage,) = schedule_stages(recipe.stages, recipe.data.global_batch_size)
    assert stage.peak_lr == pytest.approx(5e-5 * 1024 / 256)
    epoch = 1_281_167 / 1024
    assert (stage.last, stage.warmup) == (pytest.approx(50 * epoch, abs=1), pytest.approx(5 * epoch, abs=1))
    optim, augment = recipe.optim, recipe.data.augment
    assert (optim.weight_decay, optim.adam_beta1, optim.adam_beta2, optim.layer_decay) == (0.05, 0.9, 0.999, 0.75)
    assert augment == AugmentRecipe("rand-m9-mstd0.5-inc1", 0.8, 1.0)
    assert recipe.loss.options == {"num_classes": 1000, "label_smoothing": 0.1}
    assert (recipe.model.drop_path_rate, stage.mask_ratio) == (0.2, 0.0)


@pytest.mark.parametrize(("name", "samples"), [("caption_coco_l16", 113_287), ("vqa_v2_l16", 443_757)])
def test_the_paper_s_captioning_and_question_answering(name: str, samples: int) -> None:
    recipe = parse_recipe(["--config", name])
    (stage,) = schedule_stages(recipe.stages, recipe.data.global_batch_size)
    assert (stage.peak_lr, stage.peak_lr * recipe.optim.tower_lr_ratio) == (1e-4, pytest.approx(1e-5))
    assert (recipe.data.global_batch_size, recipe.optim.weight_decay, stage.mask_ratio) == (256, 0.01, 0.0)
    assert stage.last == pytest.approx(20 * samples / 256, abs=1)
    assert stage.warmup == pytest.approx(3 * samples / 256, abs=1)
    config = build_config(recipe)
    assert (config.vision_config.image_size, config.vision_config.position_size) == (512, 224)
    parts = {"decoder_config": (384, 3, 6), "answer_config": (768, 4, 12)}
    found = {part: getattr(config, part) for part in parts if getattr(config, part) is not None}
    assert len(found) == 1
    for part, shape in found.items():
        assert (shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads) == parts[part]  # type: ignore[misc]


def sections(kind: type = Recipe) -> Iterator[type]:
    """The dataclasses of the sections that decide what is learned, those within them too."""
    types = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        for hint in (types[field.name], *get_args(types[field.name])):
            if dataclasses.is_dataclass(hint) and field.metadata.get("learned", True):
                yield hint
                yield from sections(hint)


def test_the_sections_that_decide() -> None:
    assert {section.__name__ for section in sections()} == {
        *("ModelRecipe", "DataRecipe", "AugmentRecipe", "SourceRecipe", "MaskRecipe", "LossRecipe", "OptimRecipe"),
        *("LoraRecipe", "StageRecipe", "ColorJitterRecipe"),
    }
    kept = deciding_part(yaml.safe_load(to_yaml(parse_recipe(["--config", DEMO]))), name_of=lambda place: "name")
    assert set(kept) == {"model", "data", "mask", "loss", "optim", "stages", "seed", "budget_minutes"}
    assert set(kept["data"]) == {
        *(
            "sources",
            "fraction",
            "weights",
            "captions",
            "image_features",
            "text_features",
            "teachers",
            "tokenizer",
            "global_batch_size",
            "crop_scale",
            "mirror",
            "augment",
            "lanes",
            "shards_per_block",
        )
    }
    assert kept["data"]["lanes"] == 64
    assert kept["data"]["tokenizer"] == "name"


def test_a_recipe_of_an_older_version_is_the_same_by_its_defaults() -> None:
    recipe = parse_recipe(["--config", "b16_cc3m"])
    saved = yaml.safe_load(to_yaml(recipe))
    for section, field in (("optim", "ema_decay"), ("mask", "views"), ("data", "cache_dir")):
        del saved[section][field]
    del saved["loss"], saved["stages"][0]["text_mask_ratio"]
    saved["data"]["sources"], saved["eval"] = [], {"zero_shot": "elsewhere", "every_samples": 3}
    assert differences(recipe, saved) == []
    del saved["data"]["lanes"]
    assert differences(recipe, saved) == ["data.lanes: 1, now 64"]  # the only one that does what it did not do before
    saved["data"]["lanes"] = 64
    saved["optim"]["sharpness"], saved["stages"][0]["mask_ratio"] = 3, 0.25
    assert differences(recipe, saved) == ["optim.sharpness: 3, now None", "stages[0].mask_ratio: 0.25, now 0.5"]
    saved["stages"].append({"name": "third", "samples": 5})
    assert differences(recipe, saved)[-1].startswith("stages[2]: {'name': 'third', 'samples': 5,")


def test_the_page_s_stages_of_two_image_sizes_train(recipe: dict, tmp_path: Path) -> None:
    """A few pairs of each stage, with the page's sizes and rates."""
    page = (Path(__file__).parents[2] / "docs/training.md").read_text()
    (block,) = re.findall(r"```yaml\n(stages:.*?)```", page, re.DOTALL)
    stages = [
        {**stage, "samples": 8, "warmup_samples": 0 if "base_lr" not in stage else min(1, stage["warmup_samples"])}
        for stage in yaml.safe_load(block)["stages"]
    ]
    model = {
        **recipe["model"],
        "vision_config": {**recipe["model"]["vision_config"], "image_size": 224, "patch_size": 16},
    }
    small = {**recipe, "model": model, "stages": stages, "output_dir": str(tmp_path / "run")}
    small |= {"data": {**recipe["data"], "global_batch_size": 4, "fraction": 0.5}, "log": {"every_samples": 4}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small))
    main(["pretrain", "--config", str(tmp_path / "recipe.yaml")])
    seen = [record["stage"] for record in metrics(tmp_path / "run") if "loss" in record]
    assert list(dict.fromkeys(seen)) == ["small", "masked", "tuned"]
    assert "small (112 x 112 pixels)" in (tmp_path / "run/model/README.md").read_text()
    assert json.loads((tmp_path / "run/model/config.json").read_text())["vision_config"]["image_size"] == 224
