"""The snippets of docs/evaluation.md for other programs, run without flipscale, and their figures beside ours."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from cli.pages import ROOT
from datasets import load_dataset
from evaluation.made_up_sets import NAMES, write_set
from hub.native import NATIVE, export_native
from hub.test_export import environment_of
from PIL import Image
from transformers import AutoProcessor

from flipscale import cli
from flipscale.evaluation.embedding import Embedder, image_embeds, text_embeds
from flipscale.evaluation.kinds.zero_shot import ZeroShot
from flipscale.evaluation.suite import run_tasks
from flipscale.hub.loading import load_with_tokenizer, open_embedder
from flipscale.model import FlipModel, FlipProcessor

pytestmark = pytest.mark.long
SECTION = (ROOT / "docs/evaluation.md").read_text().split("\n## Where users evaluate\n")[1].split("\n## ")[0]
SENTENCE_TRANSFORMERS, MTEB, CLIP_BENCHMARK = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
BY_SCRIPT, ITSELF = re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)

# Added to the snippets: a check that flipscale is absent, and their results as JSON.
BEGIN = "import importlib.util\nassert importlib.util.find_spec('flipscale') is None\n"
END = """
import json
found = {"images": images.tolist(), "texts": texts.tolist()}
found["mteb"] = {result.task_name: result.scores["test"][0] for result in results.task_results}
with open("found.json", "w") as file:
    json.dump(found, file, default=float)
"""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the three programs and without flipscale."""
    folder = tmp_path_factory.mktemp("stranger")
    return environment_of(folder / "venv", "sentence-transformers", "mteb", "clip-benchmark", "pillow", "torchvision")


def run(*command: str | Path) -> None:
    """Run a command offline, without variables that lead to flipscale."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = {**kept, "HF_HUB_OFFLINE": "1", "HF_HOME": str(Path("home").absolute()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def agrees_with_ours(results: dict, model: FlipModel, tolerance: float) -> None:
    """Compare the embeddings of sentence-transformers, and the retrieval of mteb."""
    processor = AutoProcessor.from_pretrained("runs/demo/model")
    photos = image_embeds(model, processor, [f"photos/{number}.jpg" for number in range(8)])
    assert np.abs(results["images"] - photos).max() < tolerance
    assert np.abs(results["texts"] - text_embeds(model, processor, ["a red disc", "a blue ring"])).max() < tolerance
    captions = [line.split(",")[1] for line in Path("photos.csv").read_text().splitlines()[1:]]
    cosines = text_embeds(model, processor, captions) @ photos.T
    ranks = (cosines > np.diagonal(cosines)[:, None]).sum(axis=1)
    assert results["mteb"]["PhotosByCaption"]["recall_at_5"] == pytest.approx((ranks < 5).mean(), abs=1e-6)


def test_sentence_transformers_and_mteb_agree(in_site: Path, stranger: Path) -> None:
    run(stranger, "-I", "-c", BEGIN + SENTENCE_TRANSFORMERS + MTEB + END)
    results = json.loads((in_site / "found.json").read_text())
    model, processor = (kind.from_pretrained("runs/demo/model") for kind in (FlipModel, FlipProcessor))
    agrees_with_ours(results, model.eval(), 1e-6)
    pets = load_dataset("imagefolder", data_dir="pets")["test"]
    names = text_embeds(model, processor, [f"a {name}" for name in pets.features["label"].names])
    by_name = (image_embeds(model, processor, pets["image"]) @ names.T).argmax(axis=1) == np.array(pets["label"])
    assert results["mteb"]["PetsByName"]["accuracy"] == pytest.approx(by_name.mean(), abs=1e-6)
    assert min(by_name.mean(), results["mteb"]["Pets"]["accuracy"]) > 0.5  # chance is 0.25


@pytest.mark.parametrize("family", NATIVE)
def test_native_folders(
    family: str, in_site: Path, tmp_path: Path, stranger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same snippets take a CLIPModel or a SiglipModel as it is, here of random weights."""
    for name in ("photos", "photos.csv", "pets"):
        (tmp_path / name).symlink_to(in_site / name)
    (tmp_path / "runs/demo").mkdir(parents=True)
    export_native(family, tmp_path / "exported").rename(tmp_path / "runs/demo/model")
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "data/set", 1, 24, lambda number, label: {"cls": str(label).encode()})
    Path("data/set/classnames.txt").write_text("\n".join(NAMES) + "\n")
    Path("data/set/zeroshot_classification_templates.txt").write_text("a {c}\na photo of the {c}.\n")
    Path("clip_benchmark_flip.py").write_text(CLIP_BENCHMARK)
    run(stranger, "-I", "-c", BEGIN + SENTENCE_TRANSFORMERS + MTEB + END)
    agrees_with_ours(json.loads(Path("found.json").read_text()), load_with_tokenizer("runs/demo/model")[0], 1e-5)

    words = shlex.split(BY_SCRIPT.replace("\\\n", " ").replace("runs/mine/model", "runs/demo/model"))
    words = [word.replace("data/mine", "data/set").replace("wds/mine", "wds/set") for word in words[1:]]
    run(stranger, *words)
    theirs = json.loads(Path(words[-1]).read_text())["metrics"]
    embedder = open_embedder("hf:runs/demo/model", Accelerator(cpu=True))  # with transformers' own image processing
    ours = {r.metric: r.value / 100 for r in run_tasks(embedder, [ZeroShot("zero_shot", "data/set")])}
    assert theirs["acc1"] == pytest.approx(ours["top1"], abs=1e-6)
    assert theirs["acc5"] == pytest.approx(ours["top5"], abs=1e-6)


def test_clip_benchmark_reads_what_prepare_writes(in_site: Path, stranger: Path) -> None:
    for file in Path("pictures").glob("*/*"):  # as square PNGs, because the programs crop and decode others differently
        picture, square = Image.open(file), Path("squares", file.parent.name, file.stem + ".png")
        square.parent.mkdir(parents=True, exist_ok=True)
        picture.crop((0, 0, min(picture.size), min(picture.size))).save(square)
    prepare = ["prepare", "shards", "squares", "data/mine", "--labels", "folder", "--split", "0.5"]
    cli.main([*prepare, "--num_workers", "1", "--pairs_per_shard", "100"])
    assert (in_site / "data/mine/test/nshards.txt").read_text() == "3\n"
    cli.main(["convert", "open_clip", "runs/mine/model", "mine-open_clip"])
    (in_site / "clip_benchmark_flip.py").write_text(CLIP_BENCHMARK)
    model = FlipModel.from_pretrained("runs/mine/model").eval()
    embedder = Embedder(model, FlipProcessor.from_pretrained("runs/mine/model").tokenizer, Accelerator(cpu=True))
    ours = {result.metric: result.value / 100 for result in run_tasks(embedder, [ZeroShot("zero_shot", "data/mine")])}
    assert ours["top5"] > 0.5  # chance is 5 of 16
    for command in (BY_SCRIPT, ITSELF):
        program, *words = shlex.split(command.replace("\\\n", " "))
        run(stranger, *([] if program == "python" else ["-m", "clip_benchmark.cli"]), *words)
        theirs = json.loads((in_site / words[-1]).read_text())["metrics"]
        assert theirs["acc1"] == pytest.approx(ours["top1"], abs=1e-6), command
        assert theirs["acc5"] == pytest.approx(ours["top5"], abs=1e-6), command
    shutil.rmtree("data/mine")  # a page writes other shards there
