"""What `prepare inspect` says of shards, and the sheet that it draws."""

import json
import os
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.conftest import encoded, write_tar
from PIL import Image

from flipscale.cli import main


def jpeg(colour: tuple[int, int, int], width: int, height: int) -> bytes:
    return encoded(Image.new("RGB", (width, height), colour), "JPEG", quality=95)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two shards of three good samples in all, and one with each fault; the second shard is cut short."""
    folder = tmp_path / "mixed"
    small = jpeg((9, 9, 9), 50, 50)
    write_tar(folder / "0.tar", {
        "0.jpg": jpeg((250, 10, 10), 300, 200), "0.txt": b"a red disc",
        "1.jpg": b"no picture", "1.txt": b"a green bar",
        "2.jpg": jpeg((10, 10, 250), 80, 100), "2.txt": b"the blue ring of a long caption",
        "3.jpg": small, "3.txt": b"\xff\xfe", "4.jpg": small, "4.txt": b" ",
    })  # fmt: skip
    grey = jpeg((128, 128, 128), 64, 64)
    files = {"5.txt": b"a grey cross", "5.jpg": grey, "6.txt": b"a red bar", "6.jpg": bytes(5000)}
    write_tar(folder / "1.tar", files)
    os.truncate(folder / "1.tar", 4096)
    return folder


def test_figures_and_faults(mixed: Path, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sheet = tmp_path / "sheet.png"
    command = ["prepare", "inspect", str(mixed), "--sheet", str(sheet), "--tokenizer", str(tokenizer_dir)]
    main([*command, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["shards"], found["samples"], found["checked"], found["good"]) == (2, 6, 6, 3)
    assert found["kinds"] == {"JPEG RGB": 3}
    assert found["width"] == {"min": 64, "median": 80, "p95": pytest.approx(278), "max": 300, "mean": 148}
    assert found["short_side"]["max"] == 200
    assert found["caption_characters"]["min"] == 10
    assert (found["caption_tokens"]["median"], found["caption_tokens"]["max"]) == (3, 7)
    counts = {cause: entry["count"] for cause, entry in found["bad"].items()}
    assert counts == {"truncated_shard": 1, "undecodable_image": 1, "undecodable_caption": 1, "missing_caption": 1}
    assert found["bad"]["undecodable_image"]["examples"][0].startswith(f"{mixed}/0.tar#1: 10 bytes starting b'no pict")
    main(command)
    assert "0.tar#3" in capsys.readouterr().out


def test_the_sheet_shows_images_and_captions(mixed: Path, tmp_path: Path) -> None:
    sheet, other = tmp_path / "sheet.png", tmp_path / "other"
    other.write_text("kept")
    sheet.symlink_to(other)
    main(["prepare", "inspect", str(mixed), "--sheet", str(sheet)])
    assert other.read_text() == "kept"
    pixels = np.asarray(Image.open(sheet)).astype(int)
    middles = [pixels[8 + 88, 8 + 88 + 184 * column] for column in range(4)]
    colours = [(250, 10, 10), (10, 10, 250), (128, 128, 128), (255, 255, 255)]
    assert all(np.abs(middle - colour).max() < 8 for middle, colour in zip(middles, colours, strict=True))
    below = pixels[190:225]
    inked = [(below[:, 8 + 184 * column : 180 + 184 * column] < 128).any() for column in range(4)]
    assert inked == [True, True, True, False]


@pytest.mark.parametrize("kind", ["url", "parquet"])
def test_other_places_of_pairs(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards at a URL come through the cache, and Parquet files as training reads them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    place, names, picture = str(tmp_path / "pairs"), {"0", "1"}, jpeg((250, 10, 10), 60, 40)
    if kind == "url":
        place = "memory://bucket/pairs/{0..0}.tar"
        write_tar(tmp_path / "0.tar", {f"{name}.{end}": text for name in names for end, text in
                                       (("jpg", picture), ("txt", b"a red disc"))})  # fmt: skip
        fsspec.filesystem("memory").pipe("/bucket/pairs/0.tar", (tmp_path / "0.tar").read_bytes())
    else:
        (tmp_path / "pairs").mkdir()
        table = {"image": [{"bytes": picture, "path": None}] * 2, "caption": ["a red disc", "a disc"]}
        pq.write_table(pa.table(table), tmp_path / "pairs/0.parquet")
    main(["prepare", "inspect", place, "--sheet", str(tmp_path / "sheet.png"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["shards"], found["samples"], found["good"], found["width"]["max"]) == (1, 2, 2, 60)
