"""Shards from folders, tables and data sets: the same bytes however often killed, and a word on what is left out."""

import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import launch
from data.conftest import encoded
from data.test_decode import KINDS, picture, with_alpha
from PIL import Image

from flipscale.cli import main
from flipscale.data.decode import decode_whole
from flipscale.data.sources.tar import TarSource, add_member
from flipscale.preparation.task_sets import _image

CAPTIONS = [f"picture number {number}" for number in range(6)]


def image(number: int, kind: str = "JPEG", height: int = 60, width: int = 90) -> bytes:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 3 + number * 9, columns * 2, 128 + 60 * np.sin(columns / 9 + number)], axis=2)
    return encoded(pixels.clip(0, 255).astype(np.uint8), kind)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images with captions: a PNG, a BMP, a small one, one in a subfolder with a JSON of two captions."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    names = ["0.jpg", "1.png", "2.bmp", "3.jpg", "4.jpg", "sub/5.jpg"]
    for number, name in enumerate(names):
        (root / name).write_bytes(
            image(number, {"png": "PNG", "bmp": "BMP"}.get(name[-3:], "JPEG"), *[(60, 90), (30, 20)][number == 3])
        )
        if number < 5:
            (root / name).with_suffix(".TXT" if number == 1 else ".txt").write_text(f"{CAPTIONS[number]}\n")
    (root / "sub/5.json").write_text(json.dumps({"captions": [CAPTIONS[5], "an\nother"]}))
    return root


def shards_of(command: list[str | Path], out: Path) -> TarSource:
    main(["prepare", "shards", *map(str, command), str(out), "--num_workers", "1"])
    return TarSource(str(out))


def test_a_folder_becomes_shards(folder: Path, tmp_path: Path) -> None:
    source = shards_of([folder, "--short_side", "40", "--pairs_per_shard", "4"], tmp_path / "out")
    assert source.shard_sizes == [4, 2]
    samples = [source.read(shard, number) for shard, size in enumerate(source.shard_sizes) for number in range(size)]
    assert [sample.captions[0].decode() for sample in samples] == CAPTIONS
    assert samples[5].captions[1] == b"an other"
    kinds = [Image.open(io.BytesIO(sample.image)) for sample in samples]
    assert [kind.format for kind in kinds] == ["JPEG"] * 6
    assert [kind.size for kind in kinds] == [(60, 40)] * 3 + [(20, 30)] + [(60, 40)] * 2
    assert samples[3].image == (folder / "3.jpg").read_bytes(), "a small image was changed"
    for number in (0, 1, 2, 4, 5):
        file = next(folder.rglob(f"{number}.[jpb][pnm][gp]"))
        reference = Image.open(file).resize((60, 40), Image.Resampling.BOX)
        assert np.abs(decode_whole(samples[number].image).astype(int) - np.asarray(reference)).mean() < 3
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        about = json.load(tar.extractfile("000000001.json"))
    assert about == {"key": "1.png", "width": 60, "height": 40, "original_width": 90, "original_height": 60}
    assert len(list((tmp_path / "out").glob("*.tar.index.npy"))) == 2


def test_parquet_images_with_several_captions(tmp_path: Path) -> None:
    images = [{"bytes": image(number), "path": None} for number in range(3)]
    columns = {"image": images, "caption": [["one", "two"], [" "], ["three"]]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    datasets.Dataset.from_dict(columns, features).to_parquet(str(tmp_path / "pairs.parquet"))
    source = shards_of([tmp_path / "pairs.parquet"], tmp_path / "out")
    assert [source.read(0, row).captions for row in range(2)] == [(b"one", b"two"), (b"three",)]
    assert source.read(0, 1).image == image(2)
    assert json.loads((tmp_path / "out/report.json").read_text())["left_out"] == {"missing_caption": 1}


def test_options_may_change_after_a_run_without_pairs_and_other_archives_stay(folder: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "list.csv", tmp_path / "out"
    table.write_text("image,blank,caption\n" + "".join(f"{folder / name},,words\n" for name in ("0.jpg", "2.bmp")))
    words = ["prepare", "shards", table, out, "--allow_outside", "--pairs_per_shard", "1", "--caption_column"]
    with pytest.raises(SystemExit):
        main([*map(str, words), "blank"])
    assert (out / "00001.tar").is_file()
    (out / "mine.tar").write_bytes(b"mine")
    main([*map(str, words), "caption"])
    assert TarSource(str(out / "0000{0..1}.tar")).shard_sizes == [1, 1]
    assert (out / "mine.tar").read_bytes() == b"mine"


def test_what_is_left_out_is_said(folder: Path, tmp_path: Path) -> None:
    (folder / "0.txt").write_bytes(b"\xff\xfe")
    (folder / "1.png").write_bytes(b"no picture")
    (folder / "3.txt").write_text("  \n")
    (folder / "4.txt").unlink()
    shutil.copy(folder / "2.bmp", folder / "sub/6.bmp")
    shutil.copy(folder / "2.txt", folder / "sub/6.txt")
    # The first copy has no caption, so the second is kept.
    shutil.copy(folder / "4.jpg", folder / "sub/7.jpg")
    (folder / "sub/7.txt").write_text("a caption")
    source = shards_of([folder, "--drop_duplicates", "--pairs_per_shard", "3"], tmp_path / "out")
    assert source.shard_sizes == [1, 1, 1]
    lines = [json.loads(line) for line in (tmp_path / "out/left_out.jsonl").read_text().splitlines()]
    assert {line["key"]: line["cause"] for line in lines} == {
        "0.jpg": "undecodable_caption",
        "1.png": "undecodable_image",
        "3.jpg": "missing_caption",
        "4.jpg": "missing_caption",
        "sub/6.bmp": "duplicate",
    }
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["pairs"], report["written"], report["left_out"]["missing_caption"]) == (8, 3, 2)
    assert not list((tmp_path / "out").glob(".*.partial*")), "something was left aside"


def test_every_picture_is_written_or_counted(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "0.jpg", folder / "7.jfif")
    (folder / "8.heic").write_bytes(b"\0\0\0\x18ftypheic")
    for number in (7, 8):
        (folder / f"{number}.txt").write_text("two lines\nof one caption\n")
    source = shards_of([folder, "--max_bad_fraction", "0.5"], tmp_path / "out")
    captions = [source.read_captions(0, number) for number in range(source.shard_sizes[0])]
    assert (b"two lines of one caption",) in captions
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["pairs"], report["left_out"]) == (report["written"] + 1, {"undecodable_image": 1})


TURNED = Image.Exif()
TURNED[0x112] = 6
CLEAR = with_alpha("RGBA").quantize(16)
CLEAR.info["transparency"] = CLEAR.getpixel((0, 0))
READ_OTHERWISE = {
    name: make() for name, make in KINDS.items() if re.search("rgba|la png|transparent|16-bit grey", name)
}
READ_OTHERWISE |= {
    "turned rgba png": encoded(with_alpha("RGBA"), "PNG", exif=TURNED),
    "turned png": encoded(picture(), "PNG", exif=TURNED),
    "almost opaque png": encoded(Image.merge("RGBA", (*picture().split(), Image.new("L", (210, 150), 254)))),
    "lossy rgba webp": encoded(with_alpha("RGBA"), "WEBP", exif=TURNED),
    "transparent gif": encoded(CLEAR, "GIF"),
    "animated gif": encoded(CLEAR, "GIF", save_all=True, append_images=[picture().quantize(16)]),
    "animated png": encoded(picture(), "PNG", save_all=True, append_images=[with_alpha("RGBA")], default_image=True),
    "rgba tiff": encoded(with_alpha("RGBA"), "TIFF"),
}
READ_ALIKE = {name: make() for name, make in KINDS.items() if re.search("png|webp|jpeg", name)}
READ_ALIKE = {name: content for name, content in READ_ALIKE.items() if name not in READ_OTHERWISE}
READ_ALIKE["opaque rgba png"] = encoded(picture().convert("RGBA"))
READ_ALIKE["opaque rgba webp"] = encoded(picture().convert("RGBA"), "WEBP", lossless=True, exif=Image.Exif())


@pytest.mark.parametrize("writer", ["shards", "resize", "tasks"])
def test_every_reader_sees_the_stored_pictures_alike(
    tmp_path: Path, writer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files, out = {**READ_OTHERWISE, **READ_ALIKE}, tmp_path / "out"
    if writer == "tasks":
        stored = [next(iter(_image({"bytes": content}, "here").items())) for content in files.values()]
    else:
        (tmp_path / "in").mkdir()
        with tarfile.open(tmp_path / "in/0.tar", "w") as tar:
            for number, content in enumerate(files.values()):
                kind = Image.open(io.BytesIO(content)).format.lower().replace("jpeg", "jpg")
                for name, member in ((f"{number:02}.{kind}", content), (f"{number:02}.txt", b"words")):
                    add_member(tar, name, member)
                    (tmp_path / "in" / name).write_bytes(member)
        if writer == "shards":
            (tmp_path / "in/0.tar").unlink()
        main(["prepare", writer, str(tmp_path / "in"), str(out), "--num_workers", "1"])
        printed, count = capsys.readouterr().out, len(READ_OTHERWISE)
        with tarfile.open(next(out.glob("*.tar"))) as tar:
            members = [(member.name.split(".")[1], tar.extractfile(member).read()) for member in tar]
        stored = [member for member in members if member[0] not in ("txt", "json")]
    for (name, content), (extension, kept) in zip(files.items(), stored, strict=True):
        decoded = decode_whole(kept)
        if extension != "jpg":
            assert np.array_equal(Image.open(io.BytesIO(kept)).convert("RGB"), decoded), name
        assert np.array_equal(decoded, decode_whole(content)), name
        assert (kept == content) == (name in READ_ALIKE), name
        assert extension == Image.open(io.BytesIO(kept)).format.lower().replace("jpeg", "jpg"), name
    assert writer == "tasks" or re.search(rf"redrawn +{count} .*white|\b{count} redrawn.*white", printed)


def test_shrunk_transparent_pictures_are_counted(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.png").write_bytes(READ_OTHERWISE["rgba png"])
    (tmp_path / "in/0.txt").write_text("words")
    source = shards_of([tmp_path / "in", "--short_side", "50"], tmp_path / "out")
    assert decode_whole(source.read(0, 0).image)[:, 0].min() > 240
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["shrunk"], report["redrawn"]) == (1, 1)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the indices, which know the time of their shards, and the manifest, whose lines come in the order
    of the finish; that, sorted."""
    names = {path.name for path in folder.iterdir() if not path.name.endswith(".index.npy")} - {"manifest.jsonl"}
    files = {name: (folder / name).read_bytes() for name in names}
    return {**files, "manifest": b"".join(sorted((folder / "manifest.jsonl").read_bytes().splitlines(True)))}


KILLED = """
import os, signal, sys
from flipscale.cli import main
from flipscale.io import json_lines

append, lines = json_lines.append, []

def killed(*arguments):
    lines.append(1)
    if len(lines) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    append(*arguments)

json_lines.append = killed
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(120):
        (images / f"{number:03d}.png").write_bytes(image(number // 2, "PNG", 300, 400))
        (images / f"{number:03d}.txt").write_text(f"a caption {number}")
    options = ["--drop_duplicates", "--pairs_per_shard", "5", "--short_side", "64", "--num_workers", "1"]

    def command(out: str) -> list[str]:
        return ["prepare", "shards", str(images), str(tmp_path / out), *options]

    main(command("whole"))
    run = launch([sys.executable, "-c", KILLED, *command("cut")])
    assert run.returncode == -signal.SIGKILL, run.stderr
    manifest, done = tmp_path / "cut/manifest.jsonl", sorted((tmp_path / "cut").glob("0*.tar"))
    # Its worker may have gone on a little.
    assert 6 <= len(done) < 24
    with open(manifest, "a") as file:
        file.write('{"shard": 23, "writ')  # the half line of a kill in the middle of a write
    first = {path: path.stat().st_ino for path in done[:2]}
    main(command("cut"))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert {path: path.stat().st_ino for path in first} == first, "a finished shard was written again"


@pytest.mark.parametrize("kind", ["folder", "csv", "parquet"])
def test_changed_inputs_are_written_anew(folder: Path, tmp_path: Path, kind: str) -> None:
    """Pictures change under their names, one with its old size and time as by `cp -p`, and so does a caption."""
    table, names = tmp_path / f"images/list.{kind}", ["0.jpg", "1.png", "2.bmp", "3.jpg", "4.jpg", "sub/5.jpg"]

    def write_table() -> Path:
        if kind == "folder":
            return folder
        paths = [{"bytes": (folder / name).read_bytes()} for name in names] if kind == "parquet" else names
        rows = datasets.Dataset.from_dict({"image": paths, "caption": CAPTIONS})
        rows.to_csv(table) if kind == "csv" else rows.to_parquet(table)
        return table

    out, options = tmp_path / "out", ["--pairs_per_shard", "2", "--drop_duplicates"]
    shards_of([write_table(), *options], out)
    inode, state = (out / "00002.tar").stat().st_ino, (folder / "2.bmp").stat()
    (folder / "2.bmp").write_bytes(image(9, "BMP"))
    os.utime(folder / "2.bmp", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (folder / "2.bmp").stat().st_size == state.st_size
    shutil.copy(folder / "3.jpg", folder / "0.jpg")
    if kind == "folder":
        (folder / "1.TXT").write_text("another caption")
    source = shards_of([write_table(), *options], out)
    fresh = shards_of([write_table(), *options], tmp_path / "fresh")
    assert source.shard_sizes == fresh.shard_sizes == [2, 1, 2]
    for shard, size in enumerate(fresh.shard_sizes):
        for number in range(size):
            ours, theirs = source.read(shard, number), fresh.read(shard, number)
            assert (ours.image, ours.captions) == (theirs.image, theirs.captions)
    assert (out / "00002.tar").stat().st_ino == inode, "an unchanged shard was written again"


def test_other_options_and_wrong_sources_are_refused(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    def fails(source: Path, *flags: str, out: str = "out") -> str:
        return refused("prepare", "shards", source, tmp_path / out, *flags)

    shards_of([folder], tmp_path / "out")
    assert "short_side 256 (now 128)" in fails(folder, "--short_side", "128")
    (folder / "4.jpg").rename(folder / "6.jpg")
    (folder / "4.txt").rename(folder / "6.txt")
    assert "other files or columns" in fails(folder)
    (folder / "7.jpg").write_bytes(image(7))
    assert "pairs 6 (now 7)" in fails(folder)
    assert f"{folder} holds something" in fails(folder, out="images")
    (tmp_path / "empty").mkdir()
    assert "empty has no images" in fails(tmp_path / "empty")
    assert "nothing.csv does not exist" in fails(tmp_path / "nothing.csv")
    (folder / "pairs.csv").write_text("id,path,text\n0,0.jpg,a disc\n")
    assert re.search("no column words.*id, path, text", fails(folder / "pairs.csv", "--caption_column", "words"))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/dataset_info.json").write_text("{}")
    assert "cannot be loaded" in fails(tmp_path / "saved")
