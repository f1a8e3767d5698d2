"""One file of a folder of stored features: its first byte says which, and whether they are trained on, taught or made
into weights."""

import functools
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from conftest import write_tokenizer
from fuzz.shards import tar
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flipscale.data.captions import tokenise
from flipscale.data.features import ABOUT, PROBE, PrecomputedFeatures
from flipscale.data.samples import BadSample
from flipscale.data.sources.tar import TarSource
from flipscale.io.digests import weights_digest
from flipscale.preparation.sampling_weights import WeightOptions, make_weights
from flipscale.recipe.data import DataRecipe
from flipscale.recipe.model import ModelRecipe
from flipscale.recipe.optim import StageRecipe
from flipscale.recipe.recipe import Recipe
from flipscale.training.precomputed import embedded_by, open_features, open_teacher

_FILES = (ABOUT, "images/00000.npy", "texts/00000.npy")
_WIDTH, _SAMPLES, _CROPS = 4, 3, 2
_TRAINED, _TAUGHT, _WEIGHED = range(3)
_CONFIG = SimpleNamespace(
    vision_config=SimpleNamespace(image_size=16), caption_config=SimpleNamespace(max_position_embeddings=8)
)


@functools.cache
def _source() -> TarSource:
    folder = tempfile.mkdtemp()
    Path(folder, "0.tar").write_bytes(
        tar(0, *((f"{n}.{kind}", b"x") for n in range(_SAMPLES) for kind in ("jpg", "txt")))
    )
    return TarSource(folder)


@functools.cache
def _tokenizer() -> PreTrainedTokenizerBase:
    with tempfile.TemporaryDirectory() as folder:
        return AutoTokenizer.from_pretrained(write_tokenizer(Path(folder)))


@functools.cache
def _made(use: int) -> dict[str, bytes]:
    """The files of a folder that fits a use."""
    tokens = weights_digest([tokenise(_tokenizer(), [PROBE], 8)["input_ids"]])
    about: dict[str, Any] = {
        "model": "made", "model_digest": "0", "features": "embeds" if use == _TAUGHT else "pooled",
        "shards": _source().list.shards, "samples": _SAMPLES, "shards_digest": _source().contents_digest(in_order=True),
        "logit_scale": 20.0, "dtype": "float16", "computed_in": "no",
        "images": {"width": _WIDTH, "weights_digest": "1", "image_size": 16},
        "texts": {"width": _WIDTH, "weights_digest": "2", "tokens_digest": tokens},
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"images": (_SAMPLES, _WIDTH), "texts": (_SAMPLES, _WIDTH)}
    if use == _TAUGHT:
        about["images"]["crops"] = {"count": _CROPS, "scale": [0.5, 1.0], "mirror": True, "seed": 0}
        shapes["images"] = (_SAMPLES, _CROPS, _WIDTH)
    files = {ABOUT: json.dumps(about).encode()}
    with tempfile.TemporaryDirectory() as folder:
        for tower, shape in shapes.items():
            rows = np.arange(1, 1 + np.prod(shape)).reshape(shape).astype(np.float16)
            rows[1] = np.nan
            np.save(f"{folder}/{tower}.npy", rows)
            files[f"{tower}/00000.npy"] = Path(folder, f"{tower}.npy").read_bytes()
    return files


def seeds() -> list[bytes]:
    """The good files of each use."""
    return [bytes([3 * use + n]) + _made(use)[name] for use in range(3) for n, name in enumerate(_FILES)]


def attack(data: bytes, folder: Path) -> None:
    """Open the folder and read all its rows. Those that are read are finite; or it is refused."""
    use, changed = divmod((data[:1] or b"\0")[0] % 9, 3)
    for number, (name, content) in enumerate(_made(use).items()):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data[1:] if number == changed else content)
    with suppress(ValueError, OSError):
        if use == _WEIGHED:
            options = WeightOptions(features=folder / "images", num_clusters=1)
            make_weights(_source(), "made", options, folder, 1)
            return
        recipe = _recipe(use, str(folder))
        if use == _TRAINED:
            opened = list(open_features(recipe, _source(), _CONFIG, _tokenizer()).values())
            embedded_by(recipe)
            _all_rows(opened)
        for teacher in [open_teacher(recipe, place, _source()) for place in recipe.data.teachers]:
            assert teacher.digest >= 0
            for number in range(_SAMPLES):
                with suppress(BadSample):
                    assert np.isfinite(teacher.logit_sides((0, number), 1)).all()


def _all_rows(opened: list[PrecomputedFeatures]) -> None:
    for features in opened:
        rows = features.rows(np.zeros(_SAMPLES, np.int64), np.arange(_SAMPLES))
        for number, row in enumerate(rows):
            try:
                assert (features.row((0, number)) == row).all()
                assert np.isfinite(row).all()
            except BadSample:
                assert np.isnan(row).all()


def _recipe(use: int, folder: str) -> Recipe:
    stored = {"teachers": [folder]} if use == _TAUGHT else {"image_features": folder, "text_features": folder}
    data, stages = DataRecipe(shards="made", **stored), [StageRecipe(name="one", samples=16, base_lr=0.1)]  # type: ignore[arg-type]
    return Recipe(model=ModelRecipe(init_from="made"), data=data, stages=stages)
