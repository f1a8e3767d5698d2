"""Conversion of checkpoints of the original JAX FLIP."""

import gzip
import json
import shutil
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from flipscale import cli
from flipscale.hub.convert_flip import convert_flip_checkpoint, open_flip_checkpoint
from flipscale.model import SIZES, FlipModel, FlipProcessor

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parity"
EMBEDDING = "target.txt_encoder.token_embedding.embedding"
POSITIONS = "target.img_encoder.posembed_encoder.pos_embedding"


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the original `checkpoint_7`; tests do not change it."""
    folder = tmp_path_factory.mktemp("written")
    with tarfile.open(FIXTURES / "t5x.tar.gz") as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    """A copy of `checkpoint_7` to change."""
    return Path(shutil.copytree(written / "checkpoint_7", tmp_path / "src" / "checkpoint_7"))


def convert(src: Path, dst: Path, **heads: Any) -> FlipModel:
    return convert_flip_checkpoint(src, dst, **(heads or {"image_heads": 4, "text_heads": 4}))


def zip_of(folder: Path, archive: Path, level: str = "checkpoint_7") -> Path:
    """A zip with the files of `folder` in its folder `level`."""
    with zipfile.ZipFile(archive, "w") as opened:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                opened.writestr((Path(level) / file.relative_to(folder)).as_posix(), file.read_bytes())
    return archive


def rewrite_array(folder: Path, change: np.ndarray) -> None:
    """Replaces the array in `folder`, in one chunk."""
    shutil.rmtree(folder)
    folder.mkdir()
    shape = list(change.shape)
    meta = {"zarr_format": 2, "shape": shape, "chunks": shape, "dtype": "<f4", "order": "C", "filters": None}
    (folder / ".zarray").write_text(json.dumps({**meta, "compressor": {"id": "gzip", "level": 1}}))
    (folder / ".".join("0" * len(shape))).write_bytes(gzip.compress(change.astype("<f4").tobytes()))


def assert_equals_the_original(model: FlipModel) -> None:
    given = np.load(FIXTURES / "io.npz")
    with torch.no_grad():
        output = model(
            pixel_values=torch.from_numpy(given["images_nhwc"]).permute(0, 3, 1, 2),
            input_ids=torch.from_numpy(given["txt"]).long(),
        )
    assert np.abs(output.image_embeds.numpy() - given["z_img"]).max() < 2e-6
    assert np.abs(output.text_embeds.numpy() - given["z_txt"]).max() < 2e-6


@pytest.mark.parametrize("where", [".", "checkpoint_7", "deep zip"])
def test_arrays_are_read_bit_for_bit(written: Path, tmp_path: Path, where: str) -> None:
    is_zip = where == "deep zip"
    src = zip_of(written / "checkpoint_7", tmp_path / "flip.zip", "flip/checkpoint_7") if is_zip else written / where
    arrays, expected = open_flip_checkpoint(src), np.load(FIXTURES / "params.npz")
    assert set(arrays) == set(expected.files)
    for name, stored in arrays.items():
        assert (stored.shape, np.asarray(stored).dtype) == (expected[name].shape, np.float32)
        assert np.array_equal(stored, expected[name]), name


def test_model_folder_and_card(written: Path, tmp_path: Path) -> None:
    """Without and with a vocabulary; the snippet of either card runs."""
    vocab, words = tmp_path / "vocab.txt", ["[PAD]", "[UNK]", "a", "red", "##der", "disc", ""]
    vocab.write_text("\n".join(words))
    Image.new("RGB", (60, 50)).save(tmp_path / "image.png")
    for options in ([], ["--tokenizer", str(vocab)]):
        dst = tmp_path / f"model{len(options)}"
        cli.main(["convert", "flip", str(written), str(dst), "--image_heads", "4", "--text_heads", "4", *options])
        loaded = FlipModel.from_pretrained(dst).eval()
        assert_equals_the_original(loaded)
        assert loaded.config.vision_config.image_size == 48
        assert loaded.config.text_config.attend_to_padding
        card = ModelCard.load(dst / "README.md")
        assert card.data.license == "cc-by-nc-4.0"
        names: dict[str, Any] = {}
        snippet = card.text.split("```python\n")[1].split("```")[0]
        exec(snippet.replace("image.png", str(tmp_path / "image.png")), names)
        assert ("classify" if options else "model") in names
    assert FlipProcessor.from_pretrained(dst)(text="a redder disc")["input_ids"] == [2, 3, 4, 5] + [0] * 28


def test_chunks_need_not_divide_the_shape(checkpoint: Path) -> None:
    folder = checkpoint / "target.img_mlp1.kernel"
    expected = np.load(FIXTURES / "params.npz")["img_mlp1/kernel"]
    meta = json.loads((folder / ".zarray").read_text())
    del meta["dimension_separator"]
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / ".zarray").write_text(json.dumps({**meta, "chunks": [48, 32], "compressor": None}))
    (folder / "0.0").write_bytes(expected[:48].tobytes())
    (folder / "1.0").write_bytes(np.pad(expected[48:], ((0, 32), (0, 0))).tobytes())
    assert np.array_equal(np.asarray(open_flip_checkpoint(checkpoint)["img_mlp1/kernel"]), expected)


def test_a_size_decides_the_heads(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(repository: str, file: str) -> str:
        raise OSError("offline")

    monkeypatch.setattr("flipscale.data.tokenizers.hf_hub_download", fetch)
    layers = {"num_attention_heads": 4, "num_hidden_layers": 2}
    vision, text = ({"hidden_size": w, "intermediate_size": 4 * w, **layers} for w in (64, 48))
    monkeypatch.setitem(SIZES, "b16", (vision, text, 32))
    with pytest.warns(UserWarning, match="saved without a processor: .*offline"):
        assert_equals_the_original(convert(written, tmp_path / "model", size="b16"))


def fails(checkpoint: Path, message: str, **heads: int | str | None) -> None:
    dst = checkpoint.parent / "model"
    with pytest.raises(ValueError, match=message) as caught:
        convert(checkpoint, dst, **heads)
    assert "\n" not in str(caught.value)
    assert not dst.exists()


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"image_heads": 4}, "image_heads is 4, text_heads is None"),
        ({"size": "b16", "text_heads": 4}, "size is b16 and heads"),
        ({"size": "l16"}, "size is l16"),
    ],
)
def test_bad_heads(checkpoint: Path, heads: dict[str, int | str | None], message: str) -> None:
    fails(checkpoint, message, **heads)


def test_no_single_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", "nowhere does not exist")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", r"empty has 0 checkpoints .*no target\.\*")
    (tmp_path / "weights.pth").touch()
    fails(tmp_path / "weights.pth", "weights.pth is not a checkpoint .* not a zip")
    shutil.copytree(checkpoint, checkpoint.parent / "checkpoint_9")
    fails(checkpoint.parent, r"has 2 checkpoints .*\(checkpoint_7, checkpoint_9\)")


def test_damage(checkpoint: Path, tmp_path: Path) -> None:
    archive = zip_of(checkpoint, tmp_path / "flip.zip")
    content = archive.read_bytes()
    chunk = content.index(b"target.txt_encoder.token_embedding.embedding/0.0") + 200
    archive.write_bytes(content[:chunk] + bytes(100) + content[chunk + 100 :])
    damaged = "array txt_encoder/token_embedding/embedding is damaged"
    fails(archive, damaged)
    archive.write_bytes(content[:-100])
    fails(archive, "flip.zip is not a checkpoint .* cut short")
    chunk = next(path for path in (checkpoint / EMBEDDING).iterdir() if path.name != ".zarray")
    chunk.write_bytes(chunk.read_bytes()[:-20])
    fails(checkpoint, damaged)
    chunk.unlink()
    fails(checkpoint, f"{damaged} .*NotFound")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"chunks": [0, 32]}, r"chunks \[0, 32\]"),
        ({"chunks": [48]}, "zarray"),
        ({"shape": [10**6, 10**6], "chunks": [1, 1]}, r"shape \[1000000, 1000000\]"),
        ({"dtype": "O"}, "dtype O"),
        ({"compressor": 3}, "zarray"),
        ({"compressor": {"id": "blosc"}}, "compressor blosc"),
    ],
)
def test_a_bad_description_is_refused_by_its_value(checkpoint: Path, changes: dict[str, Any], says: str) -> None:
    file = checkpoint / EMBEDDING / ".zarray"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    fails(checkpoint, f"array txt_encoder/token_embedding/embedding .*{says}")


@pytest.mark.parametrize("how", ["gzip", "zip"])
def test_a_chunk_that_unpacks_to_gigabytes_is_refused(checkpoint: Path, tmp_path: Path, how: str) -> None:
    place, src = next(path for path in (checkpoint / EMBEDDING).iterdir() if path.name != ".zarray"), checkpoint
    place.unlink()
    if how == "gzip":
        place.write_bytes(gzip.compress(bytes(1 << 30), 1))
    else:
        src = zip_of(checkpoint, tmp_path / "bomb.zip")
        name = (Path("checkpoint_7") / place.relative_to(checkpoint)).as_posix()
        with zipfile.ZipFile(src, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr(name, bytes(1 << 30))
    tracemalloc.start()
    fails(src, "txt_encoder/token_embedding/embedding is damaged")
    assert tracemalloc.get_traced_memory()[1] < 1 << 28
    tracemalloc.stop()


def test_missing_arrays(checkpoint: Path) -> None:
    # A name of the millionth block does not make a million.
    for place in checkpoint.glob("target.img_encoder.Transformer.encoderblock_01.*"):
        place.rename(checkpoint / place.name.replace("_01.", "_999999."))
    fails(checkpoint, "vision_model.encoder.layers.1")
    (checkpoint / EMBEDDING).rename(checkpoint.parent / "embedding")
    fails(checkpoint, "array txt_encoder/token_embedding/embedding is missing from the checkpoint")


def test_arrays_of_another_model(checkpoint: Path) -> None:
    for folder, array, message in (
        ("target.img_encoder.embedding.bias", np.zeros(63), r"patch_embedding\.bias of shape \[63\], not \[64\]"),
        (POSITIONS, np.zeros((1, 9, 64)), "pos_embedding has 8 patches"),
        (POSITIONS, np.zeros((9, 64)), r"pos_embedding has shape \(9, 64\); expected 3 dimensions"),
    ):
        before = shutil.copytree(checkpoint / folder, checkpoint.parent / "before")
        rewrite_array(checkpoint / folder, array)
        fails(checkpoint, message)
        shutil.rmtree(checkpoint / folder)
        before.rename(checkpoint / folder)
    rewrite_array(checkpoint / "target.logit_scale", np.full(1, np.nan, np.float32))
    fails(checkpoint, "weight logit_scale .*NaN")


def test_image_positions_are_fixed_but_for_the_first_row(checkpoint: Path) -> None:
    first_row = np.load(FIXTURES / "params.npz")["img_encoder/posembed_encoder/pos_embedding"].copy()
    first_row[0, 0] = 1.0
    rewrite_array(checkpoint / POSITIONS, first_row)
    assert_equals_the_original(convert(checkpoint, checkpoint.parent / "first_row"))
    rewrite_array(checkpoint / POSITIONS, np.load(FIXTURES / "io.npz")["pos_alt"])
    fails(checkpoint, "differs from the fixed 2-D sine-cosine table by up to")
