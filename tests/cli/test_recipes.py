"""Every recipe of the package parses, plans, and comes back from its own YAML."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from flipscale.cli import main
from flipscale.objectives.build_objective import build_config
from flipscale.recipe.augment import AugmentRecipe
from flipscale.recipe.files import RECIPES
from flipscale.recipe.recipe import differences, parse_fields, to_yaml
from flipscale.recipe.schedule import schedule_stages
from flipscale.start.complete_recipe import parse_recipe

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


def test_the_verb_lists_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : lines.index("")]] == sorted(file.stem for file in RECIPES.glob("*"))


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


@pytest.mark.parametrize(
    ("name", "peak"),
    [("b16_laion400m", 1.024e-3), ("h14_laion400m", 1.024e-3), ("l16_laion2b", 5.12e-4), ("h14_laion2b", 5.12e-4)],
)
def test_the_paper_s_pre_training(name: str, peak: float) -> None:
    recipe = parse_recipe(["--config", name])
    stages = schedule_stages(recipe.stages, recipe.data.global_batch_size)
    assert [stage.peak_lr for stage in stages] == pytest.approx([peak, 1.024e-5])
    assert [stage.mask_ratio for stage in stages] == [0.5, 0.0]


@pytest.mark.parametrize(
    ("name", "samples", "epochs", "warmup", "batch", "peak", "decay"),
    [
        ("finetune_l16_imagenet", 1_281_167, 50, 5, 1024, 2e-4, 0.05),
        ("caption_coco_l16", 113_287, 20, 3, 256, 1e-4, 0.01),
        ("vqa_v2_l16", 443_757, 20, 3, 256, 1e-4, 0.01),
    ],
)
def test_the_paper_s_fine_tuning(
    name: str, samples: int, epochs: int, warmup: int, batch: int, peak: float, decay: float
) -> None:
    recipe = parse_recipe(["--config", name])
    (stage,) = schedule_stages(recipe.stages, recipe.data.global_batch_size)
    steps = samples / batch
    assert (stage.last, stage.warmup) == (pytest.approx(epochs * steps, abs=1), pytest.approx(warmup * steps, abs=1))
    assert (recipe.data.global_batch_size, stage.mask_ratio, stage.peak_lr) == (batch, 0.0, pytest.approx(peak))
    optim, config = recipe.optim, build_config(recipe)
    assert optim.weight_decay == decay
    if name.startswith("finetune"):
        assert (optim.adam_beta1, optim.adam_beta2, optim.layer_decay) == (0.9, 0.999, 0.75)
        assert recipe.data.augment == AugmentRecipe("rand-m9-mstd0.5-inc1", 0.8, 1.0)
        assert recipe.loss.options == {"num_classes": 1000, "label_smoothing": 0.1}
        assert recipe.model.drop_path_rate == 0.2
    else:
        assert optim.tower_lr_ratio == pytest.approx(0.1)
        assert (config.vision_config.image_size, config.vision_config.position_size) == (512, 224)
        shapes = {"decoder_config": (384, 3, 6), "answer_config": (768, 4, 12)}
        (part,) = [part for part in shapes if getattr(config, part) is not None]
        shape = getattr(config, part)
        assert (shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads) == shapes[part]


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


def test_the_page_s_stages_of_two_image_sizes() -> None:
    page = (Path(__file__).parents[2] / "docs/training.md").read_text()
    (block,) = re.findall(r"```yaml\n(stages:.*?)```", page, re.DOTALL)
    recipe = parse_recipe(["--config", "b16_laion400m", "--stages", json.dumps(yaml.safe_load(block)["stages"])])
    stages = schedule_stages(recipe.stages, recipe.data.global_batch_size)
    assert [(stage.name, stage.image_size) for stage in stages] == [("small", 112), ("masked", None), ("tuned", None)]
    assert build_config(recipe).vision_config.image_size == 224
