"""The model card: numbers of the run's files, unknown facts left out, readable by the Hub's own reader."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from flipscale.evaluation.results import Result, append_results
from flipscale.hub.card import read_audit, write_card
from flipscale.recipe.recipe import to_yaml
from flipscale.start.complete_recipe import parse_recipe

pytestmark = pytest.mark.usefixtures("real_figures")

# Numbers that occur once each, so that none can stand for another.
RECORDS = [
    {"step": 11, "samples_seen": 176, "trained_seconds": 4321.5, "loss": 7.125, "images_per_s": 88.75},
    {"step": 23, "samples_seen": 368, "trained_seconds": 9876.5, "loss": 3.375},
]
ENVIRONMENT = {
    "flipscale": "0.1.0",
    "mixed_precision": "bf16",
    "num_parameters": 413_246_912,
    "data_samples": 407_332_084,
}
STARTS = [
    {"step": 0, "time": 1.7e9, "trained_seconds": 0.0, "num_processes": 48, "device": "NVIDIA H100 80GB HBM3"},
    {"step": 11, "time": 1.8e9, "trained_seconds": 4321.5, "num_processes": 32, "device": "NVIDIA H100 80GB HBM3",
     "last_sign_before": 1.7e9 + 4321.5},
]  # fmt: skip
HEARTBEAT = {"time": 1.8e9 + 5555, "step": 23, "phase": "the export", "step_s": 1.5}
# The first start went on until step 17; what it did after step 11 was lost, and its energy spent.
ENERGY = [
    {"start": 1, "step": 11, "energy_kwh": 20.25, "energy_parts": {"GPUs": 19.0, "processors": 1.25}},
    {"start": 1, "step": 17, "energy_kwh": 31.375, "energy_parts": {"GPUs": 30.0, "processors": 1.375}},
    {"start": 2, "step": 11, "energy_kwh": 3.5, "energy_parts": {"GPUs": 3.25, "processors": 0.25}},
    {"start": 2, "step": 23, "energy_kwh": 30.125, "energy_parts": {"GPUs": 29.0, "processors": 1.125}},
]
COST = {"device_hour_dollars": 2.85, "kwh_co2_grams": 373.0, "pue": 1.13}
IMAGENET, FLICKR = {"data": "data/imagenet1k_val"}, {"data": "/mnt/secret/flickr30k/test"}
MEASURED = [
    Result("zero_shot", "zero_shot", "top1", 47.13, chance=0.0613, made_by=IMAGENET),
    Result("zero_shot", "zero_shot", "top5", 82.79, made_by=IMAGENET),
    Result("retrieval", "retrieval", "text_to_image_r1", 39.37, made_by=FLICKR),
    Result("zero_shot", "zero_shot", "top1", 44.91, who="nearest image, HOG", made_by=IMAGENET),
]


@pytest.fixture
def run_dir(write_recipe, tmp_path: Path) -> Path:
    """A finished run's files, and its model folder without weights."""
    folder = tmp_path / "runs" / "l16"
    (folder / "model").mkdir(parents=True)
    changes = {"hub": {"license": "apache-2.0"}, "cost": COST}
    recipe = parse_recipe(["--config", str(write_recipe(folder, **changes))])
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    (folder / "model" / "config.json").write_text(json.dumps(recipe.model.config().to_dict()))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (folder / "heartbeat.json").write_text(json.dumps(HEARTBEAT))
    for name, records in (("starts", STARTS), ("metrics", RECORDS), ("energy", ENERGY)):
        write_lines(folder / f"{name}.jsonl", records)
    append_results(folder, MEASURED, 23, 368, 9876.5)
    return folder


def write_lines(file: Path, records: list[dict]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def card_of(run_dir: Path, step: int | None = None) -> str:
    write_card(run_dir / "model", run_dir, "org/flip-l16", step)
    return (run_dir / "model" / "README.md").read_text()


def test_facts_of_the_run(run_dir: Path) -> None:
    card = card_of(run_dir)
    assert card.partition("# ")[2].startswith("flip-l16\n")
    results = ("| this model | 47.1 %", "| nearest image, HOG | 44.9 %", "`flickr30k/test` | text to image R@1")
    length = ("413.2 M parameters", "407,332,084", "2.7 h", "48 x NVIDIA H100 80GB HBM3, then 32 x NVIDIA H100")
    # (4321.5 s x 48 + 5555 s x 32) / 3600 x 2.85
    spent = ("61.50 kWh, measured: GPUs and processors", "25.92 kg of CO2", "305 dollars")
    for words in (*results, *length, *spent, "](figures/loss.png)"):
        assert words in card, words
    assert "figures/zero_shot.png" not in card, "one point is no curve"
    assert (run_dir / "model/figures/loss.png").stat().st_size > 10_000
    assert "secret" not in card
    assert str(run_dir) not in card
    write_lines(run_dir / "energy.jsonl", [{**ENERGY[1], "failed": True}])
    assert "CO2" not in card_of(run_dir), "one start lacks its energy"


def test_unknown_facts_are_left_out(run_dir: Path) -> None:
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    recipe.update(hub={}, cost={})
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run_dir / "environment.json").write_text('{"flipscale": "0.1.0", "mixed_precision": "no"}')
    for name in ("starts", "energy", "results"):
        (run_dir / f"{name}.jsonl").unlink()
    write_lines(run_dir / "metrics.jsonl", [{**RECORDS[0], "trained_seconds": 432.5, "images_per_s": None}])
    card = card_of(run_dir, step=11)
    for absent in ("kWh", "CO2", "dollars", "hardware", "parameters;", "figures/", "model-index", "license", "None"):
        assert absent not in card, absent
    assert "Not evaluated." in card
    assert "step 11 of 40" in card
    ModelCard(card)


@pytest.mark.usefixtures("logged_in")
def test_the_hub_reads_it(run_dir: Path) -> None:
    card_of(run_dir)
    card = ModelCard.load(run_dir / "model" / "README.md")
    card.validate()
    data = card.data
    assert (data.license, data.pipeline_tag) == ("apache-2.0", "zero-shot-image-classification")
    assert data.model_name == "flip-l16"
    found = [(r.task_type, r.dataset_name, r.metric_type, r.metric_name, r.metric_value) for r in data.eval_results]
    assert found == [
        ("zero-shot-image-classification", "imagenet1k_val", "accuracy", "top-1, %", 47.13),
        ("zero-shot-image-classification", "imagenet1k_val", "accuracy", "top-5, %", 82.79),
        ("image-text-retrieval", "flickr30k/test", "recall", "text to image R@1, %", 39.37),
    ]


def test_a_run_in_the_current_folder_has_its_name(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir)
    write_card(Path("model"), Path(), "model")
    assert "\n# l16\n" in Path("model/README.md").read_text()


def test_a_fine_tuned_model_names_its_start_and_no_mask(run_dir: Path) -> None:
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    recipe["stages"][0]["mask_ratio"] = 0.5
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    card = card_of(run_dir)
    assert "Trained by masking" in card
    assert "named above and from nothing else" in card
    recipe["stages"][0]["mask_ratio"], recipe["model"]["init_from"] = 0, "org/clip"
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    card = card_of(run_dir)
    assert "Fine-tuned from `org/clip`" in card
    assert "began with the weights of `org/clip`" in card
    for absent in ("by masking", "random mask", "nothing else"):
        assert absent not in card, absent


def test_sources_of_a_mixture(run_dir: Path) -> None:
    sources = [
        {"shards": "s3://key:word@bucket/laion2b/{00000..41407}.tar", "weight": 0.75},
        {"dataset": "/mnt/private/cc12m", "image_column": "jpg", "caption_columns": ["alt", "a|b"], "weight": 0.25},
        {"dataset": "org/pairs", "config": "en", "weight": 0.5},
    ]
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    recipe["data"].update(shards="", sources=sources, cache_dir="/mnt/private/cache", tokenizer="/mnt/private/words")
    recipe["model"].update(init_from="/mnt/private/first", compile=True)
    (run_dir / "new.yaml").write_text(yaml.safe_dump(recipe))
    (run_dir / "recipe.yaml").write_text(to_yaml(parse_recipe(["--config", str(run_dir / "new.yaml")])))
    card = card_of(run_dir)
    (row,) = (line for line in card.splitlines() if line.startswith("| training data |"))
    assert "`laion2b` (weight 0.75); `cc12m` (weight 0.25, split `train`, images from `jpg`, captions from `alt`" in row
    assert "and `a\\|b`)" in row, "a bar would end the cell"
    assert "`org/pairs` (weight 0.5, config `en`" in row
    shown = yaml.safe_load(card.partition("```yaml")[2].partition("```")[0])
    assert shown["data"]["tokenizer"] == "words"
    assert shown["data"]["sources"][0]["weight"] == 0.75
    assert shown["model"]["init_from"] == "first"
    for absent in ("private", "key:word", "bucket", "cache", "compile", "micro_batch_size", "exchange", "shards:"):
        assert absent not in card, absent


# What `flipscale prepare audit` writes, as far as the card reads it.
AUDIT = {
    "samples": ENVIRONMENT["data_samples"],
    "unusable": {"undecodable_image": {"count": 1_213}, "missing_caption": {"count": 3_519}},
    "captions": {"captions": 407_331_013, "distinct": 291_117_219},
    "languages": {
        "long_letters": 25,
        "long": {"captions": 2_110, "languages": [{"language": "English", "share": 0.8}]},
    },
    "gender": {
        **{"women": 8_121_337, "men": 9_191_551, "both": 617_933},
        "occupations": [{"occupation": "nurse", "captions": 9_787, "with_women": 7_673, "with_men": 1_489}],
    },
    "countries": {"rows": [{"name": "India", "captions": 65_537}]},
    "images": {"exact_copies": 11_777_999, "near_copies": 21_313_131},
    "tests": [{"name": "imagenet1k", "images": 50_021, "exact": 271, "near": 1_031}],
}


def test_audit(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, recipe = run_dir / "audit.json", yaml.safe_load((run_dir / "recipe.yaml").read_text())
    recipe["hub"]["audit"] = str(file)
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    file.write_text(json.dumps(AUDIT))
    card = card_of(run_dir)
    for number in ("407,331,013", "291,117,219", "11,777,999", "4,732", "English 80.0%", "7,673", "1,302", "50,021"):
        assert number in card, number
    assert str(run_dir) not in card
    file.write_text(json.dumps({**AUDIT, "samples": 17}))
    assert "in the training data" not in card_of(run_dir)
    assert "hub.audit has 17 samples" in caplog.text
    file.write_text("{}")
    assert "in the training data" not in card_of(run_dir)
    with pytest.raises(ValueError, match=r"hub.audit is .*audit.json"):
        read_audit(str(file))
