"""The exported folder, used without flipscale."""

import json
import os
import shutil
import subprocess
import venv
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from hub.conftest import export_small, small_model
from packaging.requirements import Requirement
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, pipeline
from transformers.utils import logging

from flipscale.hub.export import build_processor, export_model
from flipscale.model import (
    FlipModel,
    FlipPreTrainedModel,
    FlipProcessor,
    FlipTextModelWithProjection,
    FlipVisionModel,
    modeling_flip,
)

LABELS = ["red disc", "a green ring", "blue"]

# Runs in an environment without flipscale and prints its results as JSON.
STRANGER = """
import importlib.util, json, sys
assert importlib.util.find_spec("flipscale") is None
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoProcessor, pipeline
from transformers import AutoModelForZeroShotImageClassification
folder, image, *labels = sys.argv[1:]
image = Image.open(image)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=image, text=labels, return_tensors="pt")
scores = {}
for name, auto in (("model", AutoModel), ("zero_shot", AutoModelForZeroShotImageClassification)):
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        scores[name] = model(**inputs).logits_per_image.softmax(-1)[0].tolist()
classifier = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
for name, value in classifier.vision_model.state_dict().items():
    assert torch.equal(value, model.vision_model.state_dict()[name]), name
classify = pipeline("zero-shot-image-classification", model=folder, trust_remote_code=True)
by_label = {s["label"]: s["score"] for s in classify(image, candidate_labels=labels, hypothesis_template="{}")}
scores["pipeline"] = [by_label[label] for label in labels]
extract = pipeline("image-feature-extraction", model=folder, trust_remote_code=True)
with torch.no_grad():
    features = model.get_image_features(processor(images=image, return_tensors="pt")["pixel_values"])
pooled, tokens = (extract(image, pool=pool, return_tensors=True) for pool in (True, False))
assert torch.allclose(pooled, features.pooler_output, atol=1e-6)
assert torch.allclose(tokens, features.last_hidden_state, atol=1e-6)
print(json.dumps({
    "scores": scores,
    "length": inputs["input_ids"].shape[1],
    "backend": type(processor.image_processor).__name__,
    "torchvision": importlib.util.find_spec("torchvision") is not None,
    "model_type": config.model_type,
}))
"""


def environment_of(path: Path, *packages: str) -> Path:
    """The interpreter of a new virtual environment with links to these packages and their requirements, no others."""
    venv.create(path, symlinks=True)
    here = next(path.glob("lib/python*/site-packages"))
    waiting, seen = list(packages), set()
    while waiting:
        name = waiting.pop()
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue  # required on another system or Python only
        if package.name in seen:
            continue
        seen.add(package.name)
        required = (Requirement(text) for text in package.requires or ())
        waiting += [r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
        for entry in {file.parts[0] for file in package.files or () if file.parts[0] != ".."}:
            if not (here / entry).exists():
                (here / entry).symlink_to(package.locate_file(entry))
    return path / "bin" / "python"


def run_stranger(python: Path, code: str, folder: Path, *arguments: str | Path) -> dict:
    """Runs code offline and without flipscale, and returns the JSON that it prints."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    home = folder.parent / "home"
    done = subprocess.run(
        [python, "-I", "-c", code, folder, *arguments],
        cwd=folder.parent,
        env={**kept, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def direct_scores(folder: Path, image: Path) -> list[float]:
    model, processor = FlipModel.from_pretrained(folder).eval(), FlipProcessor.from_pretrained(folder)
    inputs = processor(images=Image.open(image), text=LABELS, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits_per_image.softmax(-1)[0].tolist()


@pytest.mark.parametrize("images", ["pillow", pytest.param("torchvision", marks=pytest.mark.long)])
def test_folder_without_flipscale(folder: Path, image: Path, tmp_path: Path, images: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    python = environment_of(tmp_path / "venv", "torch", "transformers", images)
    seen = run_stranger(python, STRANGER, copy, image, *LABELS)
    assert seen["model_type"] == "flip"
    assert seen["length"] == 8
    assert seen["torchvision"] == (images == "torchvision")
    if not seen["torchvision"]:
        assert seen["backend"] == "CLIPImageProcessorPil"
    scores = seen["scores"]
    assert scores["zero_shot"] == pytest.approx(scores["model"], abs=1e-6)
    assert scores["pipeline"] == pytest.approx(scores["model"], abs=1e-6)
    assert scores["model"] == pytest.approx(direct_scores(folder, image), abs=2e-3)


@pytest.mark.parametrize("attends", [True, False])
@pytest.mark.parametrize("ends", [True, False])
def test_pipeline_cuts_long_texts(
    tokenizer_dir: Path, caption_tokenizer: Path, image: Path, tmp_path: Path, ends: bool, attends: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    words = AutoTokenizer.from_pretrained(caption_tokenizer if ends else tokenizer_dir)
    if ends:
        both = [("<s>", words.bos_token_id), ("</s>", words.eos_token_id)]
        words.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=both)
    folder = export_small(words, tmp_path / "model", attend_to_padding=attends)
    classify = pipeline("zero-shot-image-classification", model=str(folder), device="cpu")
    # The last words are the same, so nothing but the configuration tells them from an end token.
    labels = ["red disc", "green " * 5 + "ring", "blue " * 2, "a " * 3, "the " * 9]
    logging.get_logger("transformers").addHandler(caplog.handler)
    modeling_flip._log.warning_once.cache_clear()
    for template in ({}, {"hypothesis_template": "a {} the"}):
        with torch.no_grad():
            found = [classify(str(image), candidate_labels=labels, **template) for _ in range(2)][1]
            expected = classify(str(image), candidate_labels=labels, tokenizer_kwargs={"truncation": True}, **template)
        assert found == expected
    logging.get_logger("transformers").removeHandler(caplog.handler)
    assert sum("more than 8 tokens" in record.getMessage() for record in caplog.records) == 1


def test_a_share_needs_a_model_to_mix_with(refused: Callable[..., str], tmp_path: Path) -> None:
    for other in ([], ["--adapter"]):
        assert "--alpha is [0.3]" in refused("export", tmp_path, "--alpha", "0.3", *other)


def test_files_of_a_folder(folder: Path, tmp_path: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "config_sentence_transformers.json", "configuration_flip.py", "model.bf16.safetensors"),
        *("model.safetensors", "modeling_flip.py", "modules.json", "patches.py", "processing_flip.py"),
        *("processor_config.json", "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json"),
    }
    # sentence-transformers would pad to the longest caption of a batch, and padding is part of the text.
    config = json.loads((folder / "sentence_bert_config.json").read_text())
    assert config["processing_kwargs"] == {"text": {"padding": "max_length", "truncation": True}}
    FlipModel.from_pretrained(folder).save_pretrained(tmp_path)
    assert (tmp_path / "modeling_flip.py").read_bytes() == (folder / "modeling_flip.py").read_bytes()


def test_an_older_model_is_replaced_whole(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model, out = small_model(), tmp_path / "model"
    export_model(model, None, out)
    assert not (out / "modules.json").exists()
    (out / "model-00001-of-00002.safetensors").touch()
    export_model(model, build_processor(model.config, tokenizer), out)
    assert not (out / "model-00001-of-00002.safetensors").exists()
    assert (out / "processor_config.json").exists()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"model holds notes\.txt"):
        export_model(model, None, out)
    (out / "notes.txt").unlink()
    with pytest.raises(ValueError, match="exists and is not a model folder of flipscale"):
        export_model(model, None, tmp_path)
    before = (out / "model.safetensors").read_bytes()
    model.config.note = object()  # cannot be written as JSON
    with pytest.raises(TypeError):
        export_model(model, None, out)
    assert (out / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_processor(tokenizer: PreTrainedTokenizerBase) -> None:
    config = small_model().config
    processor = build_processor(config, tokenizer)
    inputs = processor(images=Image.new("RGB", (70, 35), (124, 116, 104)), text="a red disc", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert inputs["pixel_values"].abs().max() < 0.02
    assert inputs["input_ids"].tolist()[0][3:] == [0] * 5
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]
    config.text_config.max_position_embeddings = 4
    processor = build_processor(config, tokenizer)
    assert processor(text="a red a red a red a red")["input_ids"] == tokenizer("a red a red")["input_ids"]
    assert tokenizer.model_max_length == 8


def test_a_tokenizer_of_another_model(tokenizer: PreTrainedTokenizerBase) -> None:
    config = small_model().config
    config.text_config.vocab_size = 5
    with pytest.raises(ValueError, match=r"12 entries.* vocab_size .*5"):
        build_processor(config, tokenizer)
    with pytest.raises(ValueError, match=r"pads with id 0.* pad_token_id 3"):
        build_processor(small_model(pad_token_id=3).config, tokenizer)


@pytest.mark.parametrize("tower", [FlipVisionModel, FlipTextModelWithProjection])
def test_a_tower_loads_from_the_whole_model(folder: Path, tower: type[FlipPreTrainedModel]) -> None:
    loaded, report = tower.from_pretrained(folder, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    whole = FlipModel.from_pretrained(folder).state_dict()
    prefix = "" if "WithProjection" in tower.__name__ else f"{tower.base_model_prefix}."
    assert all(torch.equal(value, whole[prefix + name]) for name, value in loaded.state_dict().items())
