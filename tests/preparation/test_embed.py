"""Stored features: those of the model in the order of the manifest, the same bytes by any processes and after kills."""

import json
import shutil
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from accelerate import Accelerator
from conftest import TOWER, add_member, flipscale, write_shards
from datasets import Dataset
from evaluation.tiny_model import tiny_embedder
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from flipscale.cli import main
from flipscale.data.features import TeacherCrops
from flipscale.data.sources.opening import open_shards
from flipscale.data.sources.tar import TarSource
from flipscale.hub.export import build_processor, export_model
from flipscale.hub.loading import open_embedder
from flipscale.recipe.data import DataRecipe

BAD_IMAGE, BAD_TEXT = 11, 12  # rows


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """49 pairs in four shards, one of them empty. One image cannot be decoded, and one caption is blank."""
    folder = tmp_path_factory.mktemp("pairs")
    write_shards(folder, [11, 0, 36])
    with tarfile.open(folder / "00000a.tar", "w") as tar:  # the second shard
        add_member(tar, "last.jpg", b"not an image")
        add_member(tar, "last.txt", b"a red disc")
        with tarfile.open(folder / "00000.tar") as other:
            add_member(tar, "wordless.jpg", other.extractfile(other.next()).read())
        add_member(tar, "wordless.txt", b" ")
    return folder


@pytest.fixture(scope="module")
def model(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "flip"
    ours = tiny_embedder(tokenizer_dir, batch_size=16, projection_dim=24)
    return export_model(ours.model, build_processor(ours.model.config, ours.tokenizer), folder)


def embed(pairs: Path, out: Path, model: object, *options: object) -> dict[str, np.ndarray]:
    main([str(word) for word in ("prepare", "embed", pairs, out, "--model", model, "--num_workers", 1, *options)])
    return stored(out)


def stored(out: Path) -> dict[str, np.ndarray]:
    return {
        tower.name: np.concatenate([np.load(file) for file in sorted(tower.glob("*.npy"))])
        for tower in out.iterdir()
        if tower.name in ("images", "texts")
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_are_the_model_s_and_bad_ones_are_marked(
    pairs: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {name: embed(pairs, tmp_path / name, model, "--features", name) for name in ("embeds", "pooled")}
    assert "embedded 49 samples of 3 shards" in (said := capsys.readouterr().out)
    assert "1 images and 1 texts cannot be used" in said
    embedder = open_embedder(str(model), Accelerator(cpu=True))
    source = TarSource(str(pairs))
    places = [(shard, number) for shard, size in enumerate(source.shard_sizes) for number in range(size)]
    assert source.shard_sizes == [11, 2, 0, 36]
    for row, place in enumerate(places):
        sample = source.read(*place)
        if row != BAD_IMAGE:
            columns = embedder.decoder()(sample.image, 0)
            image = embedder.image_features(patches=torch.from_numpy(columns["patches"])[None])
            assert np.abs(found["embeds"]["images"][row] - unit(image)).max() < 1e-3
        if row != BAD_TEXT:
            text = embedder.text_features(embedder.tokens([sample.captions[0].decode()]))
            assert np.abs(found["embeds"]["texts"][row] - unit(text)).max() < 1e-3
    for features, arrays in found.items():
        about = json.loads((tmp_path / features / "features.json").read_text())
        assert np.flatnonzero(np.isnan(arrays["images"]).all(axis=1)).tolist() == [BAD_IMAGE]
        assert np.flatnonzero(np.isnan(arrays["texts"]).all(axis=1)).tolist() == [BAD_TEXT]
        for tower, projection in (("images", "image_projection"), ("texts", "text_projection")):
            assert arrays[tower].dtype == np.float16
            assert arrays[tower].shape == (49, about[tower]["width"])
            if features == "pooled":
                embeds = getattr(embedder.model, projection)(torch.from_numpy(arrays[tower]).float())
                assert np.nanmax(np.abs(unit(embeds) - found["embeds"][tower])) < 4e-3
    assert about["samples"] == 49
    assert about["images"]["resize"] == "short side, then the centre"


def unit(rows: torch.Tensor) -> np.ndarray:
    return nn.functional.normalize(rows, dim=-1).detach().numpy()


def test_two_processes_and_kills_give_one_s_bytes(pairs: Path, model: Path, tmp_path: Path) -> None:
    embed(pairs, tmp_path / "one", model, "--batch_size", 4)
    expected = contents(tmp_path / "one")
    words = ["prepare", "embed", str(pairs), "OUT", "--model", str(model), "--batch_size", "4", "--num_workers", "1"]

    def start(out: str) -> object:
        (tmp_path / "logs").mkdir(exist_ok=True)
        named = [str(tmp_path / out) if word == "OUT" else word for word in words]
        return processes.start(processes.call_main, "flipscale.cli", named, str(tmp_path / "logs"))

    together = [start("two"), start("two")]
    for process in together:
        process.join(120)
    assert contents(tmp_path / "two") == expected, (tmp_path / "logs/stderr").read_text()
    ranks = processes.run("flipscale.cli", [str(tmp_path / "ranks") if word == "OUT" else word for word in words], 2)
    assert ranks.stdout.count("embedded 49 samples") == 1, ranks.stderr
    assert contents(tmp_path / "ranks") == expected
    for number in range(3):
        process = start("killed")
        while process.is_alive() and len(list((tmp_path / "killed").rglob("*.npy*"))) <= 2 * number:
            time.sleep(0.001)
        process.kill()
        process.join()
    (tmp_path / "killed/images/00003.npy").unlink(missing_ok=True)
    (tmp_path / "killed/images/.00003.npy.partial.host.1.2").write_bytes(b"torn")
    assert flipscale(*[tmp_path / "killed" if word == "OUT" else word for word in words]).returncode == 0
    assert contents(tmp_path / "killed") == expected


def test_other_features_and_other_files_are_refused(
    pairs: Path, shards: Path, model: Path, tokenizer_dir: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    embed(pairs, out, model)
    shutil.copytree(model, tmp_path / "moved")
    embed(pairs, out, tmp_path / "moved")  # the same model elsewhere
    torch.manual_seed(1)
    other = tiny_embedder(tokenizer_dir, batch_size=16, projection_dim=24)
    other.model.text_projection.weight.data.add_(1.0)
    export_model(other.model, build_processor(other.model.config, other.tokenizer), tmp_path / "other")
    run = partial(refused, "prepare", "embed")
    assert "model_digest" in run(pairs, out, "--model", tmp_path / "other")
    assert "samples 49" in run(shards, out, "--model", model)
    assert "features embeds" in run(pairs, out, "--model", model, "--features", "pooled")
    assert "holds something that" in run(pairs, pairs, "--model", model)
    Dataset.from_dict({"image": [Image.new("RGB", (8, 8))], "text": ["grey"]}).save_to_disk(tmp_path / "rows")
    assert "rows'; expected tar shards" in run(tmp_path / "rows", tmp_path / "new", "--model", model)
    assert "--no_mirror, --seed without" in run(pairs, tmp_path / "new", "--model", model, "--no_mirror", "--seed", 7)


def test_a_shard_that_cannot_be_read_stops_the_command(
    model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    write_shards(tmp_path / "pairs", [3, 3])
    broken = tmp_path / "pairs/00001.tar"
    broken.write_bytes(b"no tar")
    error = refused("prepare", "embed", tmp_path / "pairs", tmp_path / "new", "--model", model)
    assert "1 of 2 shards" in error
    assert broken.name in error
    assert not list(tmp_path.glob("new/*/*.npy"))


def test_shards_in_another_order_are_others(tmp_path: Path) -> None:
    """Shards have the same names in two folders, which are renamed: rows of features would be of other samples."""
    for name, other, size in (("a", "b", 3), ("b", "a", 5)):
        write_shards(tmp_path / "one" / name, [size])
        shutil.copytree(tmp_path / "one" / name, tmp_path / "two" / other)
    data = DataRecipe(lanes=1, shards_per_block=1)
    one, two = (open_shards(f"{tmp_path}/{name}/*/*.tar", data) for name in ("one", "two"))
    assert (one.shard_sizes, two.shard_sizes) == ([3, 5], [5, 3])
    assert one.contents_digest() == two.contents_digest()
    assert one.contents_digest(in_order=True) != two.contents_digest(in_order=True)


def test_crops_by_a_model_of_another_program(
    pairs: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    """The model's own preprocessing takes each crop as it is, with no resize and no further crop."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": 16, "max_position_embeddings": 8, "eos_token_id": 2}
    vision = {**TOWER, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    CLIPProcessor(processor, AutoTokenizer.from_pretrained(tokenizer_dir)).save_pretrained(tmp_path / "clip")
    name = "hf:clip"
    found = embed(pairs, tmp_path / "crops", name, "--crops", 2, "--crop_scale", 0.3, 0.6, "--no_mirror", "--seed", 7)
    assert np.flatnonzero(np.isnan(found["images"]).all(axis=(1, 2))).tolist() == [BAD_IMAGE]
    about = json.loads((tmp_path / "crops/features.json").read_text())
    embedder, source = open_embedder(name, Accelerator(cpu=True)), TarSource(str(pairs))
    assert about["logit_scale"] == embedder.model.logit_scale.exp().item()
    assert about["images"]["crops"] == {"count": 2, "scale": [0.3, 0.6], "mirror": False, "seed": 7}
    crops, size = TeacherCrops(2, (0.3, 0.6), False, 7), embedder.image_size
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    for row, place in ((0, (0, 0)), (48, (3, 35))):
        image = source.read(*place).image
        pixels = [crops.decode(image, place, number, size).fitted(size) for number in range(2)]
        inputs = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - mean) / std
        expected = unit(embedder.image_features(pixel_values=inputs))
        assert np.abs(expected[0] - expected[1]).max() > 1e-3
        assert np.abs(found["images"][row] - expected).max() < 1e-3
    # A crop after a larger resize would cut the borders of each crop off.
    processor.size = {"shortest_edge": 40}
    CLIPProcessor(processor, AutoTokenizer.from_pretrained(tokenizer_dir)).save_pretrained(tmp_path / "clip")
    assert f"--crops is 2 and the image processor of {name!r} cuts borders off" in refused(
        "prepare", "embed", pairs, tmp_path / "cut", "--model", name, "--crops", "2"
    )
