"""A Hub of the test's own, and commands that talk to it."""

import os
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from hub.loopback_hub import TOKEN, LoopbackHub
from PIL import Image


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    server = LoopbackHub()
    yield server
    server.close()


@pytest.fixture
def hub_environment(hub: LoopbackHub, tmp_path: Path) -> dict[str, str]:
    """What a command of its own process needs to talk to `hub`, logged in."""
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
