"""The association of roles with women or men, against its formula, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shards
from evaluation.tiny_model import tiny_embedder

from examples.demo.association import association
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import ClassifierEmbedder

COUPLES = [("red disc", 0, 1), ("red disc", 2, 3), ("blue bar", 5, 4), ("grey ring", 7, 9)]


def test_association_and_bad_roles(tokenizer_dir: Path, tmp_path: Path) -> None:
    write_shards(tmp_path, [11], seed=1)
    couples = [{"role": role, "artist": "a", "woman": woman, "man": man} for role, woman, man in COUPLES]
    (tmp_path / "roles.json").write_text(json.dumps(couples))
    embedder = tiny_embedder(tokenizer_dir, batch_size=32)
    with torch.no_grad():
        share, difference = association(embedder, tmp_path)
        images = embedder.images(TarSource(str(tmp_path)))
        texts = embedder.texts([role for role, _, _ in COUPLES])
    apart = np.array([float(texts[i] @ (images[m] - images[w])) for i, (_, w, m) in enumerate(COUPLES)])
    assert share.value == pytest.approx(np.mean(apart > 0))
    assert share.low <= share.value <= share.high
    assert difference.value == pytest.approx(apart.mean(), abs=1e-6)
    sums = np.array([apart[:2].sum(), apart[2], apart[3]]) - apart.mean() * np.array([2, 1, 1])
    half = 1.959964 * np.sqrt((sums**2).sum() * 3 / 2) / 4
    assert difference.high - difference.value == pytest.approx(half, rel=1e-4)
    with pytest.raises(ValueError, match="a classifier embeds no texts"):
        association(ClassifierEmbedder(embedder.model, None, embedder.accelerator, name="a classifier"), tmp_path)
    for content in ("{}", "[{}]", json.dumps([{"role": "a", "woman": 0, "man": 11}])):
        (tmp_path / "roles.json").write_text(content)
        with pytest.raises(ValueError, match=r"roles.json has no couples of rows of 11 pictures"):
            association(embedder, tmp_path)
