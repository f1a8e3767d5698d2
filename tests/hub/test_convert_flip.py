"""Conversion of checkpoints of the original JAX FLIP."""

import gzip
import json
import os
import shutil
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import launch
from huggingface_hub import ModelCard
from PIL import Image

from flipscale import cli
from flipscale.data.tokenizers import bert_tokenizer
from flipscale.hub.convert_flip import StoredArray, convert_flip_checkpoint, open_flip_checkpoint
from flipscale.model import SIZES, FlipModel, FlipProcessor
from flipscale.model.modeling_flip import sincos_positions

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


def write_checkpoint(arrays: dict[str, np.ndarray], folder: Path) -> None:
    """A checkpoint in the original's format, one chunk an array."""
    for name, array in arrays.items():
        place, shape = folder / ("target." + name.replace("/", ".")), list(array.shape)
        meta = {"zarr_format": 2, "shape": shape, "chunks": shape, "dtype": "<f4", "order": "C", "filters": None}
        place.mkdir(parents=True)
        (place / ".zarray").write_text(json.dumps({**meta, "compressor": {"id": "gzip", "level": 1}}))
        chunk = gzip.compress(array.astype("<f4").tobytes(), compresslevel=1)
        (place / ".".join("0" * len(shape))).write_bytes(chunk)


def b16_arrays() -> dict[str, np.ndarray]:
    """The arrays of a whole B/16: the small model's names, its blocks repeated, zeros of the right shapes."""
    sizes = {16: 16, 3: 3, 64: 768, 256: 3072, 48: 512, 192: 2048, 32: 512, 97: 30523, 1: 1}
    arrays = {}
    for name, array in np.load(FIXTURES / "params.npz").items():
        shape = tuple(sizes[length] for length in array.shape) if "pos_embedding" not in name else ()
        for number in range(12) if "encoderblock_00" in name else (0,):
            if "encoderblock_01" not in name:
                arrays[name.replace("encoderblock_00", f"encoderblock_{number:02d}")] = np.zeros(shape, np.float32)
    positions = sincos_positions(768, 14, 14).numpy()
    arrays["img_encoder/posembed_encoder/pos_embedding"] = np.pad(positions, ((1, 0), (0, 0)))[None]
    arrays["txt_encoder/posembed_encoder/pos_embedding"] = np.zeros((1, 32, 512), np.float32)
    return arrays


def rewrite_array(folder: Path, change: np.ndarray) -> None:
    """Replaces the array in `folder`, in one chunk."""
    shutil.rmtree(folder)
    write_checkpoint({folder.name.removeprefix("target."): change}, folder.parent)


def assert_equals_the_original(model: FlipModel) -> None:
    given = np.load(FIXTURES / "io.npz")
    with torch.no_grad():
        output = model(
            pixel_values=torch.from_numpy(given["images_nhwc"]).permute(0, 3, 1, 2),
            input_ids=torch.from_numpy(given["txt"]).long(),
        )
    assert np.abs(output.image_embeds.numpy() - given["z_img"]).max() < 2e-6
    assert np.abs(output.text_embeds.numpy() - given["z_txt"]).max() < 2e-6


def assert_original_arrays(arrays: Mapping[str, StoredArray]) -> None:
    expected = np.load(FIXTURES / "params.npz")
    assert set(arrays) == set(expected.files)
    for name, stored in arrays.items():
        array = np.asarray(stored)
        assert (stored.shape, array.dtype) == (expected[name].shape, np.float32)
        assert np.array_equal(array, expected[name]), name


@pytest.mark.parametrize("where", [".", "checkpoint_7", "flat zip", "deep zip"])
def test_arrays_are_read_bit_for_bit(written: Path, tmp_path: Path, where: str) -> None:
    src = written / where
    if "zip" in where:
        level = "." if where == "flat zip" else "flip/vit_large/checkpoint_7"
        src = zip_of(written / "checkpoint_7", tmp_path / "flip.zip", level)
    assert_original_arrays(open_flip_checkpoint(src))


@pytest.mark.parametrize("vocab", [None, "[PAD]\n[UNK]\na\n"])
def test_model_folder_and_card(written: Path, tmp_path: Path, vocab: str | None) -> None:
    heads: dict[str, Any] = {"image_heads": 4, "text_heads": 4}
    if vocab:
        (tmp_path / "vocab.txt").write_text(vocab)
        heads["tokenizer"] = bert_tokenizer(tmp_path / "vocab.txt")
    assert_equals_the_original(convert(written, tmp_path / "model", **heads))
    loaded = FlipModel.from_pretrained(tmp_path / "model").eval()
    assert_equals_the_original(loaded)
    assert loaded.config.vision_config.image_size == 48
    assert loaded.config.text_config.attend_to_padding
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.license == "cc-by-nc-4.0"
    assert "0.2 M parameters, 48-pixel images in patches of 16, captions of 32 ids" in card.text.replace("\n", " ")
    snippet = card.text.split("```python\n")[1].split("```")[0]
    Image.new("RGB", (60, 50)).save(tmp_path / "image.png")
    names: dict[str, Any] = {}
    exec(snippet.replace("image.png", str(tmp_path / "image.png")), names)
    assert "classify" in names if vocab else type(names["model"]).__name__ == "FlipModel"


def test_memory_holds_the_model_once(tmp_path: Path) -> None:
    arrays = b16_arrays()
    write_checkpoint(arrays, tmp_path / "checkpoint_1")
    code = f"""
import pathlib, flipscale.hub.convert_flip as c
def peak(): return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
before = peak()
c.convert_flip_checkpoint({str(tmp_path / "checkpoint_1")!r}, {str(tmp_path / "model")!r}, "b16")
print(peak() - before)
"""
    done = launch([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    num_bytes = sum(array.nbytes for array in arrays.values())
    largest = max(array.nbytes for array in arrays.values())
    assert num_bytes < int(done.stdout.split()[-1]) < num_bytes + 3 * largest


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


def test_command(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vocab, dst = tmp_path / "vocab.txt", str(tmp_path / "model")
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "a", "red", "##der", "disc", ""]))
    heads = ["--image_heads", "4", "--text_heads", "4"]
    cli.main(["convert", "flip", str(written), dst, *heads, "--tokenizer", str(vocab)])
    assert "48 px in patches of 16, captions of 32 ids, with a processor" in capsys.readouterr().out
    processor = FlipProcessor.from_pretrained(dst)
    assert processor(text="a redder disc")["input_ids"] == [2, 3, 4, 5] + [0] * 28
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", "flip", str(written), str(tmp_path / "other"), "--size", "h14"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("flipscale: error: size is h14, but the checkpoint has vision patch_size")


@pytest.mark.parametrize("fetched", [True, False])
def test_a_size_decides_heads_and_tokenizer(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: bool
) -> None:
    def fetch(repository: str, file: str) -> str:
        assert (repository, file) == ("google-bert/bert-base-uncased", "vocab.txt")
        if not fetched:
            raise OSError("offline")
        (tmp_path / file).write_text("[PAD]\n[UNK]\na\n")
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    layers = {"num_attention_heads": 4, "num_hidden_layers": 2}
    vision, text = ({"hidden_size": w, "intermediate_size": 4 * w, **layers} for w in (64, 48))
    monkeypatch.setitem(SIZES, "b16", (vision, text, 32))
    with nullcontext() if fetched else pytest.warns(UserWarning, match="saved without a processor: .*offline"):
        assert_equals_the_original(convert(written, tmp_path / "model", size="b16"))
    assert (tmp_path / "model" / "processor_config.json").is_file() == fetched


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
        ({"size": None}, "give size or both"),
        ({"size": "b17"}, "size is 'b17'"),
        ({"size": "b16", "text_heads": 4}, "size is b16 and heads"),
        ({"image_heads": 7, "text_heads": 4}, "hidden_size 64 .* num_attention_heads 7"),
        ({"image_heads": 4, "text_heads": 0}, "num_attention_heads is 0"),
        ({"size": "l16"}, "size is l16, .* vision hidden_size 64, not 1024; .*text hidden_size 48, not"),
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
    meta = json.loads((checkpoint / EMBEDDING / ".zarray").read_text())
    (checkpoint / EMBEDDING / ".zarray").write_text(json.dumps({**meta, "compressor": {"id": "blosc"}}))
    fails(checkpoint, "array txt_encoder/token_embedding/embedding is stored as zarr 2, compressor blosc")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"chunks": [0, 32]}, r"chunks \[0, 32\]"),
        ({"chunks": [48]}, "zarray"),
        ({"shape": "many"}, "zarray"),
        ({"shape": [10**6, 10**6], "chunks": [1, 1]}, r"shape \[1000000, 1000000\]"),
        ({"shape": [97, -32]}, "-32"),
        ({"dtype": "O"}, "dtype O"),
        ({"compressor": 3}, "zarray"),
    ],
)
def test_a_damaged_description_is_refused_by_its_value(checkpoint: Path, changes: dict[str, Any], says: str) -> None:
    file = checkpoint / EMBEDDING / ".zarray"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    fails(checkpoint, f"array txt_encoder/token_embedding/embedding .*{says}")


@pytest.mark.parametrize("how", ["gzip", "zip", "pipe"])
def test_a_chunk_that_unpacks_to_gigabytes_is_refused(checkpoint: Path, tmp_path: Path, how: str) -> None:
    place, src = next(path for path in (checkpoint / EMBEDDING).iterdir() if path.name != ".zarray"), checkpoint
    if how == "gzip":
        with gzip.open(place, "wb", compresslevel=1) as file:
            for _ in range(16):
                file.write(bytes(1 << 26))
    elif how == "pipe":
        place.unlink()
        os.mkfifo(place)
    else:
        place.unlink()
        src = zip_of(checkpoint, tmp_path / "bomb.zip")
        name = (Path("checkpoint_7") / place.relative_to(checkpoint)).as_posix()
        with (
            zipfile.ZipFile(src, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            archive.open(name, "w") as file,
        ):
            for _ in range(16):
                file.write(bytes(1 << 26))
    tracemalloc.start()
    fails(src, "txt_encoder/token_embedding/embedding is damaged")
    assert tracemalloc.get_traced_memory()[1] < 1 << 28
    tracemalloc.stop()


def test_layers_that_are_missing_are_not_built(checkpoint: Path) -> None:
    """A name of the millionth block does not make a million."""
    for place in checkpoint.glob("target.img_encoder.Transformer.encoderblock_01.*"):
        place.rename(checkpoint / place.name.replace("_01.", "_999999."))
    fails(checkpoint, "vision_model.encoder.layers.1")


def test_missing_arrays(checkpoint: Path) -> None:
    (checkpoint / EMBEDDING).rename(checkpoint.parent / "embedding")
    fails(checkpoint, "array txt_encoder/token_embedding/embedding is missing from the checkpoint")
    (checkpoint.parent / "embedding").rename(checkpoint / EMBEDDING)
    (checkpoint / "target.txt_mlp1.kernel").rename(checkpoint / "target.decoder.scale")
    fails(checkpoint, r"text_projection\.weight is missing, not \(32, 48\); decoder\.weight is unknown")


def test_arrays_of_another_model(checkpoint: Path) -> None:
    for folder, array, message in (
        ("target.img_encoder.embedding.bias", np.zeros(63), r"patch_embedding\.bias is \(63,\), not \(64,\)"),
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
