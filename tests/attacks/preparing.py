"""Pictures, commands and checks for attacks on `flipscale prepare`."""

import io
import json
from pathlib import Path

import numpy as np
from attacks import ground
from attacks.attack import Ended, later
from PIL import Image

from flipscale.data.sources.tar import TarSource


def picture(number: int, kind: str = "JPEG", width: int = 60, height: int = 40) -> bytes:
    """Return a picture unlike those of other numbers."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def images(folder: Path, count: int = 4) -> None:
    """Write `0.jpg`, `1.jpg`, ... to `folder/in`."""
    (folder / "in").mkdir()
    for number in range(count):
        (folder / f"in/{number}.jpg").write_bytes(picture(number))


def command(source: str, *flags: str) -> list[str]:
    """Return the command that writes the shards `out`."""
    return ["prepare", "shards", source, "out", "--num_workers", "1", *flags]


@later
def keeps(folder: Path, ended: Ended, written: int, **causes: int) -> None:
    """Check the number of written pairs, and of those left out for each cause, which are all named."""
    report = json.loads((folder / "out/report.json").read_text())
    assert (report["written"], report["left_out"]) == (written, causes)
    assert len(TarSource(str(folder / "out"))) == written
    lines = [json.loads(line) for line in (folder / "out/left_out.jsonl").read_text().splitlines()]
    assert len(lines) == sum(causes.values())
    assert all(line["key"] and line["detail"] for line in lines)
    for cause, count in causes.items():
        row = next(line for line in ended.stdout.splitlines() if line.strip().startswith(cause))
        assert f"{count:,}" in row


@later
def on_shards(folder: Path, *arguments: str) -> list[str]:
    """A `prepare` command in a folder with shards, the file `file` and an empty folder."""
    ground.shards(folder)
    (folder / "file").write_text("mine")
    (folder / "empty").mkdir()
    return ["prepare", *arguments]
