"""Loading faulty model folders: one clear error, no code executed; and the variants of a sound folder."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from hub.conftest import TOWER, small_model
from hub.loopback_hub import LoopbackHub
from transformers import PreTrainedTokenizerBase

from flipscale.cli import main
from flipscale.hub.export import build_processor, export_model
from flipscale.hub.loading import load_model, open_embedder
from flipscale.io.model_folder import fetch_folder
from flipscale.model import FlipModel, FlipVisionModel
from flipscale.start.complete_recipe import parse_recipe

LAST_SHARD = "model-00003-of-00003.safetensors"


@pytest.fixture(scope="module")
def exported(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose weights are in three shards, and in two as bf16."""
    model, out_dir = small_model(), tmp_path_factory.mktemp("loading") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flipscale.hub.export.MAX_SHARD_SIZE", "60KB")
        return export_model(model, build_processor(model.config, tokenizer), out_dir)


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(exported, tmp_path / "model")


class Payload:
    """A pickle of it creates a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.path,)


def only_a_pickle(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({"payload": Payload(folder / "executed")}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_format", 5, "model_format 5, this FlipConfig reads up to 4"),
        ("text_config__model_format", 5, "model_format 5, this FlipTextConfig"),
        ("text_config__hidden_act", "swoosh", "hidden_act 'swoosh'"),
    ],
)
def test_a_newer_folder_is_one_error(
    folder: Path, shards: Path, field: str, value: object, message: str, refused: Callable[..., str]
) -> None:
    """Of `flipscale evaluate` and of transformers. `tests/attacks/test_models.py` has more faults."""
    config = json.loads((folder / "config.json").read_text())
    *tower, name = field.split("__")
    (config[tower[0]] if tower else config)[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        FlipModel.from_pretrained(folder)
    assert message in refused("evaluate", folder, "--zero_shot", shards)


def test_a_pickle_is_never_loaded(
    folder: Path, shards: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="use_safetensors is False; a pickle can run code"):
        FlipModel.from_pretrained(folder, use_safetensors=False)
    only_a_pickle(folder)
    with pytest.raises(OSError, match="no file named model"):
        FlipVisionModel.from_pretrained(folder)
    monkeypatch.setattr("sys.stdin", None)  # nobody is asked whether code may run
    assert "pickle (pytorch_model.bin)" in refused("evaluate", folder, "--zero_shot", shards)
    assert not (folder / "executed").exists()


def test_folders_of_other_programs_have_other_names(folder: Path, shards: Path, refused: Callable[..., str]) -> None:
    for content in ({"architecture": "vit_tiny_patch16_224"}, {"model_type": "siglip2"}):
        (folder / "config.json").write_text(json.dumps(content))
        assert f"{content.get('model_type')!r}" in (line := refused("evaluate", folder, "--zero_shot", shards))
        assert f"hf:{folder}" in line
    (folder / "config.json").rename(folder / "open_clip_config.json")
    assert f"open_clip:local-dir:{folder}" in refused("evaluate", folder, "--zero_shot", shards)


def test_both_variants_load_from_shards(folder: Path) -> None:
    names = {path.name for path in folder.glob("*.safetensors*")}
    assert {LAST_SHARD, "model.bf16-00002-of-00002.safetensors", "model.safetensors.index.bf16.json"} <= names
    whole = FlipModel.from_pretrained(folder).eval()
    half = FlipModel.from_pretrained(folder, variant="bf16", dtype=torch.bfloat16).eval()
    assert (whole.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(whole.parameters(), half.parameters(), strict=True))
    pixels = torch.rand(4, 3, 32, 32)
    embeds = [model.get_image_features(pixels.to(model.dtype)).pooler_output.float() for model in (whole, half)]
    assert torch.cosine_similarity(*embeds).min() > 0.999


@pytest.mark.parametrize("name", ["./model", "~/model", "runs/x/model", "here/model"])
def test_a_path_is_never_a_hub_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(ValueError, match=f"there is no folder '{name}'"):
        fetch_folder(name)


def test_start_weights_on_the_hub_have_the_vocabulary(
    hub: LoopbackHub, logged_in: None, exported: Path, write_recipe: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str],
) -> None:  # fmt: skip
    """`small_model` has another vocabulary than the recipe's tokenizer; its configuration is fetched at the start."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.add("org/start", {file.name: file.read_bytes() for file in exported.iterdir() if file.is_file()})
    towers = {part: {**TOWER, "projection_dim": 16} for part in ("vision_config", "text_config")}
    towers["vision_config"] |= {"image_size": 32, "patch_size": 8}
    towers["text_config"] |= {"max_position_embeddings": 8}
    stages = [{"name": "only", "samples": 32, "base_lr": 0.01}]
    file = write_recipe(tmp_path / "run", model={"init_from": "org/start"}, stages=stages)
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**content, "model": {"init_from": "org/start", **towers}}))
    parse_recipe(["--config", str(file)])
    assert not hub.asked(".*"), "only a start fetches"
    main(["pretrain", "--config", str(file)])
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["text_config"]["vocab_size"] == 16
    # The recorded size is enough to go on, without the Hub.
    hub.fail_next(100, status=401)
    assert parse_recipe(["--config", str(file)]).model.text_config["vocab_size"] == 16
    line = refused("pretrain", "--config", file, "--output_dir", tmp_path / "new", "--model.init_from", "org/none")
    assert "model.init_from 'org/none' cannot be loaded" in line


def test_random_weights_of_a_folder_s_configuration(exported: Path, tmp_path: Path) -> None:
    config = load_model(str(exported))[1].config
    torch.manual_seed(5)  # has no effect on them
    found = open_embedder(f"untrained:{exported}", Accelerator(cpu=True)).model.state_dict()
    torch.manual_seed(0)
    expected = FlipModel(config).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
    with pytest.raises(ValueError, match="has no configuration of a model"):
        open_embedder(f"untrained:{tmp_path}", Accelerator(cpu=True))


FETCH = """
from flipscale.data.tokenizers import load_tokenizer
from flipscale.io.model_folder import fetch_folder
print(len(load_tokenizer("bert", 8)), fetch_folder("org/start", ["config.json"]).joinpath("config.json").stat().st_size)
"""


@pytest.mark.long
def test_a_filled_cache_needs_no_network(hub: LoopbackHub, hub_environment: dict[str, str], tmp_path: Path) -> None:
    hub.add("google-bert/bert-base-uncased", {"vocab.txt": b"[PAD]\n[UNK]\ncat\n"})
    hub.add("org/start", {"config.json": b"{}"})

    def fetch(**environment: str) -> subprocess.CompletedProcess:
        hub.requests.clear()
        kept = {**os.environ, **hub_environment, **environment}
        return subprocess.run([sys.executable, "-c", FETCH], env=kept, capture_output=True, text=True, check=False)

    assert fetch().stdout == "3 2\n"
    assert hub.asked("vocab.txt")
    assert fetch().stdout == "3 2\n"
    assert not hub.asked("vocab.txt"), "every process of a job would ask for it"
    assert fetch(HF_HUB_OFFLINE="1").stdout == "3 2\n"
    assert not hub.requests
    empty = fetch(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    assert "google-bert/bert-base-uncased" in empty.stderr.splitlines()[-1]
    assert not hub.requests
