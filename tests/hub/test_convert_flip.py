"""Conversion of checkpoints of the original JAX FLIP."""

import gzip
import json
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from conftest import launch
from huggingface_hub import ModelCard
from PIL import Image

from flipscale import cli
from flipscale.data.tokenizers import bert_tokenizer
from flipscale.hub.convert_flip import build_flip_model, convert_flip_checkpoint
from flipscale.hub.t5x import StoredArray, open_flip_checkpoint
from flipscale.model import FlipConfig, FlipModel, FlipProcessor
from flipscale.model.modeling_flip import sincos_positions

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parity"
VARIANTS = sorted(path.name for path in (FIXTURES / "msgpack_variants").iterdir())
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
    target: dict = {}
    for name, array in arrays.items():
        dotted, shape = "target." + name.replace("/", "."), list(array.shape)
        *parents, last = name.split("/")
        node = target
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = {
            "driver": "zarr",
            "kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket", "path": f"{dotted}/"},
        }
        meta = {"zarr_format": 2, "shape": shape, "chunks": shape, "dtype": "<f4", "order": "C", "filters": None}
        (folder / dotted).mkdir(parents=True)
        (folder / dotted / ".zarray").write_text(json.dumps({**meta, "compressor": {"id": "gzip", "level": 1}}))
        chunk = gzip.compress(array.astype("<f4").tobytes(), compresslevel=1)
        (folder / dotted / ".".join("0" * len(shape))).write_bytes(chunk)
    index = {"version": 3, "optimizer": {"target": target, "state": {}}}
    (folder / "checkpoint").write_bytes(msgpack.packb(index))


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
    meta = json.loads((folder / ".zarray").read_text())
    shutil.rmtree(folder)
    folder.mkdir()
    shape = list(change.shape)
    (folder / ".zarray").write_text(json.dumps({**meta, "shape": shape, "chunks": shape}))
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


def assert_original_arrays(arrays: Mapping[str, StoredArray]) -> None:
    expected = np.load(FIXTURES / "params.npz")
    assert set(arrays) == set(expected.files)
    for name, stored in arrays.items():
        array = np.asarray(stored)
        assert (stored.shape, array.dtype) == (expected[name].shape, np.float32)
        assert np.array_equal(array, expected[name]), name


@pytest.mark.parametrize("where", [".", "checkpoint_7", "checkpoint_7/checkpoint"])
def test_arrays_are_read_bit_for_bit(written: Path, where: str) -> None:
    assert_original_arrays(open_flip_checkpoint(written / where))


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


@pytest.mark.parametrize("variant", [None, *VARIANTS])
@pytest.mark.parametrize("level", [None, ".", "flip/vit_large/checkpoint_7"], ids=["folder", "zip", "deep zip"])
def test_every_form_of_the_index(checkpoint: Path, tmp_path: Path, variant: str | None, level: str | None) -> None:
    if variant:
        shutil.copyfile(FIXTURES / "msgpack_variants" / variant, checkpoint / "checkpoint")
    src = checkpoint if level is None else zip_of(checkpoint, tmp_path / "flip.zip", level)
    assert_original_arrays(open_flip_checkpoint(src))


def test_without_msgpack(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msgpack", None)
    assert_equals_the_original(convert(written, tmp_path / "model"))


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
def test_tokenizer_of_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: bool) -> None:
    def fetch(repository: str, file: str) -> str:
        assert (repository, file) == ("google-bert/bert-base-uncased", "vocab.txt")
        if not fetched:
            raise OSError("offline")
        (tmp_path / file).write_text("[PAD]\n[UNK]\na\n")
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    write_checkpoint(b16_arrays(), tmp_path / "checkpoint_1")
    with nullcontext() if fetched else pytest.warns(UserWarning, match="saved without a processor: .*offline"):
        convert(tmp_path / "checkpoint_1", tmp_path / "model", size="b16")
    assert (tmp_path / "model" / "processor_config.json").is_file() == fetched


def test_a_size_decides_the_heads() -> None:
    assert build_flip_model(b16_arrays(), "b16").config.to_dict() == FlipConfig.from_size("b16").to_dict()


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
        ({"size": None}, r"give size \(b16, l16, h14\) or both"),
        ({"size": "g14"}, "size is 'g14'"),
        ({"size": "b16", "text_heads": 4}, "size is b16 and heads"),
        ({"image_heads": 7, "text_heads": 4}, "image_heads is 7.* 64"),
        ({"image_heads": 4, "text_heads": 0}, "text_heads is 0.* 48"),
        ({"size": "l16"}, "size is l16, .* vision hidden_size 64, not 1024; .*text hidden_size 48, not"),
    ],
)
def test_bad_heads(checkpoint: Path, heads: dict[str, int | str | None], message: str) -> None:
    fails(checkpoint, message, **heads)


def test_no_single_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", "nowhere does not exist")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", r"empty is not a checkpoint .* no target\.\* array folder")
    (tmp_path / "weights.pth").touch()
    fails(tmp_path / "weights.pth", "weights.pth is not a checkpoint .* not a zip")
    (tmp_path / "empty/thesis.tex").touch()
    fails(zip_of(tmp_path / "empty", tmp_path / "thesis.zip"), r"thesis.zip is not a checkpoint .* no target\.\*")
    shutil.copytree(checkpoint, checkpoint.parent / "checkpoint_9")
    fails(checkpoint.parent, r"holds 2 checkpoints \(checkpoint_7, checkpoint_9\)")


@pytest.mark.parametrize("content", [b"", b"not msgpack", msgpack.packb({"version": 3}), msgpack.packb([3])])
def test_another_index(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "checkpoint").write_bytes(content)
    fails(checkpoint, "checkpoint is not the index")


@pytest.mark.parametrize(
    ("version", "leaf", "message"),
    [
        (4, None, "has version 4"),
        (3, 5, "parameter logit_scale is not a zarr array"),
        (3, {"driver": "zarr"}, "parameter logit_scale has no path"),
    ],
)
def test_odd_entries_of_the_index(checkpoint: Path, version: int, leaf: object, message: str) -> None:
    index = msgpack.unpackb((checkpoint / "checkpoint").read_bytes())
    index["version"] = version
    if leaf:
        index["optimizer"]["target"]["logit_scale"] = leaf
    (checkpoint / "checkpoint").write_bytes(msgpack.packb(index))
    fails(checkpoint, message)


def test_damaged_chunks(checkpoint: Path) -> None:
    chunk = next(path for path in (checkpoint / EMBEDDING).iterdir() if path.name != ".zarray")
    content, name = chunk.read_bytes(), "array txt_encoder/token_embedding/embedding is damaged"
    for damaged, message in (
        (content[:-20], "cut short or not gzip"),
        (gzip.compress(gzip.decompress(content)[:-4]), r"holds \d+ bytes, not \d+"),
        (gzip.compress(bytes(4 << 20)), r"holds more than \d+ bytes, not \d+"),
    ):
        chunk.write_bytes(damaged)
        fails(checkpoint, f"{name}.*{message}")
    scale = checkpoint / "target.logit_scale" / "0"
    scale.rename(checkpoint.parent / "outside")
    fails(checkpoint, "array logit_scale is incomplete: .* is missing")
    scale.symlink_to(checkpoint.parent / "outside")  # links out of the checkpoint are not followed
    fails(checkpoint, "array logit_scale is incomplete: .* is missing")


def test_a_damaged_zip(checkpoint: Path, tmp_path: Path) -> None:
    archive = zip_of(checkpoint, tmp_path / "flip.zip")
    content = archive.read_bytes()
    archive.write_bytes(content[:-100])
    fails(archive, "flip.zip is not a checkpoint .* cut short")
    chunk = content.index(b"target.txt_encoder.token_embedding.embedding/0.0") + 200
    archive.write_bytes(content[:chunk] + bytes(100) + content[chunk + 100 :])
    fails(archive, r"flip.zip: checkpoint_7/target.txt_encoder.token_embedding.embedding/0.0 in it .*\(Bad")


def test_missing_arrays(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(checkpoint / EMBEDDING)
    fails(checkpoint, r"array txt_encoder/token_embedding/embedding is missing: .* has no \.zarray")
    monkeypatch.setitem(sys.modules, "msgpack", None)
    fails(checkpoint, "array txt_encoder/token_embedding/embedding is missing from the checkpoint")
    shutil.copytree(checkpoint / "target.txt_mlp1.kernel", checkpoint / EMBEDDING)
    (checkpoint / "target.txt_mlp1.kernel").rename(checkpoint.parent / "kernel")
    fails(checkpoint, r"text_projection\.weight is missing, not \(32, 48\)")
    (checkpoint.parent / "kernel").rename(checkpoint / "target.decoder.scale")
    fails(checkpoint, r"decoder\.weight is unknown")


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [99_000_000, 65_536], "chunks": [99_000_000, 65_536]}, "too few for 25,952,256,000,000"),
        ({"shape": [-1, 48]}, "is damaged: .*/.zarray cannot be read"),
        ({"shape": ["a", 1]}, "is damaged"),
        ({"chunks": [0, 1]}, "is damaged"),
        ({"chunks": [1]}, "is damaged"),
        ({"dtype": "|O"}, "is damaged"),
        ({"compressor": {"id": "blosc"}}, "is stored as zarr 2, compressor blosc"),
    ],
)
def test_bad_metadata(checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    file = checkpoint / EMBEDDING / ".zarray"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    fails(checkpoint, f"array txt_encoder/token_embedding/embedding {message}" if "few" not in message else message)
