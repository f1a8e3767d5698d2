"""The demo's data, real image-text pairs: emoji by seven artists for training, by an eighth for testing.

Everything in it is a function of the pinned packages: two machines get the same bytes.
"""

import hashlib
import json
import random
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flipscale.data.sources.tar_file import add_member
from flipscale.data.tokenizers import train_sentencepiece
from flipscale.io.atomic import atomic_write
from flipscale.io.errors import UserError
from flipscale.preparation import demo_emoji
from flipscale.preparation.demo_emoji import Drawing, IconSet
from flipscale.preparation.demo_roles import role_couples, write_roles
from flipscale.preparation.labelled_set import write_labelled

VALIDATION_ARTIST = "twemoji"  # flat drawings like the test artist's; OpenMoji's black outlines would be another task
TRAIN_SHARDS = 8
VOCAB_SIZE = 4000
MAX_LENGTH = 16  # tokens; the longest caption has 12
SEED = 0
MADE_BY = "flipscale prepare demo"  # by this a later run recognises the folder
# All that the folder may hold.
_WRITTEN = {"train", "test", "groups", "subgroups", "validation", f"train_without_{VALIDATION_ARTIST}", "unseen"}
_WRITTEN |= {"train_without_unseen", "roles", "tokenizer", "report.json", "LICENSES.txt"}
TEMPLATES = ("{c}",)  # captions are bare names, so class prompts are too


@dataclass(frozen=True)
class Picture:
    """A rendered drawing."""

    drawing: Drawing
    png: bytes


def write_pictures(
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
                add_member(tar, f"{key}.png", pictures[index].png)
                add_member(tar, f"{key}.txt", drawing.caption.encode())
                if classnames is not None:
                    add_member(tar, f"{key}.cls", str(label_of[drawing.caption]).encode())
                add_member(tar, f"{key}.json", json.dumps(about).encode())
    if classnames is not None:
        _write_lines(directory / "classnames.txt", classnames)
        _write_lines(directory / "zeroshot_classification_templates.txt", TEMPLATES)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def shuffled(pictures: Iterable[Picture]) -> list[Picture]:
    """Return `pictures` in a random order that is the same each time."""
    pictures = list(pictures)
    random.Random(SEED).shuffle(pictures)
    return pictures


def is_unseen(concept: str) -> bool:
    """Return whether `train_without_unseen` lacks this concept: a tenth of all, chosen by hash, so it never changes."""
    return int(hashlib.sha256(concept.encode()).hexdigest(), 16) % 10 == 0


def validation_pictures(train: Sequence[Picture]) -> list[Picture]:
    """Return the validation artist's pictures that are like the test's: CLDR names, no flags, drawn by others too."""
    others = {picture.drawing.caption for picture in train if picture.drawing.artist != VALIDATION_ARTIST}
    chosen: dict[str, Picture] = {}
    for picture in train:
        drawing = picture.drawing
        fit = drawing.artist == VALIDATION_ARTIST and drawing.named and not drawing.flag
        if fit and drawing.caption in others:
            chosen.setdefault(drawing.caption, picture)
    return list(chosen.values())


def role_pictures(pictures: Sequence[Picture]) -> tuple[list[Picture], list[dict[str, Any]]]:
    """Return the pictures of women and men in roles, and the couples of them by their numbers among these."""
    named = [p for p in pictures if p.drawing.named]
    captions = sorted({p.drawing.caption for p in named})
    couples = role_couples([(p.drawing.artist, p.drawing.caption) for p in named], captions)
    rows = sorted({row for couple in couples for row in (couple["woman"], couple["man"])})
    place = {row: number for number, row in enumerate(rows)}
    couples = [{**couple, "woman": place[couple["woman"]], "man": place[couple["man"]]} for couple in couples]
    return [named[row] for row in rows], couples


def write_groups(
    out_dir: Path, train: Sequence[Picture], test: Sequence[Picture], kind: str
) -> dict[str, dict[str, int]]:
    """Write the pictures labelled by Unicode's `kind` of emoji, `group` or `subgroup`, to `out_dir/train` and
    `out_dir/test`, and return the numbers of images and captions of each. Flags, which the test lacks, and pictures
    without a CLDR name are left out."""
    fit = {
        part: [picture for picture in pictures if getattr(picture.drawing, kind) and not picture.drawing.flag]
        for part, pictures in (("train", train), ("test", test))
    }
    names = sorted({getattr(picture.drawing, kind) for picture in fit["train"]})
    chosen = {
        part: [picture for picture in pictures if getattr(picture.drawing, kind) in names]
        for part, pictures in fit.items()
    }
    labelled = {
        part: [(picture.png, "png", names.index(getattr(picture.drawing, kind))) for picture in pictures]
        for part, pictures in chosen.items()
    }
    write_labelled(out_dir, names, TEMPLATES[0], labelled)
    return {f"{out_dir.name}/{part}": _count(pictures) for part, pictures in chosen.items()}


def _count(pictures: Sequence[Picture]) -> dict[str, int]:
    return {"images": len(pictures), "captions": len({picture.drawing.caption for picture in pictures})}


def write_parts(out_dir: Path, pictures: Sequence[Picture], parts: Sequence[str]) -> dict[str, dict[str, int]]:
    """Write the parts of the demo to `out_dir`, and return the numbers of images and captions of each part."""
    train = shuffled(p for p in pictures if p.drawing.artist != demo_emoji.TEST_ARTIST)
    test = sorted((p for p in pictures if p.drawing.artist == demo_emoji.TEST_ARTIST), key=lambda p: p.drawing.caption)
    counts: dict[str, dict[str, int]] = {}

    def write(part: str, chosen: Sequence[Picture], is_test: bool = False, num_shards: int = TRAIN_SHARDS) -> None:
        counts[part] = _count(chosen)
        names = sorted({picture.drawing.caption for picture in chosen}) if is_test else None
        write_pictures(out_dir / part, chosen, 1 if is_test else num_shards, names)

    write("train", train)
    write("test", test, is_test=True)
    if "groups" in parts:
        for kind in ("group", "subgroup"):
            counts |= write_groups(out_dir / f"{kind}s", train, test, kind)
    if "validation" in parts:
        validation = sorted(validation_pictures(train), key=lambda picture: picture.drawing.caption)
        write("validation", validation, is_test=True)
        write(f"train_without_{VALIDATION_ARTIST}", [p for p in train if p.drawing.artist != VALIDATION_ARTIST])
    if "unseen" in parts:
        unseen = [picture for picture in test if is_unseen(picture.drawing.concept)]
        concepts = {picture.drawing.concept for picture in unseen}
        write("unseen", unseen, is_test=True)
        _write_lines(out_dir / "unseen" / "unseen_concepts.txt", sorted(concepts))
        write("train_without_unseen", [p for p in train if p.drawing.concept not in concepts])
    if "roles" in parts:
        shown, couples = role_pictures(pictures)
        write("roles", shown, num_shards=1)
        write_roles(out_dir / "roles", couples)
    train_sentencepiece(sorted(p.drawing.caption for p in train), out_dir / "tokenizer", VOCAB_SIZE, MAX_LENGTH)
    return counts


def write_report(
    out_dir: Path, icon_sets: Sequence[IconSet], counts: dict[str, dict[str, int]], parts: Sequence[str]
) -> None:
    """Write `report.json` (what is in the folder) and `LICENSES.txt` (authors and licences)."""
    report = {
        "made_by": MADE_BY,
        "parts": sorted(parts),
        "counts": counts,
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


def prepare_demo(
    out_dir: Path, *, with_validation: bool = False, with_unseen: bool = False, with_roles: bool = False
) -> None:
    """Download and render the demo's data into `out_dir`: train/, test/, groups/, subgroups/ and tokenizer/.

    A folder that is already complete is left as it is.

    Args:
        out_dir: the folder to write; its parents are created.
        with_validation: also write `validation/` (Twemoji as the test) and `train_without_twemoji/`, for model
            selection.
        with_unseen: also write `unseen/`, a tenth of the test's concepts, and `train_without_unseen/`, which lacks
            them.
        with_roles: also write `roles/`, women and men in the same roles, for the evaluation `association`.

    Raises:
        ValueError: the folder has other files, or the packages cannot be downloaded.
    """
    parts = ["groups"] + ["validation"] * with_validation + ["unseen"] * with_unseen + ["roles"] * with_roles
    out_dir = out_dir.absolute()
    present = _parts_present(out_dir)
    if present is not None:
        if set(parts) <= set(present):
            print(f"{out_dir} is complete: nothing to do")
            return
        parts = sorted({*parts, *present})
        others = sorted({path.name for path in out_dir.iterdir()} - _WRITTEN)
        if others:
            raise UserError(f"{out_dir} is written anew with what you ask for, and holds {others[0]}; move that away")
    elif out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise UserError(f"{out_dir} holds something that is not the demo; name a new folder, or an empty one")
    demo_emoji.check_renderer()

    with tempfile.TemporaryDirectory() as downloads:
        icon_sets = demo_emoji.load_icon_sets(Path(downloads))
    drawings = [drawing for icons in icon_sets for drawing in icons.drawings]
    pictures = [Picture(*pair) for pair in zip(drawings, demo_emoji.render(drawings), strict=True)]
    print("\n".join(install(out_dir, icon_sets, pictures, parts)))


def _parts_present(out_dir: Path) -> list[str] | None:
    """Return the extra parts in a folder that an earlier run wrote; None if no run wrote it."""
    try:
        report = json.loads((out_dir / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(report, dict) or report.get("made_by") != MADE_BY:
        return None
    parts = report.get("parts")
    return [part for part in parts if isinstance(part, str)] if isinstance(parts, list) else []


def install(
    out_dir: Path, icon_sets: Sequence[IconSet], pictures: Sequence[Picture], parts: Sequence[str]
) -> list[str]:
    """Write everything aside, replace `out_dir` by it, and return a line about each part."""
    with atomic_write(out_dir) as folder:
        folder.mkdir(parents=True)
        counts = write_parts(folder, pictures, parts)
        write_report(folder, icon_sets, counts, parts)
    return [
        f"{out_dir / part}: {count['images']:,} images, {count['captions']:,} captions"
        for part, count in counts.items()
    ]
