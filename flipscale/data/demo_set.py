"""The demo's folder of real image-text pairs: emoji by seven artists to learn from, by an eighth to be tested on.

Everything in it is a function of the pinned packages: two machines get the same bytes.
"""

import hashlib
import io
import json
import os
import random
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flipscale.data import demo_emoji
from flipscale.data.demo_emoji import Drawing, IconSet
from flipscale.data.tokenizers import train_sentencepiece

VALIDATION_ARTIST = "openmoji"
TRAIN_SHARDS = 8
VOCAB_SIZE = 4000
MAX_LENGTH = 16  # tokens: 99.9 % of the captions are whole
SEED = 0
TEMPLATES = ("{c}",)  # a caption is the bare name, so that is what a class is called


@dataclass(frozen=True)
class Picture:
    """A drawing, rendered."""

    drawing: Drawing
    png: bytes


def write_shards(
    directory: Path, pictures: Sequence[Picture], num_shards: int, classnames: Sequence[str] | None = None
) -> None:
    """Write `pictures` in their order as `directory/shard-*.tar`, webdataset naming: KEY.png, KEY.txt, KEY.json.

    With `classnames` (which include every caption) a KEY.cls, the index of the caption in them, is added, and beside
    the shards `classnames.txt` and `zeroshot_classification_templates.txt`, as CLIP_benchmark lays them out.
    """
    directory.mkdir(parents=True)
    label_of = {name: index for index, name in enumerate(classnames or ())}
    per_shard = -(-len(pictures) // num_shards)
    for shard in range(num_shards):
        with tarfile.open(directory / f"shard-{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(shard * per_shard, min((shard + 1) * per_shard, len(pictures))):
                drawing, key = pictures[index].drawing, f"{index:06d}"
                about = {"artist": drawing.artist, "concept": drawing.concept, "icon": drawing.icon}
                _add(tar, f"{key}.png", pictures[index].png)
                _add(tar, f"{key}.txt", drawing.caption.encode())
                if classnames is not None:
                    _add(tar, f"{key}.cls", str(label_of[drawing.caption]).encode())
                _add(tar, f"{key}.json", json.dumps(about).encode())
    if classnames is not None:
        _write_lines(directory / "classnames.txt", classnames)
        _write_lines(directory / "zeroshot_classification_templates.txt", TEMPLATES)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # its time and owner are 0: the same bytes whoever writes it, whenever
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def shuffled(pictures: Iterable[Picture]) -> list[Picture]:
    """`pictures` in a random order that is always the same."""
    pictures = list(pictures)
    random.Random(SEED).shuffle(pictures)
    return pictures


def is_unseen(concept: str) -> bool:
    """True for the tenth of all concepts that `train_without_unseen` does without: by hash, so that it never changes."""
    return int(hashlib.sha256(concept.encode()).hexdigest(), 16) % 10 == 0


def validation_pictures(train: Sequence[Picture]) -> list[Picture]:
    """The validation artist's pictures that make a test like the real one: CLDR names, no flags, drawn by others too."""
    others = {picture.drawing.caption for picture in train if picture.drawing.artist != VALIDATION_ARTIST}
    chosen: dict[str, Picture] = {}
    for picture in train:
        drawing = picture.drawing
        fit = drawing.artist == VALIDATION_ARTIST and drawing.named and not drawing.flag
        if fit and drawing.caption in others:
            chosen.setdefault(drawing.caption, picture)
    return list(chosen.values())


def write_parts(out_dir: Path, pictures: Sequence[Picture], parts: Sequence[str]) -> dict[str, int]:
    """Write the named parts of the demo into `out_dir`; part -> number of images."""
    train = shuffled(p for p in pictures if p.drawing.artist != demo_emoji.TEST_ARTIST)
    test = sorted((p for p in pictures if p.drawing.artist == demo_emoji.TEST_ARTIST), key=lambda p: p.drawing.caption)
    counts: dict[str, int] = {}

    def write(part: str, chosen: Sequence[Picture], is_test: bool = False) -> None:
        counts[part] = len(chosen)
        names = sorted({picture.drawing.caption for picture in chosen}) if is_test else None
        write_shards(out_dir / part, chosen, 1 if is_test else TRAIN_SHARDS, names)

    write("train", train)
    write("test", test, is_test=True)
    if "validation" in parts:
        validation = sorted(validation_pictures(train), key=lambda picture: picture.drawing.caption)
        write("validation", validation, is_test=True)
        write("train_without_openmoji", [p for p in train if p.drawing.artist != VALIDATION_ARTIST])
    if "unseen" in parts:
        unseen = [picture for picture in test if is_unseen(picture.drawing.concept)]
        concepts = {picture.drawing.concept for picture in unseen}
        write("unseen", unseen, is_test=True)
        _write_lines(out_dir / "unseen" / "unseen_concepts.txt", sorted(concepts))
        write("train_without_unseen", [p for p in train if p.drawing.concept not in concepts])
    train_sentencepiece(sorted(p.drawing.caption for p in train), out_dir / "tokenizer", VOCAB_SIZE, MAX_LENGTH)
    return counts


def write_report(out_dir: Path, icon_sets: Sequence[IconSet], counts: dict[str, int], parts: Sequence[str]) -> None:
    """Write `report.json` (what is in the folder) and `LICENSES.txt` (whose it is)."""
    report = {
        "parts": sorted(parts),
        "images": counts,
        "sets": [
            {
                "artist": icons.artist,
                "package": icons.package,
                "licence": icons.licence,
                "author": icons.author,
                "images": len(icons.drawings),
            }
            for icons in icon_sets
        ],
        "names": {"package": demo_emoji.NAMES_PACKAGE, "licence": "MIT"},
    }
    (out_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _write_lines(
        out_dir / "LICENSES.txt",
        [
            "The images in this folder were rendered from these sets; the licence of each goes with its images.",
            "",
            *(f"{i.artist}: {i.package} by {i.author}, {i.licence}, {len(i.drawings)} images" for i in icon_sets),
            f"captions: {demo_emoji.NAMES_PACKAGE}, MIT (Unicode CLDR short names)",
        ],
    )


def prepare_demo(out_dir: Path, *, with_validation: bool = False, with_unseen: bool = False) -> None:
    """Make `out_dir` the demo's data: train/, test/ and tokenizer/, downloaded and rendered.

    A folder that is already complete is left as it is.

    Args:
        out_dir: the folder to make; its parent is made too.
        with_validation: also `validation/` (OpenMoji as the test) and `train_without_openmoji/`, to choose by.
        with_unseen: also `unseen/`, a tenth of the test's concepts, and `train_without_unseen/`, which lacks them.

    Raises:
        ValueError: the folder holds something else, or the packages cannot be downloaded.
    """
    parts = ["validation"] * with_validation + ["unseen"] * with_unseen
    report = out_dir / "report.json"
    if report.exists():
        present = json.loads(report.read_text(encoding="utf-8"))["parts"]
        if set(parts) <= set(present):
            print(f"{out_dir} is complete: nothing to do")
            return
        parts = sorted({*parts, *present})
    elif out_dir.exists() and any(out_dir.iterdir()):
        raise ValueError(f"{out_dir} has files in it that are not the demo's; name another folder, or empty this one")

    aside = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as downloads:
        icon_sets = demo_emoji.load_icon_sets(Path(downloads))
    drawings = [drawing for icons in icon_sets for drawing in icons.drawings]
    pictures = [Picture(*pair) for pair in zip(drawings, demo_emoji.render(drawings), strict=True)]
    counts = write_parts(aside, pictures, parts)
    write_report(aside, icon_sets, counts, parts)
    shutil.rmtree(out_dir, ignore_errors=True)
    os.replace(aside, out_dir)
    for part, count in counts.items():
        print(f"{out_dir / part}: {count:,} images")
