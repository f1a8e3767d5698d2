"""Photos for the benchmark: unpacked from Qt's resource files and cut to two sizes."""

import io
import struct
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from benchmarks.photos import main
from flipscale.data.sources.tar import TarSource


def resources(files: dict[str, bytes]) -> bytes:
    """A Qt resource container, format 3, of files in one folder `photos`."""
    names, contents, tree = b"", b"", b""

    def name(text: str) -> int:
        nonlocal names
        start = len(names)
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return start

    def node(name_at: int, flags: int, first: int, second: int) -> bytes:
        return struct.pack(">IHIIQ", name_at, flags, first, second, 0)

    tree = node(0, 2, 1, 1) + node(name("photos"), 2, len(files), 2)
    for path, content in files.items():
        tree += node(name(path), 0, 0, len(contents))
        contents += struct.pack(">I", len(content)) + content
    offsets = (3, 20, 20 + len(tree), 20 + len(tree) + len(contents))
    return b"qres" + struct.pack(">4I", *offsets) + tree + contents + names


def webp(side: int) -> bytes:
    noise = np.random.default_rng(side).integers(0, 256, (20, 25, 3), dtype=np.uint8)
    image = cv2.resize(noise, (side + 100, side), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, 80])[1].tobytes()


@pytest.fixture
def fake_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt-get and dpkg-deb that hand out a package of two photos, a small one and a text."""
    files = {"red_fish.webp": webp(450), "cat-2.webp": webp(420), "icon.webp": webp(64), "a.txt": b"text"}
    (tmp_path / "photos.rcc").write_bytes(resources(files))
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool, does in (("apt-get", "touch x.deb"), ("dpkg-deb", f"cp {tmp_path}/photos.rcc .")):
        (tools / tool).write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{does}\n")
        (tools / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))


def test_photos_of_two_sizes(fake_apt: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path / "out"), "--num_images", "16"])
    assert "16 JPEGs of" in capsys.readouterr().out
    for width, height in ((500, 400), (1024, 768)):
        source = TarSource(str(tmp_path / f"out/{width}x{height}"))
        assert source.shard_sizes == [2] * 8
        samples = [source.read(shard, number) for shard in range(8) for number in range(2)]
        sizes = np.array([Image.open(io.BytesIO(sample.image)).size for sample in samples]) / (width, height)
        assert 0.8 - 0.01 < sizes.min() < sizes.max() < 1.2 + 0.01
        assert {name for sample in samples for name in sample.caption.decode().split(", ")} == {"red fish", "cat"}
    with tarfile.open(tmp_path / "out/500x400/00000.tar") as tar:
        assert tar.getnames()[:2] == ["00000000.jpg", "00000000.txt"]
    main([str(tmp_path / "out")])
    assert "is complete: nothing to do" in capsys.readouterr().out
