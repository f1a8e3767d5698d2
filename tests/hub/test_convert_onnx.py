"""Both towers as ONNX, run by onnxruntime, as our processors and as Immich call them."""

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hub.conftest import export_small
from hub.native import LENGTH, export_native
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoModel, AutoProcessor

from flipscale import cli
from flipscale.evaluation.embedding import image_embeds, text_embeds
from flipscale.hub import convert_onnx
from flipscale.hub.push import check_to_push, split_own_files
from flipscale.model import FlipModel, FlipProcessor


@pytest.fixture
def save(tokenizer_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    return partial(export_small, tokenizer_dir, tmp_path / "flip")


@pytest.mark.parametrize(
    "text", [pytest.param({}, marks=pytest.mark.long), {"attend_to_padding": False, "pooling": "mean"}]
)
def test_equal_embeddings(
    save: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    text: dict,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else find(name))
    if text:
        monkeypatch.setattr(convert_onnx, "_MAX_FILE_BYTES", 1000)
    folder, dst = save(logit_bias=-10.0 if text else None, **text), tmp_path / "onnx"
    cli.main(["convert", "onnx", str(folder), str(dst)])
    assert "torchvision" not in capsys.readouterr().err + caplog.text
    assert (dst / "image_model.onnx.data").exists() == bool(text), "larger models have their weights next to them"
    inputs = FlipProcessor.from_pretrained(dst)(
        text=["a red disc", "the blue", "a", "grey"],
        images=list(np.zeros((4, 40, 50, 3), np.uint8)),
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = FlipModel.from_pretrained(folder).eval()(**inputs)
    for name in ("image", "text"):
        session = onnxruntime.InferenceSession(dst / f"{name}_model.onnx")
        feed = {given.name: inputs[given.name].numpy() for given in session.get_inputs()}
        (embeds,) = session.run([f"{name}_embeds"], feed)
        assert np.abs(embeds - expected[f"{name}_embeds"].numpy()).max() < 1e-5
        metadata = session.get_modelmeta().custom_metadata_map
        assert metadata.get("logit_bias") == ("-10.0" if text else None)
        assert float(metadata["logit_scale"]) == pytest.approx(expected.logit_scale.item(), rel=1e-6)
    assert [given.name for given in session.get_inputs()] == ["input_ids", "attention_mask"][: 1 + bool(text)]


def test_a_file_that_differs_is_not_kept(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_onnx, "TOLERANCE", 1e-12)
    with pytest.raises(FloatingPointError, match="more than 1e-12"):
        convert_onnx.convert_to_onnx(str(save()), tmp_path / "onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"flip"}


def immich_image(folder: Path, picture: Image.Image) -> dict[str, np.ndarray]:
    """Prepare a picture as Immich's OpenClipVisualEncoder does."""
    given = json.loads((folder / "visual/preprocess_cfg.json").read_text())
    size, resample = given["size"][0], Image.Resampling[given["interpolation"].upper()]
    picture = picture.convert("RGB")
    if given["resize_mode"] == "squash":
        picture = picture.resize((size, size), resample=resample)
    else:
        shorter = min(picture.size)
        picture = picture.resize([int(side / shorter * size) for side in picture.size], resample=resample)
        left, upper = (int(side / 2 - size / 2) for side in picture.size)
        picture = picture.crop((left, upper, left + size, upper + size))
    pixels = np.asarray(picture, np.float32) / 255.0
    mean, std = (np.array(given[name], np.float32) for name in ("mean", "std"))
    return {"image": ((pixels - mean) / std).transpose(2, 0, 1)[None]}


def immich_text(folder: Path, text: str) -> dict[str, np.ndarray]:
    """Prepare a search as Immich's OpenClipTextualEncoder does."""
    length = json.loads((folder / "config.json").read_text())["text_cfg"]["context_length"]
    pad = json.loads((folder / "textual/tokenizer_config.json").read_text())["pad_token"]
    tokenizer = Tokenizer.from_file(str(folder / "textual/tokenizer.json"))
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=length)
    return {"text": np.array([tokenizer.encode(" ".join(text.split())).ids], np.int32)}


@pytest.mark.parametrize(
    "family",
    [
        *(pytest.param(family, marks=pytest.mark.long) for family in ("siglip", "clip", "towers", "flip")),
        "flip without padding",
    ],
)
def test_immich_reads_the_folder(family: str, save: Callable[..., Path], image: Path, tmp_path: Path) -> None:
    folder = export_native(family, tmp_path / family) if family in LENGTH else save(attend_to_padding=family == "flip")
    dst = tmp_path / "onnx"
    cli.main(["convert", "onnx", str(folder), str(dst)])
    assert not split_own_files(dst)[1], "a push would leave these out"
    check_to_push(dst)
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(dst)
    visual, textual = (onnxruntime.InferenceSession(dst / f"{part}/model.onnx") for part in ("visual", "textual"))
    for picture in (Image.open(image), Image.open(image).rotate(90, expand=True)):
        found = visual.run(None, immich_image(dst, picture))[0][0]
        expected = image_embeds(model, processor, [picture])[0]
        assert np.abs(found - expected).max() < 1e-4
    for text in ("a red disc", "The  blue cat!", "some green bars and a grey cross " * 20):
        found = textual.run(None, immich_text(dst, text))[0][0]
        assert np.abs(found - text_embeds(model, processor, [text])[0]).max() < 1e-4, text


def test_a_tokenizer_that_immich_would_read_otherwise(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Immich takes no settings from tokenizer_config.json, such as the one by which special tokens are plain text."""
    folder = export_native("siglip", tmp_path)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "split_special_tokens": True}))
    monkeypatch.setattr(convert_onnx, "TEXTS", ["a red disc", "a <pad> disc"])
    assert "other ids than its tokenizer for 'a <pad> disc'" in refused("convert", "onnx", folder, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
