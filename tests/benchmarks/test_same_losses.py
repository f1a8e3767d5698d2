"""Equal weights on equal batches have the losses of open_clip's own trainer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_tokenizer
from hub.test_convert_transformers import CLIP, SIGLIP, SIGLIP_TEXT, foreign

from benchmarks.same_losses import compare

assert foreign  # a fixture


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "loss", "mask_ratio"),
    [("clip", "infonce", 0.0), ("clip", "sigmoid", 0.5), ("siglip", "sigmoid", 0.0), ("siglip", "infonce", 0.5)],
)
def test_losses_are_open_clips(
    foreign: Callable[..., str], shards: Path, tmp_path: Path, family: str, loss: str, mask_ratio: float
) -> None:
    config = {**CLIP, "init_logit_bias": -10} if family == "clip" else json.loads(json.dumps(SIGLIP))
    if family == "siglip":
        words = write_tokenizer(tmp_path / "words", bos_token="<s>", eos_token="</s>")
        config["text_cfg"] = {**SIGLIP_TEXT, "hf_tokenizer_name": str(words)}
    name = foreign(config, f"{family}_{loss}").removeprefix("open_clip:")
    ours, theirs = compare(name, family, tmp_path, shards=str(shards), steps=20, loss=loss, mask_ratio=mask_ratio)
    assert len(ours) == 20
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours[-1] < ours[0] - 0.1
