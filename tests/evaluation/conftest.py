"""The model and the accelerator that tests of evaluations share."""

from pathlib import Path

import pytest
from accelerate import Accelerator
from evaluation.tiny_model import tiny_embedder

from flipscale.evaluation.embedding import Embedder


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def embedder(tokenizer_dir: Path) -> Embedder:
    return tiny_embedder(tokenizer_dir, batch_size=7)
