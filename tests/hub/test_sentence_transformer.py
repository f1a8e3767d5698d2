"""The exported folder in sentence-transformers, with and without flipscale and torchvision."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub.test_export import environment_of
from PIL import Image

from flipscale.evaluation.embedding import image_embeds, text_embeds
from flipscale.hub.export import build_processor
from flipscale.model import FlipModel, FlipProcessor

TEXTS = ["a red disc", "blue", "a green ring a a a a a a a a a", "the"]

# Runs in a process of its own and writes the embeddings of pictures and texts to `embeds.npz`.
USER = """
import importlib.util, sys
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
installed = importlib.util.find_spec("flipscale") is not None
if installed:
    from flipscale.model import FlipModel
folder, *pictures = sys.argv[1:]
model = SentenceTransformer(folder, device="cpu", trust_remote_code=not installed)
assert type(model[0].model).__module__.startswith("flipscale.") == installed
pictures, texts = [Image.open(picture) for picture in pictures], TEXTS
images, texts = model.encode(pictures, batch_size=3), model.encode(texts, batch_size=3)
similarity = model.similarity(images, texts)
assert np.abs(similarity.numpy() - images @ texts.T).max() < 1e-6
assert model.get_embedding_dimension() == images.shape[1]
np.savez("embeds.npz", images=images, texts=texts)
""".replace("TEXTS", repr(TEXTS))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Noise of several sizes in every mode that a PNG has, transparent ones last."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((40, 60), (32, 32), (90, 33))]
    clear = noise[2].convert("RGBA")
    clear.putalpha(100)
    modes = [*noise, *(noise[0].convert(mode) for mode in ("L", "P", "1", "LA")), clear]
    for number, picture in enumerate(modes):
        picture.save(folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(len(modes))]


@pytest.mark.parametrize(
    "installed", [*(pytest.param(x, marks=pytest.mark.long) for x in ("flipscale", "torchvision")), ""]
)
def test_equal_embeddings(folder: Path, pictures: list[Path], tmp_path: Path, installed: str) -> None:
    python: list[str | Path] = [sys.executable]
    if installed != "flipscale":
        packages = ["sentence-transformers", "pillow", *filter(None, [installed])]
        python = [environment_of(tmp_path / "venv", *packages), "-I"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [*python, "-c", USER, folder, *pictures], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    given = np.load(tmp_path / "embeds.npz")
    model, processor = FlipModel.from_pretrained(folder), FlipProcessor.from_pretrained(folder)
    if not installed:
        processor = build_processor(model.config, processor.tokenizer)
    assert np.abs(given["images"] - image_embeds(model, processor, pictures)).max() < 1e-6
    assert np.abs(given["texts"] - text_embeds(model, processor, TEXTS)).max() < 1e-6
