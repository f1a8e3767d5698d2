"""The race of packed and padded captions, at a tiny size."""

import json

import pytest
from conftest import TOWER

from benchmarks import captions
from flipscale.model.families import config_class


def test_packed_captions_take_fewer_rows_at_equal_losses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {**TOWER, "max_position_embeddings": 77, "vocab_size": 50, "eos_token_id": 3, "bos_token_id": None}
    tiny = config_class("clip").from_size("s16", {**TOWER, "image_size": 32, "patch_size": 8}, text)
    monkeypatch.setattr(captions, "VOCABULARY", 50)
    monkeypatch.setattr(type(tiny), "from_size", classmethod(lambda *_: tiny))
    captions.main(["--batch_size", "48", "--num_steps", "3"])
    figures = json.loads(capsys.readouterr().out)
    assert 0.4 * 48 < figures["rows"] < 0.6 * 48
    assert figures["loss_difference"] < 1e-6
    assert figures["ratio"] == pytest.approx(figures["padded_s"] / figures["packed_s"])
