"""A small model and its inputs; and the markers that transformers' own common tests carry."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flipscale.model import FlipConfig, FlipModel


def pytest_configure(config: pytest.Config) -> None:
    """Names the markers, so that `--strict-markers` lets them in."""
    kinds = ("accelerate_tests", "generate", "slow", "torch_compile_test")
    for name in (*kinds, *(f"flash_attn{version}_test" for version in ("", "_3", "_4"))):
        config.addinivalue_line("markers", f"{name}: of transformers' common tests")


SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SHAPE, "hidden_size": 32, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
TEXT = {**SHAPE, "hidden_size": 24, "intermediate_size": 48, "vocab_size": 16, "max_position_embeddings": 8}


def _build(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **fields: Any) -> FlipModel:
    torch.manual_seed(0)
    config = FlipConfig(
        vision_config={**VISION, **(vision or {})}, text_config={**TEXT, **(text or {})}, projection_dim=20, **fields
    )
    return FlipModel(config).eval()


@pytest.fixture(scope="session")
def small() -> Callable[..., FlipModel]:
    """Builds the model; `small(vision, text, **fields)` overrides fields of a tower or of the whole."""
    return _build


@pytest.fixture
def model() -> FlipModel:
    return _build()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def captions() -> torch.Tensor:
    """Three captions of 5, 2 and 8 ids, padded with 0."""
    ids = torch.randint(1, 16, (3, 8), generator=torch.Generator().manual_seed(2))
    return ids * (torch.arange(8) < torch.tensor([[5], [2], [8]]))
