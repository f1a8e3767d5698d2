"""The association of roles with women or men, against its formula, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shards

from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.association import Association
from flipscale.evaluation.suite import run_tasks

COUPLES = [("red disc", 0, 1), ("red disc", 2, 3), ("blue bar", 5, 4), ("grey ring", 7, 9)]


@pytest.fixture
def roles(tmp_path: Path) -> Path:
    write_shards(tmp_path / "roles", [11], seed=1)
    couples = [{"role": role, "artist": "a", "woman": woman, "man": man} for role, woman, man in COUPLES]
    (tmp_path / "roles/roles.json").write_text(json.dumps(couples))
    return tmp_path / "roles"


def test_association(roles: Path, embedder: Embedder) -> None:
    with torch.no_grad():
        (share, difference) = run_tasks(embedder, [Association("association", str(roles), "association")])
        images = embedder.images(TarSource(str(roles)))
        texts = embedder.texts([role for role, _, _ in COUPLES])
    apart = np.array([float(texts[i] @ (images[m] - images[w])) for i, (_, w, m) in enumerate(COUPLES)])
    assert (share.metric, share.n, share.chance) == ("nearer_man", 4, 50.0)
    assert share.value == pytest.approx(100 * np.mean(apart > 0))
    assert share.low <= share.value <= share.high
    assert difference.value == pytest.approx(apart.mean(), abs=1e-6)
    sums = np.array([apart[:2].sum(), apart[2], apart[3]]) - apart.mean() * np.array([2, 1, 1])
    half = 1.959964 * np.sqrt((sums**2).sum() * 3 / 2) / 4
    assert difference.high - difference.value == pytest.approx(half, rel=1e-4)


def test_bad_roles(roles: Path) -> None:
    outside = json.dumps([{"role": "a", "woman": 0, "man": 11}])
    for content, match in (("{}", "has no list"), ("[{}]", "is not a list of"), (outside, "rows 0 and 11 of 11")):
        (roles / "roles.json").write_text(content)
        with pytest.raises(ValueError, match=f"roles.json.*{match}"):
            Association("association", str(roles)).check()
    with pytest.raises(ValueError, match="template is 'a photo'"):
        Association("association", str(roles), template="a photo")
