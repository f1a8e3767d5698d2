"""The icons' data: splits, copies, files and faults, on a made-up collection; the download on request."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from transformers import AutoTokenizer

from examples.icons import data as icons
from examples.icons.data import prepare_icons
from flipscale.data.decode import decode_whole
from flipscale.data.sources.tar import TarSource

TRAINING = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")
SHAPES = ("disc", "ring", "bar", "wave", "star", "house")


def body(shape: str, seed: int, colour: str = "currentColor") -> str:
    """A path of a designer's own: the same shape drawn anew by each."""
    rng = np.random.default_rng([SHAPES.index(shape.split("-")[0]), seed])
    points = " ".join(f"L{x:.2f} {y:.2f}" for x, y in rng.uniform(1, 15, (12, 2)))
    return f'<path fill="none" stroke="{colour}" stroke-width="1.5" d="M8 8{points}"/>'


def made_up_set(prefix: str, drawings: dict[str, Any], licence: str = "MIT", author: str = "") -> dict[str, Any]:
    """The JSON of a set as Iconify has it."""
    info = {"name": prefix.title(), "author": {"name": author or f"{prefix}'s", "url": f"https://{prefix}.example"}}
    return {"prefix": prefix, "info": {**info, "license": {"spdx": licence, "title": licence}}, "icons": drawings}


def collection() -> list[dict[str, Any]]:
    """Six training designers, two held-out ones, and sets to leave out."""
    sets = []
    for seed, prefix in enumerate(TRAINING):
        own = {shape: {"body": body(shape, seed)} for shape in SHAPES[: 6 if seed else 3]}
        own |= {f"{prefix}-{shape}-{n}": {"body": body(shape, 100 * seed + n)} for shape in SHAPES for n in range(8)}
        sets.append(made_up_set(prefix, own))
    carbon = {shape: {"body": body(shape, 50), "width": 16, "height": 16} for shape in SHAPES}
    carbon |= {"odd-thing": {"body": body("disc", 51)}, "alpha-disc-1": {"body": body("ring", 51)}}
    sets.append(made_up_set("carbon", carbon))
    sets.append(made_up_set("ph", {shape: {"body": body(shape, 60)} for shape in SHAPES[:4]}))
    training = {one["prefix"]: one["icons"] for one in sets}
    training["beta"]["same-paths"] = {"body": body("disc", 50, "#d02020")}
    # The same picture by other means, and one that is hardly another.
    training["gamma"]["same-pixels"] = {"body": body("ring", 50).replace("M8 8", "M8,8")}
    training["delta"]["alike"] = {"body": body("bar", 50).replace('"1.5"', '"1.55"').replace("M8 8", "M8.05 8")}
    training["delta"]["coloured"] = {"body": '<path fill="#2040c0" d="M-8 0h32v8h-32z"/>'}
    training["delta"]["coloured"] |= {"width": 32, "left": -8}
    training["epsilon"]["empty"] = {"body": '<path fill="#fff" d="M0 0h16v16H0z"/>'}
    training["epsilon"]["broken"] = {"body": "<path"}
    training["epsilon"]["withdrawn"] = {"body": body("disc", 9), "hidden": True}
    sets.append(made_up_set("gnu", {"disc": {"body": body("disc", 8)}}, "GPL-3.0"))
    sets.append(made_up_set("fluent-emoji-flat", {"disc": {"body": body("disc", 8)}}))
    fork = {f"fork-{n}": {"body": body(shape, 60)} for n, shape in enumerate(SHAPES[:4] * 3)}
    sets.append(made_up_set("fork", fork))
    sets.append(made_up_set("meteor-icons", {"disc": {"body": body("disc", 13)}}))
    sets.append(made_up_set("sister", {"disc": {"body": body("disc", 12)}}, author="carbon's"))
    return sorted(sets, key=lambda one: one["prefix"])


@pytest.fixture(scope="module")
def tarball(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of the made-up collection."""
    path = tmp_path_factory.mktemp("package") / "json.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for one in [{"prefix": "../collections"}, *collection()]:
            content = json.dumps(one).encode()
            member = tarfile.TarInfo(f"package/json/{one['prefix']}.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module", autouse=True)
def folder(tarball: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the whole made-up collection, without a download, in shards and blocks of a few drawings."""
    out_dir = tmp_path_factory.mktemp("icons") / "icons"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(icons, "download", lambda packages, folder: dict.fromkeys(packages, tarball))
        patch.setattr(icons, "PAIRS_PER_SHARD", 50)
        patch.setattr(icons, "BLOCK", 20)
        prepare_icons(out_dir, processes=1)
        yield out_dir


def samples(shards: Path) -> list[tuple[str, int | None, bytes]]:
    """Caption, label and picture of every sample, as the loader sees them."""
    source = TarSource(str(shards))
    found = [source.read(shard, n) for shard, size in enumerate(source.shard_sizes) for n in range(size)]
    return [((sample.caption or b"").decode(), sample.label, sample.image) for sample in found]


def listed(folder: Path, part: str) -> list[tuple[str, str]]:
    """Set and name of each drawing of a part."""
    return [tuple(line.split("\t")) for line in (folder / f"{part}.tsv").read_text().splitlines()]  # type: ignore[misc]


def test_who_is_tested_on_what(folder: Path) -> None:
    """Names of five training sets or more by held-out designers, and by those of the test also names of none."""
    assert [name for _, name in listed(folder, "test")] == sorted(SHAPES)
    assert {prefix for prefix, _ in listed(folder, "test")} == {"carbon"}
    assert listed(folder, "validation") == [("ph", shape) for shape in sorted(SHAPES[:4])]
    assert listed(folder, "unseen") == [("carbon", "odd-thing")]
    for part in ("test", "validation", "unseen"):
        names = (folder / part / "classnames.txt").read_text().splitlines()
        assert [(names[label], label) for _, label, _ in samples(folder / part)] == [
            (caption, label) for caption, label, _ in samples(folder / part)
        ]
        assert (folder / part / "zeroshot_classification_templates.txt").read_text() == "{c}\n"


def test_what_is_left_out_and_why(folder: Path) -> None:
    """All drawings are somewhere."""
    report = json.loads((folder / "report.json").read_text())
    assert report["left_out"] == {
        **{"alike": 1, "same_paths": 1, "same_pixels": 1, "blank": 2, "withdrawn": 1, "licence": 1, "demo_test": 1},
        **{"relative": 14, "held_out_and_not_tested": 1},
    }
    assert report["relatives"] == [
        {"prefix": "fork", "of": "ph", "shared": 12, "num_icons": 12},
        {"prefix": "meteor-icons", "of": "tabler", "shared": 25, "num_icons": 1},
        {"prefix": "sister", "of": "carbon", "shared": 0, "num_icons": 1},
    ]
    images = sum(count["images"] for count in report["counts"].values())
    assert images + sum(report["left_out"].values()) == sum(len(one["icons"]) for one in collection())
    trained = dict.fromkeys(name for _, name in listed(folder, "train"))
    assert not trained.keys() & {"same-paths", "same-pixels", "alike", "empty", "broken", "withdrawn", "odd-thing"}
    assert report["counts"]["test"]["names_in_training"] == 6


def test_training_shards(folder: Path) -> None:
    """Captions are names without hyphens, designers are mixed, and the files are as listed."""
    assert [path.name for path in sorted((folder / "train").glob("*.tar"))] == [f"shard-{n:05d}.tar" for n in range(7)]
    found = samples(folder / "train")
    assert [caption for caption, _, _ in found] == [name.replace("-", " ") for _, name in listed(folder, "train")]
    assert len({prefix for prefix, _ in listed(folder, "train")[:20]}) > 3
    assert AutoTokenizer.from_pretrained(folder / "tokenizer").tokenize("alpha house") == ["▁alpha", "▁house"]
    text = (folder / "LICENSES.txt").read_text()
    assert "carbon: Carbon by carbon's (https://carbon.example), MIT: 6 test, 1 unseen" in text
    assert "gnu" not in text
    assert all(label is None for _, label, _ in found)
    pictures = dict(zip(listed(folder, "train"), found, strict=True))
    grey = cv2.imdecode(np.frombuffer(pictures["alpha", "disc"][2], np.uint8), cv2.IMREAD_UNCHANGED)
    assert grey.shape == (64, 64)
    coloured = decode_whole(pictures["delta", "coloured"][2])
    assert coloured.shape == (64, 64, 3)
    assert (coloured[:15] == 255).all(), "it is twice as wide as high"
    assert (coloured[17:31] == (32, 64, 192)).all()
    assert (coloured[33:] == 255).all()


def files_of(folder: Path) -> dict[Path, bytes]:
    """All files of a folder; shards' indices, which have times in them, are no part of what is prepared."""
    paths = [
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith((".index.npy", ".manifest", ".manifest.lock"))
    ]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


@pytest.mark.long
def test_killed_and_started_again_it_goes_on_and_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed before the tokenizer: what is whole is not made again, and what is not is."""

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    out_dir, work = tmp_path / "icons", tmp_path / ".icons.partial"
    with monkeypatch.context() as patch:
        patch.setattr(icons, "train_sentencepiece", die)
        with pytest.raises(KeyboardInterrupt):
            prepare_icons(out_dir, processes=2)
    assert not out_dir.exists()
    drawn, shards = sorted((work / ".drawn").glob("*.npz")), sorted((work / "train").glob("*.tar"))
    drawn[3].unlink()
    shards[2].rename(work / "train" / f".{shards[2].name}.partial.host.1.1")
    times = {path: path.stat().st_mtime_ns for path in (*drawn[:3], *shards[:2])}
    missing: list[icons.Block] = []
    draw_all = icons.draw_all

    def watched(tarball: Path, blocks_of: Any, *others: Any) -> None:
        missing.extend(block for some in blocks_of.values() for block in some if not block.path.exists())
        draw_all(tarball, blocks_of, *others)
        assert {path: path.stat().st_mtime_ns for path in times} == times

    monkeypatch.setattr(icons, "draw_all", watched)
    prepare_icons(out_dir, processes=1)
    assert len(missing) == 1
    assert files_of(out_dir) == files_of(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["icons"]
    capsys.readouterr()
    prepare_icons(out_dir)
    assert capsys.readouterr().out == f"{out_dir} is complete: nothing to do\n"
    with pytest.raises(ValueError, match=r"holds the fraction 1\.0 of @iconify.*, not 0\.5 of"):
        prepare_icons(out_dir, fraction=0.5)


@pytest.mark.long
def test_a_fraction_lies_in_the_whole(folder: Path, tmp_path: Path) -> None:
    """The first drawings of the training data, and the same tests. What another fraction left is not taken over."""
    work = tmp_path / ".part.partial"
    (work / ".drawn").mkdir(parents=True)
    (work / ".drawn" / "alpha.000.npz").write_bytes(b"of another fraction")
    (work / ".begun.json").write_text('{"fraction": 0.5}')
    icons.main([str(tmp_path / "part"), "--fraction", "0.25", "--num_workers", "1"])
    some, every = listed(tmp_path / "part", "train"), listed(folder, "train")
    assert some == every[: len(some)]
    assert 0.15 * len(every) < len(some) < 0.35 * len(every)
    for part in ("test", "validation", "unseen"):
        assert samples(tmp_path / "part" / part) == samples(folder / part)
    report = json.loads((tmp_path / "part" / "report.json").read_text())
    assert report["left_out"]["beyond_the_fraction"] > 0
    images = sum(count["images"] for count in report["counts"].values())
    assert images + sum(report["left_out"].values()) == sum(len(one["icons"]) for one in collection())
