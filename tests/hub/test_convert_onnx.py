"""Both towers as ONNX, run by onnxruntime."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoTokenizer

from flipscale import cli
from flipscale.hub import convert_onnx
from flipscale.hub.export import build_processor, export_model
from flipscale.model import FlipConfig, FlipModel, FlipProcessor

TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture
def save(tokenizer_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    def save(logit_bias: float | None = None, **text_fields: Any) -> Path:
        torch.manual_seed(0)
        config = FlipConfig(
            vision_config={**TOWER, "image_size": 32, "patch_size": 8},
            text_config={**TOWER, "vocab_size": 16, "max_position_embeddings": 8, **text_fields},
            projection_dim=16,
            logit_bias_init_value=logit_bias,
        )
        processor = build_processor(config, AutoTokenizer.from_pretrained(tokenizer_dir))
        return export_model(FlipModel(config), processor, tmp_path / "flip")

    return save


@pytest.mark.parametrize(
    "text", [{}, {"attend_to_padding": False, "pooling": "mean"}], ids=["as the original", "padding masked"]
)
def test_equal_embeddings(
    save: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    text: dict,
) -> None:
    if text:
        monkeypatch.setattr(convert_onnx, "_MAX_FILE_BYTES", 1000)
    folder, dst = save(-10.0 if text else None, **text), tmp_path / "onnx"
    cli.main(["convert", "onnx", str(folder), str(dst)])
    printed = capsys.readouterr().out
    assert f"{dst}/image_model.onnx: embeddings within " in printed
    assert f"{dst}/text_model.onnx: embeddings within " in printed
    assert (dst / "image_model.onnx.data").exists() == bool(text), "larger models have their weights beside them"
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
        scale = float(metadata["logit_scale"])
        times = f"logits are\n{scale!r} times their products{', plus -10.0' if text else ''}."
        assert times in (dst / "README.md").read_text()
        assert scale == pytest.approx(expected.logit_scale.item(), rel=1e-6)
    assert [given.name for given in session.get_inputs()] == ["input_ids", "attention_mask"][: 1 + bool(text)]


def test_a_file_that_differs_is_not_kept(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(convert_onnx, "TOLERANCE", 1e-12)
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert", "onnx", str(save()), str(tmp_path / "onnx")])
    assert caught.value.code == 1
    assert "more than 1e-12; nothing was written" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"flip"}


def test_a_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(ValueError, match="onnxscript is not installed"):
        convert_onnx.convert_to_onnx("flip", tmp_path / "onnx")
