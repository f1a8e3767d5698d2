"""Conversion of a checkpoint that the original JAX FLIP wrote."""

import gzip
import json
import shutil
import sys
import tarfile
import zipfile
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
from flipscale.hub.t5x import open_flip_checkpoint
from flipscale.model import FlipConfig, FlipModel, FlipProcessor
from flipscale.model.modeling_flip import sincos_positions

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parity"
VARIANTS = sorted(path.name for path in (FIXTURES / "msgpack_variants").iterdir())
EMBEDDING = "target.txt_encoder.token_embedding.embedding"
POSITIONS = "target.img_encoder.posembed_encoder.pos_embedding"


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds `checkpoint_7`, as the original wrote it. Not to be changed."""
    folder = tmp_path_factory.mktemp("written")
    with tarfile.open(FIXTURES / "t5x.tar.gz") as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    """A copy of `checkpoint_7` to be changed."""
    return Path(shutil.copytree(written / "checkpoint_7", tmp_path / "src" / "checkpoint_7"))


def convert(src: Path, dst: Path, **heads: Any) -> FlipModel:
    return convert_flip_checkpoint(src, dst, **(heads or {"image_heads": 4, "text_heads": 4}))


def zip_of(folder: Path, archive: Path, level: str = "checkpoint_7") -> Path:
    """A zip that holds the files of `folder` as its folder `level`."""
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
    """Stores another array in the place of the one in `folder`, in one chunk."""
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


@pytest.mark.parametrize("where", [".", "checkpoint_7", "checkpoint_7/checkpoint"])
def test_reads_every_array_bit_for_bit(written: Path, where: str) -> None:
    arrays, expected = open_flip_checkpoint(written / where), np.load(FIXTURES / "params.npz")
    assert set(arrays) == set(expected.files)
    for name, stored in arrays.items():
        assert stored.shape == expected[name].shape
        array = np.asarray(stored)
        assert array.dtype == np.float32
        assert np.array_equal(array, expected[name]), name


def test_converts_to_a_model_folder(written: Path, tmp_path: Path) -> None:
    assert_equals_the_original(convert(written, tmp_path / "model"))
    loaded = FlipModel.from_pretrained(tmp_path / "model").eval()
    assert_equals_the_original(loaded)
    assert loaded.config.vision_config.image_size == 48
    assert loaded.config.text_config.attend_to_padding


@pytest.mark.parametrize("vocab", [None, "[PAD]\n[UNK]\na\n"])
def test_the_card_tells_the_licence_and_how_to_use_it(written: Path, tmp_path: Path, vocab: str | None) -> None:
    heads = {"image_heads": 4, "text_heads": 4}
    if vocab:
        (tmp_path / "vocab.txt").write_text(vocab)
        convert(written, tmp_path / "model", **heads, tokenizer=bert_tokenizer(tmp_path / "vocab.txt"))
    else:
        convert(written, tmp_path / "model")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.license == "cc-by-nc-4.0"
    assert "0.2 M parameters, 48-pixel images in patches of 16, captions of 32 ids" in card.text.replace("\n", " ")
    snippet = card.text.split("```python\n")[1].split("```")[0]
    Image.new("RGB", (60, 50)).save(tmp_path / "image.png")
    known = {}
    exec(snippet.replace("image.png", str(tmp_path / "image.png")), known)
    assert "classify" in known if vocab else type(known["model"]).__name__ == "FlipModel"


@pytest.mark.parametrize("variant", VARIANTS)
def test_reads_every_spelling_of_the_index(checkpoint: Path, tmp_path: Path, variant: str) -> None:
    shutil.copyfile(FIXTURES / "msgpack_variants" / variant, checkpoint / "checkpoint")
    assert_equals_the_original(convert(checkpoint, tmp_path / "model"))


@pytest.mark.parametrize("level", [".", "checkpoint_7", "flip/vit_large/checkpoint_7"])
@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_reads_a_zip_in_place(checkpoint: Path, tmp_path: Path, variant: str | None, level: str) -> None:
    """Whichever folder it opens at."""
    if variant:
        shutil.copyfile(FIXTURES / "msgpack_variants" / variant, checkpoint / "checkpoint")
    archive = zip_of(checkpoint, tmp_path / "flip.zip", level)
    assert_equals_the_original(convert(archive, tmp_path / "model"))
    assert {path.name for path in tmp_path.iterdir()} == {"src", "flip.zip", "model"}


def test_holds_the_model_once(tmp_path: Path) -> None:
    """Peak memory of a conversion above what the imports take: the model and its largest array, not two models."""
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


def test_lists_the_folders_where_msgpack_is_absent(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "msgpack", None)
    assert_equals_the_original(convert(written, tmp_path / "model"))


def test_chunks_need_not_divide_the_shape(checkpoint: Path) -> None:
    """Zarr stores the chunks at the edge whole."""
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


def test_command_saves_a_processor_with_the_originals_tokenizer(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "a", "red", "##der", "disc", ""]))
    dst = str(tmp_path / "model")
    heads = ["--image_heads", "4", "--text_heads", "4"]
    cli.main(["convert", "flip", str(written), dst, *heads, "--tokenizer", str(vocab)])
    assert "48 px in patches of 16, captions of 32 ids, with a processor" in capsys.readouterr().out
    processor = FlipProcessor.from_pretrained(dst)
    assert processor(text="a redder disc")["input_ids"] == [2, 3, 4, 5] + [0] * 28
    assert_equals_the_original(FlipModel.from_pretrained(dst).eval())


@pytest.mark.parametrize("fetched", [True, False])
def test_a_named_size_comes_with_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: bool) -> None:
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


def test_a_named_size_tells_the_heads() -> None:
    arrays = b16_arrays()
    assert build_flip_model(arrays, "b16").config.to_dict() == FlipConfig.from_size("b16").to_dict()
    with pytest.raises(ValueError, match=r"is not of size l16: it has vision hidden_size 768, not 1024;"):
        build_flip_model(arrays, "l16")


def fails(checkpoint: Path, message: str, **heads: int | str) -> None:
    dst = checkpoint.parent / "model"
    with pytest.raises(ValueError, match=message) as caught:
        convert(checkpoint, dst, **heads)
    assert "\n" not in str(caught.value)
    assert not dst.exists()


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"image_heads": 4}, r"image_heads is 4, text_heads is None, and a checkpoint does not tell them; give size"),
        ({"size": None}, r"a checkpoint does not tell them; give size \(b16, l16, h14\) or both"),
        ({"size": "g14"}, r"size 'g14' is none of the original FLIP's; use one of b16, l16, h14"),
        ({"size": "b16", "text_heads": 4}, r"size b16 and heads are both given; .* leave one of them out"),
        ({"image_heads": 7, "text_heads": 4}, r"image_heads 7 does not divide the image tower's width of 64"),
        ({"image_heads": 4, "text_heads": 0}, r"text_heads 0 does not divide the text tower's width of 48"),
        (
            {"size": "l16"},
            r"the checkpoint is not of size l16: it has vision hidden_size 64, not 1024; .*text hidden_size 48, not",
        ),
    ],
)
def test_heads_must_be_told_and_fit(checkpoint: Path, heads: dict[str, int | str], message: str) -> None:
    fails(checkpoint, message, **heads)


def test_no_checkpoint_there(checkpoint: Path, tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", r"nowhere does not exist; name a checkpoint_N folder")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", r"empty is not a checkpoint of the original FLIP: no target\.\* array folder")
    (tmp_path / "weights.pth").touch()
    fails(tmp_path / "weights.pth", r"weights.pth is not a checkpoint of the original FLIP: it is no zip, or one that")


def test_several_checkpoints(checkpoint: Path) -> None:
    shutil.copytree(checkpoint, checkpoint.parent / "checkpoint_9")
    fails(checkpoint.parent, r"holds 2 checkpoints \(checkpoint_7, checkpoint_9\); name one of them")


def test_another_version(checkpoint: Path) -> None:
    index = msgpack.unpackb((checkpoint / "checkpoint").read_bytes())
    (checkpoint / "checkpoint").write_bytes(msgpack.packb({**index, "version": 4}))
    fails(checkpoint, r"is of version 4; only version 3, the original FLIP's, can be read")


@pytest.mark.parametrize("content", [b"", b"not msgpack", msgpack.packb({"version": 3}), msgpack.packb([3])])
def test_an_index_of_something_else(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "checkpoint").write_bytes(content)
    fails(checkpoint, r"checkpoint is not the index of a checkpoint of the original FLIP")


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (5, "is not a zarr array in the checkpoint's index"),
        ({"driver": "zarr"}, "has no path in the checkpoint's index"),
    ],
)
def test_an_index_with_an_odd_entry(checkpoint: Path, leaf: object, message: str) -> None:
    index = msgpack.unpackb((checkpoint / "checkpoint").read_bytes())
    index["optimizer"]["target"]["logit_scale"] = leaf
    (checkpoint / "checkpoint").write_bytes(msgpack.packb(index))
    fails(checkpoint, "parameter logit_scale " + message)


def test_a_chunk_cut_short(checkpoint: Path) -> None:
    chunk = next(path for path in (checkpoint / EMBEDDING).iterdir() if path.name != ".zarray")
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-20])
    fails(checkpoint, r"array txt_encoder/token_embedding/embedding is damaged: .* is cut short or not gzip")
    chunk.write_bytes(gzip.compress(gzip.decompress(content)[:-4]))
    fails(checkpoint, r"embedding is damaged: .* holds \d+ bytes, not \d+")


def test_a_zip_cut_short(checkpoint: Path, tmp_path: Path) -> None:
    archive = zip_of(checkpoint, tmp_path / "flip.zip")
    content = archive.read_bytes()
    archive.write_bytes(content[:-100])
    fails(archive, r"flip.zip is not a checkpoint of the original FLIP: it is no zip, or one that was cut short")
    chunk = content.index(b"target.txt_encoder.token_embedding.embedding/0.0") + 200
    archive.write_bytes(content[:chunk] + bytes(100) + content[chunk + 100 :])
    fails(
        archive, r"flip.zip: checkpoint_7/target.txt_encoder.token_embedding.embedding/0.0 in it cannot be read \(Bad"
    )


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    archive = zip_of(tmp_path / "thesis", tmp_path / "thesis.zip")
    fails(archive, r"thesis.zip is not a checkpoint of the original FLIP: no target\.\* array folder is in it")


def test_a_chunk_missing(checkpoint: Path) -> None:
    (checkpoint / "target.logit_scale" / "0").unlink()
    fails(checkpoint, r"array logit_scale is incomplete: .* is missing")


def test_an_array_missing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(checkpoint / EMBEDDING)
    fails(checkpoint, r"array txt_encoder/token_embedding/embedding is missing: .* has no \.zarray")
    monkeypatch.setitem(sys.modules, "msgpack", None)
    fails(checkpoint, r"array txt_encoder/token_embedding/embedding is missing from the checkpoint")
    shutil.copytree(checkpoint / "target.txt_mlp1.kernel", checkpoint / EMBEDDING)
    shutil.rmtree(checkpoint / "target.txt_mlp1.kernel")
    fails(checkpoint, r"text_projection\.weight is missing, not \(32, 48\)")


def test_an_array_of_another_form(checkpoint: Path) -> None:
    meta = checkpoint / "target.logit_scale" / ".zarray"
    meta.write_text(meta.read_text().replace("gzip", "blosc"))
    fails(checkpoint, r"array logit_scale is stored as zarr 2, compressor blosc, order C, filters None; the original")
    meta.write_text("{")
    fails(checkpoint, r"array logit_scale is damaged: .*\.zarray cannot be read")


def test_arrays_that_no_flip_model_has(checkpoint: Path) -> None:
    rewrite_array(checkpoint / "target.img_encoder.embedding.bias", np.zeros(63))
    fails(checkpoint, r"not a FLIP model's: vision_model\.embeddings\.patch_embedding\.bias is \(63,\), not \(64,\)")
    rewrite_array(checkpoint / POSITIONS, np.zeros((1, 9, 64)))
    fails(checkpoint, r"pos_embedding has 8 patches, which are not a square")
    rewrite_array(checkpoint / POSITIONS, np.zeros((9, 64)))
    fails(checkpoint, r"pos_embedding is \(9, 64\); a FLIP model's has 3 dimensions")


def test_an_array_too_many(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msgpack", None)
    shutil.copytree(checkpoint / "target.logit_scale", checkpoint / "target.decoder.scale")
    fails(checkpoint, r"decoder\.weight is unknown")


def test_learned_image_positions(checkpoint: Path) -> None:
    """Row 0, the class token's, is never used and may hold anything; the rest must be the fixed table."""
    stored = np.load(FIXTURES / "params.npz")["img_encoder/posembed_encoder/pos_embedding"]
    first_row = stored.copy()
    first_row[0, 0] = 1.0
    rewrite_array(checkpoint / POSITIONS, first_row)
    assert_equals_the_original(convert(checkpoint, checkpoint.parent / "first_row"))
    rewrite_array(checkpoint / POSITIONS, np.load(FIXTURES / "io.npz")["pos_alt"])
    fails(checkpoint, r"is not the fixed 2-D sine-cosine table \(largest difference .*\); a model with learned")


def test_command_tells_a_mistake_in_one_line(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert", "flip", str(written), str(tmp_path / "model"), "--size", "h14"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("flipscale: error: the checkpoint is not of size h14: it has vision patch_size 16, not 14;")
    assert error.count("\n") == 1


def change_meta(checkpoint: Path, **changes: Any) -> None:
    file = checkpoint / EMBEDDING / ".zarray"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_chunk_that_unpacks_to_too_much(checkpoint: Path) -> None:
    for chunk in (checkpoint / EMBEDDING).glob("[0-9]*"):
        chunk.write_bytes(gzip.compress(bytes(4 << 20)))
    fails(checkpoint, r"array txt_encoder/token_embedding/embedding is damaged: .* holds more than \d+ bytes, not \d+")


def test_an_array_larger_than_its_files(checkpoint: Path) -> None:
    change_meta(checkpoint, shape=[99_000_000, 65_536], chunks=[99_000_000, 65_536])
    fails(checkpoint, r"has [\d,]+ bytes, which cannot be 25,952,256,000,000")


@pytest.mark.parametrize(
    "changes", [{"shape": [-1, 48]}, {"shape": ["a", 1]}, {"chunks": [0, 1]}, {"chunks": [1]}, {"dtype": "|O"}]
)
def test_an_array_that_cannot_be(checkpoint: Path, changes: dict[str, Any]) -> None:
    change_meta(checkpoint, **changes)
    fails(checkpoint, r"array txt_encoder/token_embedding/embedding is damaged: .*/.zarray cannot be read")


def test_a_link_out_of_the_checkpoint_is_none_of_its_files(checkpoint: Path) -> None:
    chunk = checkpoint / "target.logit_scale" / "0"
    chunk.rename(checkpoint.parent / "outside")
    chunk.symlink_to(checkpoint.parent / "outside")
    with pytest.raises(ValueError, match=r"array logit_scale is incomplete: .* is missing"):
        convert(checkpoint, checkpoint.parent / "model")


def test_weights_that_are_no_numbers(checkpoint: Path) -> None:
    rewrite_array(checkpoint / "target.logit_scale", np.full(1, np.nan, np.float32))
    fails(checkpoint, "weight logit_scale has numbers that are NaN or infinite")
