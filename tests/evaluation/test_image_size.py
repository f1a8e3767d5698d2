"""Evaluations at another image size than the model's: what is seen, what is recorded, and what cannot be."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import changed_recipe
from evaluation.tiny_model import pixels_of

from flipscale.cli import main
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.model_results import evaluate_model
from flipscale.evaluation.results import as_metrics
from flipscale.evaluation.suite import build_tasks, check_image_sizes, run_tasks
from flipscale.start.complete_recipe import parse_recipe


def test_images_of_another_size(embedder: Embedder, shards: Path) -> None:
    source, pixels, model = TarSource(str(shards)), pixels_of(embedder, shards, 48), embedder.model
    found, pooled = embedder.at(48).images(source), embedder.at(48).images(source, "pooled")
    for row in (0, 29):
        seen = {"pixel_values": pixels[row, None], "interpolate_pos_encoding": True}
        with torch.no_grad():
            embeds = model.get_image_features(**seen).pooler_output[0]
            assert (pooled[row] - model.vision_model(**seen).pooler_output[0]).abs().max() < 1e-5
        assert (found[row] - embeds / embeds.norm()).abs().max() < 1e-6
    own = embedder.images(source)
    assert torch.equal(embedder.at(32).images(source), own), "the model's own size, named"
    assert (found - own).abs().max() > 1e-3


def test_a_task_has_a_size_of_its_own(embedder: Embedder, shards: Path, tmp_path: Path) -> None:
    listed = [{"kind": "zero_shot", "data": str(shards)}, {"kind": "retrieval", "data": str(shards)}]
    small = [{**task, "name": f"{task['kind']}_16", "image_size": 16} for task in listed]
    tasks = build_tasks([*listed, *small])
    lines = evaluate_model(embedder, "tiny", tmp_path / "results.jsonl", tasks)
    expected = {
        **as_metrics(run_tasks(embedder, tasks[:2])),
        **as_metrics(run_tasks(embedder.at(16), build_tasks([{**t, "image_size": None} for t in small]))),
    }
    assert as_metrics(line.result for line in lines) == expected
    sizes = {line.result.task: (line.about["image_size"], line.result.made_by.get("image_size")) for line in lines}
    assert sizes == {
        "zero_shot": (32, None), "retrieval": (32, None), "zero_shot_16": (16, 16), "retrieval_16": (16, 16),
    }  # fmt: skip


@pytest.mark.long
def test_a_run_evaluates_at_the_size_of_its_last_stage(recipe: dict, shards: Path, tmp_path: Path) -> None:
    stages = [{"name": "small", "samples": 32, "image_size": 16, "base_lr": 0.01}]
    tasks = [
        {"kind": "zero_shot", "data": str(shards), "image_size": 16},
        {"kind": "zero_shot", "data": str(shards), "name": "whole"},
    ]
    content = changed_recipe({**recipe, "stages": stages, "output_dir": str(tmp_path / "run")}, {})
    words = [f"--{name}={json.dumps(value)}" for name, value in content.items() if name != "output_dir"]
    evaluated = json.dumps({"tasks": tasks, "num_workers": 0})
    AcceleratorState._reset_state(reset_partial_state=True)
    main(["pretrain", *words, f"--eval={evaluated}", "--output_dir", str(tmp_path / "run")])
    AcceleratorState._reset_state(reset_partial_state=True)
    lines = [json.loads(line) for line in (tmp_path / "run/results.jsonl").read_text().splitlines()]
    assert {line["task"]: line["made_by"].get("image_size") for line in lines} == {"zero_shot": 16, "whole": None}


def test_sizes_that_cannot_be(embedder: Embedder, recipe: dict, shards: Path) -> None:
    with pytest.raises(ValueError, match="image_size 20 is not divisible by patch_size 8; use 16 or 24"):
        embedder.at(20)

    class Other(Embedder):
        @property
        def image_size(self) -> int:
            return 224

    other = Other(embedder.model, embedder.tokenizer, embedder.accelerator, name="hf:clip")
    with pytest.raises(ValueError, match="hf:clip takes images of 224 pixels; an image_size is for flipscale's"):
        other.at(32)
    with pytest.raises(ValueError, match=r"eval.tasks\[0\].image_size is 0; it must be at least 1 and at most 16,384"):
        build_tasks([{"kind": "zero_shot", "data": str(shards), "image_size": 0}])
    words = [f"--{name}={json.dumps(value)}" for name, value in recipe.items()]
    tasks = json.dumps({"tasks": [{"kind": "zero_shot", "data": str(shards), "image_size": 20}]})
    with pytest.raises(ValueError, match=r"eval\.tasks: zero_shot: image_size 20 is not divisible by patch_size 8"):
        check_image_sizes(parse_recipe([*words, f"--eval={tasks}"]).eval, 8)
