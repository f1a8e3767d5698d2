"""`flipscale prepare embed --compare`: the number of the definition, its sample, and what is refused."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from flipscale.cli import main
from flipscale.io.command_line import parse_command
from flipscale.io.errors import UserError
from flipscale.preparation.tower_similarity import compare_towers, linear_cka
from flipscale.prepare import Embed

SIZES = (30, 0, 41, 12)
BAD = {"images": 5, "texts": 74}  # rows that could not be embedded
DIGEST = "0123456789abcdef"


def store(folder: Path, sizes: Sequence[int] = SIZES, **towers: np.ndarray) -> dict[str, Path]:
    """Store features as `prepare embed` does, and return the folder of each tower."""
    about = {"features": "pooled", "model_digest": DIGEST, "shards": "data", "samples": sum(sizes)}
    about |= {"shards_digest": f"of {len(sizes)} shards"}
    for tower, rows in towers.items():
        about[tower] = {"width": rows.shape[1], "weights_digest": DIGEST}
        (folder / tower).mkdir(parents=True)
        for shard, part in enumerate(np.split(rows, np.cumsum(sizes)[:-1])):
            np.save(folder / tower / f"{shard:05d}.npy", part)
    (folder / "features.json").write_text(json.dumps(about))
    return {tower: folder / tower for tower in towers}


def features(n: int = sum(SIZES)) -> tuple[np.ndarray, np.ndarray]:
    """Return two towers' features with a common part, and means that are not 0."""
    draw = np.random.default_rng(0).normal
    common = draw(size=(n, 6))
    images, texts = (common @ draw(size=(6, width)) + draw(size=(n, width)) + 3.0 for width in (24, 9))
    return images.astype(np.float16), texts.astype(np.float16)


def by_definition(first: np.ndarray, second: np.ndarray) -> float:
    """Return CKA by Gram matrices: equation 5 of Song et al. for HSIC."""
    n = len(first)
    ones = torch.ones(n, dtype=torch.float64)

    def hsic(k: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        middle = (ones @ k @ ones) * (ones @ other @ ones) / ((n - 1) * (n - 2))
        return (torch.trace(k @ other) + middle - 2 / (n - 2) * (ones @ k @ other @ ones)) / (n * (n - 3))

    grams = [torch.from_numpy(rows.astype(np.float64)) for rows in (first, second)]
    k, other = (rows @ rows.T for rows in grams)
    k.fill_diagonal_(0), other.fill_diagonal_(0)
    return (hsic(k, other) / (hsic(k, k) * hsic(other, other)).sqrt()).item()


def test_the_number_is_the_definition_s() -> None:
    images, texts = features()
    assert linear_cka(images, texts) == pytest.approx(by_definition(images, texts), abs=1e-9)
    assert 0.2 < linear_cka(images, texts) < 0.9
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(24, 24)))[0]
    assert linear_cka(images, 5 * images.astype(np.float64) @ rotation + 1) == pytest.approx(1, abs=1e-9)
    apart = [linear_cka(images, np.random.default_rng(seed).normal(size=images.shape)) for seed in range(30)]
    assert abs(np.mean(apart)) < 0.02  # the biased estimate gives 0.4
    assert min(apart) < 0


def test_features_of_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of NaN are left out. The towers may lie in one folder or in two."""
    images, texts = features()
    images[BAD["images"]], texts[BAD["texts"]] = np.nan, np.nan
    paths = store(tmp_path / "a", images=images) | store(tmp_path / "b", texts=texts)
    main(["prepare", "embed", "--compare", str(paths["images"]), str(paths["texts"])])
    usable = np.delete(np.arange(sum(SIZES)), [*BAD.values()])
    expected = by_definition(images[usable], texts[usable])
    assert capsys.readouterr().out == f"CKA of {paths['images']} and {paths['texts']}: {expected:.4f} (81 pairs)\n"
    both = store(tmp_path / "both", images=images, texts=texts)
    assert compare_towers(both["images"], both["texts"]) == (pytest.approx(expected, abs=1e-9), 81)
    assert compare_towers(both["texts"], both["texts"]) == (pytest.approx(1), 82)
    assert compare_towers(both["images"], both["texts"], 50)[1] == 50


def test_refused(tmp_path: Path) -> None:
    images, texts = features()
    paths = store(tmp_path / "a", images=images, texts=texts)
    others = store(tmp_path / "b", (83,), images=images)
    crops = store(tmp_path / "c", images=images, texts=texts)["texts"]
    about = json.loads((tmp_path / "c/features.json").read_text())
    about["texts"]["crops"] = {"count": 2, "scale": [0.5, 1.0], "mirror": False, "seed": 0}
    (tmp_path / "c/features.json").write_text(json.dumps(about))
    few = store(tmp_path / "d", (3,), images=images[:3], texts=texts[:3])
    for first, second, message in (
        (paths["images"], crops, "c/texts; expected features of the same shards in order, embedded without --crops"),
        (paths["images"], others["images"], "b/images; expected features of the same shards in order"),
        (few["images"], few["texts"], "have 3 pairs in common; CKA needs 4"),
        (paths["images"], tmp_path / "a/text", "--compare is .*a/text; expected stored features, FOLDER/"),
    ):
        with pytest.raises(UserError, match=message):
            compare_towers(first, second)
    with pytest.raises(UserError, match="embed needs --model MODEL, or --compare"):
        parse_command(Embed, ["data", "out"]).run()
