"""A Hub of the test's own, commands that talk to it, and a small exported model."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from hub.loopback_hub import TOKEN, LoopbackHub
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flipscale.hub.export import build_processor, export_model
from flipscale.model import FlipConfig, FlipModel


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    server = LoopbackHub()
    yield server
    server.close()


@pytest.fixture
def hub_environment(hub: LoopbackHub, tmp_path: Path) -> dict[str, str]:
    """What a command in its own process needs to talk to `hub`, logged in."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_TOKEN": TOKEN,
    }


@pytest.fixture
def logged_in(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process talks to `hub`, logged in, with no login stored anywhere."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    files = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_login"))
    monkeypatch.setitem(os.environ, "HF_TOKEN", TOKEN)


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smooth picture, for which both image backends give nearly the same pixels."""
    path = tmp_path_factory.mktemp("image") / "image.png"
    rows, columns = np.mgrid[0:40, 0:60]
    Image.fromarray(np.stack([rows * 6, columns * 4, rows + columns], axis=2).astype(np.uint8)).save(path)
    return path


TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def small_model(seed: int = 0, logit_bias: float | None = None, **text_fields: Any) -> FlipModel:
    config = FlipConfig(
        vision_config={**TOWER, "image_size": 32, "patch_size": 8},
        text_config={**TOWER, "vocab_size": 16, "max_position_embeddings": 8, **text_fields},
        projection_dim=16,
        logit_bias_init_value=logit_bias,
    )
    torch.manual_seed(seed)
    return FlipModel(config).eval()


def export_small(tokenizer: PreTrainedTokenizerBase | Path, folder: Path, **fields: Any) -> Path:
    """Export `small_model(**fields)`."""
    model = small_model(**fields)
    words = AutoTokenizer.from_pretrained(tokenizer) if isinstance(tokenizer, Path) else tokenizer
    return export_model(model, build_processor(model.config, words), folder)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="session")
def folder(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_small(tokenizer, tmp_path_factory.mktemp("hub") / "model")
