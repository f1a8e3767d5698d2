"""Make the demo's data: emoji with names, by seven artists for training and by an eighth for testing.

    python examples/demo/data.py data/demo

All files depend only on pinned npm packages of Iconify and emojibase, so two machines get the same bytes.
"""

import hashlib
import io
import json
import random
import re
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.shared import check_renderer, download, read_report, slug, write_shard
from flipscale.data.tokenizers import train_sentencepiece
from flipscale.io.atomic import atomic_write
from flipscale.io.command_line import OutputFolder, parse_command
from flipscale.io.errors import UserError
from flipscale.io.progress import each
from flipscale.preparation.shard_writer import write_classes
from flipscale.preparation.worker_pool import worker_pool
from flipscale.process.console import report_user_errors, start_logging

# npm package of each artist and, last, of the CLDR short names ("grinning face"), with npm's digest.
PACKAGES: dict[str, list[str]] = json.loads((Path(__file__).parent / "packages.json").read_text(encoding="utf-8"))
*TRAIN_ARTISTS, TEST_ARTIST, NAMES = PACKAGES
IMAGE_SIZE = 64  # a crop of 70 % of the area is 54 px wide, so training at 32 px never enlarges
TRAIN_SHARDS = 8
VOCAB_SIZE = 4000
MAX_LENGTH = 16  # tokens; the longest caption has 12
MADE_BY = "examples/demo/data.py"  # marks a folder that this script wrote
_PARTS = ("unseen", "roles")
_FILES = {"train", "test", "groups", "subgroups", "unseen", "train_without_unseen", "roles", "tokenizer"}
_FILES |= {"report.json", "LICENSES.txt"}
_IMAGES_PER_LABELLED_SHARD = 2000
_SKIN_TONE = re.compile(r"1f3f[b-f]")  # the five Fitzpatrick modifiers in a code point sequence
_FLAGS_GROUP = 9  # emojibase's number of the Unicode group "Flags"


@dataclass(frozen=True)
class Drawing:
    """An emoji by one artist; `group` and `subgroup` are Unicode's, such as `food drink` and `food fruit`."""

    artist: str
    icon: str
    caption: str
    named: bool  # whether the caption is a CLDR name, not the icon's own
    flag: bool
    svg: str
    group: str = ""
    subgroup: str = ""

    @property
    def concept(self) -> str:
        """Slug of the caption, equal for all drawings of one thing."""
        return slug(self.caption)


@dataclass(frozen=True)
class Picture:
    """A rendered drawing."""

    drawing: Drawing
    png: bytes


@dataclass(frozen=True)
class IconSet:
    """Drawings, licence and author of an artist's package."""

    artist: str
    package: str
    licence: str
    author: str
    drawings: list[Drawing]


class Names:
    """CLDR names of emoji by code point and by icon name.

    Args:
        entries: emojibase's entries, with `label`, `hexcode`, `group` and `subgroup`.
        kinds: names of `groups` and `subgroups` by their numbers.
    """

    def __init__(self, entries: Iterable[dict[str, Any]], kinds: dict[str, dict[str, str]] | None = None) -> None:
        self.by_code_point: dict[str, str] = {}
        self.by_slug: dict[str, str] = {}
        self.by_joined: dict[str, str] = {}
        self.flags: set[str] = set()
        self.group_of: dict[str, tuple[str, str]] = {}  # group and subgroup by label
        for entry in entries:
            label, code_point = entry["label"], entry["hexcode"].lower()
            self.by_code_point[code_point] = label
            self.by_code_point.setdefault(code_point.replace("-fe0f", ""), label)
            self.by_slug.setdefault(slug(label), label)
            self.by_joined.setdefault(slug(label).replace("-", ""), label)
            if kinds is not None and "group" in entry:
                group, subgroup = (kinds[f"{kind}s"][str(entry[kind])] for kind in ("group", "subgroup"))
                self.group_of.setdefault(label, (group.replace("-", " "), subgroup.replace("-", " ")))
            if entry.get("group") == _FLAGS_GROUP:
                self.flags.add(label)

    def find(self, icon_names: Sequence[str], code_points: Sequence[str]) -> str | None:
        """Return the CLDR name of an icon; None if the names and code points match none."""
        for code_point in code_points:
            label = self.by_code_point.get(code_point) or self.by_code_point.get(code_point.replace("-fe0f", ""))
            if label:
                return label
        for name in icon_names:
            # EmojiOne has flag-for-belgium where CLDR has "flag: Belgium", and flag-for-chequered-flag.
            bare = name.removeprefix("flag-for-").removeprefix("flag-")
            flag = None if bare == name else self.by_slug.get(f"flag-{bare}") or self.by_slug.get(bare)
            label = self.by_slug.get(name) or flag
            if label:
                return label
        for name in icon_names:  # FxEmoji joins the words of its names: admissiontickets
            if label := self.by_joined.get(name.replace("-", "")):
                return label
        return None


def select_drawings(
    artist: str, icons: dict[str, Any], code_points: dict[str, str], names: Names, flags: bool = True
) -> list[Drawing]:
    """Return an artist's drawings with captions, in the order of the package.

    Hidden icons and skin tones (five near-copies of one picture) are left out.

    Args:
        artist: name of the set.
        icons: `icons.json` of the package.
        code_points: `chars.json` of the package: icon or alias by code point sequence.
        names: the CLDR names.
        flags: whether to keep flags, which all sets draw alike.
    """
    also_called: dict[str, list[str]] = defaultdict(list)
    for alias, target in icons.get("aliases", {}).items():
        if set(target) == {"parent"}:  # an alias that also turns or mirrors the icon is another drawing
            also_called[target["parent"]].append(alias)
    codes_of: dict[str, list[str]] = defaultdict(list)
    for code_point, icon in code_points.items():
        codes_of[icon].append(code_point)

    drawings = []
    for icon, entry in icons["icons"].items():
        icon_names = [icon, *also_called[icon]]
        codes = [code for name in icon_names for code in codes_of[name]]
        if entry.get("hidden") or "skin-tone" in icon or any(_SKIN_TONE.search(code) for code in codes):
            continue
        label = names.find(icon_names, codes)
        is_flag = label in names.flags or icon.startswith("flag-for-")
        if is_flag and not flags:
            continue
        width, height = (entry.get(side, icons.get(side, 16)) for side in ("width", "height"))
        box = f"{entry.get('left', 0)} {entry.get('top', 0)} {width} {height}"
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{IMAGE_SIZE}" height="{IMAGE_SIZE}" viewBox="{box}">{entry["body"]}</svg>'
        )
        caption, kinds = label or icon.replace("-", " "), names.group_of.get(label or "", ("", ""))
        drawings.append(Drawing(artist, icon, caption, label is not None, is_flag, svg, *kinds))
    return drawings


def load_icon_sets(directory: Path) -> list[IconSet]:
    """Download all packages to `directory` and return the training artists in order, then the test artist."""
    tarballs = download(dict(PACKAGES.values()), directory)
    names = Names(*(read_member(tarballs[PACKAGES[NAMES][0]], file) for file in ("en/data.json", "meta/groups.json")))
    sets = []
    for artist in (*TRAIN_ARTISTS, TEST_ARTIST):
        package = PACKAGES[artist][0]
        icons, chars, info = (read_member(tarballs[package], f"{part}.json") for part in ("icons", "chars", "info"))
        drawings = select_drawings(artist, icons, chars, names, flags=artist != TEST_ARTIST)
        sets.append(IconSet(artist, package, info["license"]["spdx"], info["author"]["name"], drawings))
    return sets


def read_member(tarball: Path, name: str) -> Any:
    """Return the parsed JSON file `package/NAME` of an npm tarball."""
    with tarfile.open(tarball) as tar:
        member = tar.extractfile(f"package/{name}")
        assert member is not None
        return json.load(io.TextIOWrapper(member, "utf-8"))


def render_svg(svg: str) -> bytes:
    """Return the PNG of an SVG: `IMAGE_SIZE` square, RGB on white."""
    import resvg_py

    # Without the system's fonts, because they differ between machines.
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    assert pixels is not None
    assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    # For small flat drawings, PNG is smaller than a good JPEG (1.8 against 2.4 kB) and decodes as fast.
    return cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 6])[1].tobytes()


def render(drawings: Sequence[Drawing]) -> list[bytes]:
    """Return the PNGs of the drawings."""
    svgs = [drawing.svg for drawing in drawings]
    with worker_pool(2) as pool:
        return list(each(pool.map(render_svg, svgs, chunksize=64), "drawing", "emoji", len(svgs)))


def write_pictures(
    directory: Path, pictures: Sequence[Picture], num_shards: int, class_names: Sequence[str] | None = None
) -> None:
    """Write `directory/shard-*.tar` with KEY.png, KEY.txt and KEY.json of each picture.

    With `class_names`, KEY.cls is the number of the caption among them, and the shards get `classnames.txt` and
    `zeroshot_classification_templates.txt`, in CLIP_benchmark's layout.
    """
    directory.mkdir(parents=True)
    per_shard = -(-len(pictures) // num_shards)

    def sample(number: int) -> tuple[str, dict[str, bytes]]:
        drawing = pictures[number].drawing
        files = {"png": pictures[number].png, "txt": drawing.caption.encode()}
        if class_names is not None:
            files["cls"] = str(class_names.index(drawing.caption)).encode()
        about = {"artist": drawing.artist, "concept": drawing.concept, "icon": drawing.icon}
        return f"{number:06d}", {**files, "json": json.dumps(about).encode()}

    for shard in range(num_shards):
        numbers = range(shard * per_shard, min((shard + 1) * per_shard, len(pictures)))
        write_shard(directory / f"shard-{shard:05d}.tar", map(sample, numbers))
    if class_names is not None:
        write_classes(directory, class_names)


def is_unseen(concept: str) -> bool:
    """Return whether `train_without_unseen` lacks a concept: a tenth of all, chosen by hash."""
    return int(hashlib.sha256(concept.encode()).hexdigest(), 16) % 10 == 0


def write_groups(directory: Path, parts: dict[str, list[Picture]], kind: str) -> dict[str, dict[str, int]]:
    """Write a labelled set whose classes are Unicode's `group` or `subgroup`, and return the counts of its parts.

    Pictures without a CLDR name are left out, and so are flags, which the test lacks.
    """
    fit = {
        part: [picture for picture in pictures if getattr(picture.drawing, kind) and not picture.drawing.flag]
        for part, pictures in parts.items()
    }
    names = sorted({getattr(picture.drawing, kind) for picture in fit["train"]})
    counts = {}
    for part, pictures in fit.items():
        chosen = [picture for picture in pictures if getattr(picture.drawing, kind) in names]
        counts[f"{directory.name}/{part}"] = _count(chosen)
        (directory / part).mkdir(parents=True)
        starts = range(0, len(chosen), _IMAGES_PER_LABELLED_SHARD)
        for shard, start in enumerate(starts):
            some = enumerate(chosen[start : start + _IMAGES_PER_LABELLED_SHARD], start)
            labelled = [(number, one.png, names.index(getattr(one.drawing, kind))) for number, one in some]
            samples = ((f"s{number:07d}", {"png": png, "cls": str(label).encode()}) for number, png, label in labelled)
            write_shard(directory / part / f"{shard}.tar", samples)
        (directory / part / "nshards.txt").write_text(str(len(starts)), encoding="utf-8")
    write_classes(directory, names)
    return counts


def role_couples(drawings: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return `{role, artist, woman, man}` of each role and artist; the last two are numbers of drawings.

    A role is a CLDR name such as "firefighter" with "woman firefighter" and "man firefighter" next to it.

    Args:
        drawings: artist and CLDR name of each drawing.
    """
    by_name: dict[tuple[str, str], int] = {}
    for number, drawing in enumerate(drawings):
        by_name.setdefault(drawing, number)
    names = {name for _, name in by_name}
    roles = sorted(name for name in names if {f"woman {name}", f"man {name}"} <= names)
    return [
        {
            "role": role,
            "artist": artist,
            "woman": by_name[artist, f"woman {role}"],
            "man": by_name[artist, f"man {role}"],
        }
        for artist in sorted({artist for artist, _ in by_name})
        for role in roles
        if (artist, f"woman {role}") in by_name and (artist, f"man {role}") in by_name
    ]


def write_roles(directory: Path, pictures: Sequence[Picture]) -> dict[str, int]:
    """Write the pictures of women and men in the same roles, with `roles.json` for `association.py`."""
    named = [picture for picture in pictures if picture.drawing.named]
    couples = role_couples((picture.drawing.artist, picture.drawing.caption) for picture in named)
    rows = sorted({couple[one] for couple in couples for one in ("woman", "man")})
    place = {row: number for number, row in enumerate(rows)}
    couples = [{**couple, **{one: place[couple[one]] for one in ("woman", "man")}} for couple in couples]
    chosen = [named[row] for row in rows]
    write_pictures(directory, chosen, num_shards=1)
    (directory / "roles.json").write_text(json.dumps(couples, indent=1) + "\n", encoding="utf-8")
    return _count(chosen)


def _count(pictures: Sequence[Picture]) -> dict[str, int]:
    return {"images": len(pictures), "captions": len({picture.drawing.caption for picture in pictures})}


def write_parts(out_dir: Path, pictures: Sequence[Picture], parts: Sequence[str]) -> dict[str, dict[str, int]]:
    """Write the parts of the demo, and return the numbers of images and captions of each part."""
    train = [picture for picture in pictures if picture.drawing.artist != TEST_ARTIST]
    random.Random(0).shuffle(train)
    test = [picture for picture in pictures if picture.drawing.artist == TEST_ARTIST]
    test.sort(key=lambda picture: picture.drawing.caption)
    counts: dict[str, dict[str, int]] = {}

    def write(part: str, chosen: Sequence[Picture], is_test: bool = False) -> None:
        counts[part] = _count(chosen)
        names = sorted({picture.drawing.caption for picture in chosen}) if is_test else None
        write_pictures(out_dir / part, chosen, 1 if is_test else TRAIN_SHARDS, names)

    write("train", train)
    write("test", test, is_test=True)
    for kind in ("group", "subgroup"):
        counts |= write_groups(out_dir / f"{kind}s", {"train": train, "test": test}, kind)
    if "unseen" in parts:
        unseen = [picture for picture in test if is_unseen(picture.drawing.concept)]
        concepts = {picture.drawing.concept for picture in unseen}
        write("unseen", unseen, is_test=True)
        write("train_without_unseen", [picture for picture in train if picture.drawing.concept not in concepts])
    if "roles" in parts:
        counts["roles"] = write_roles(out_dir / "roles", pictures)
    captions = sorted(picture.drawing.caption for picture in train)
    train_sentencepiece(captions, out_dir / "tokenizer", VOCAB_SIZE, MAX_LENGTH)
    return counts


def write_report(
    out_dir: Path, icon_sets: Sequence[IconSet], counts: dict[str, dict[str, int]], parts: Sequence[str]
) -> None:
    """Write `report.json`, the contents of the folder, and `LICENSES.txt`, the authors and licences."""
    sets = [
        {"artist": one.artist, "package": one.package, "licence": one.licence, "author": one.author}
        | {"images": len(one.drawings)}
        for one in icon_sets
    ]
    report = {"made_by": MADE_BY, "parts": sorted(parts), "counts": counts, "sets": sets}
    (out_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    lines = ["The images in this folder were rendered from these sets; the licence of each goes with its images.", ""]
    lines += [f"{i.artist}: {i.package} by {i.author}, {i.licence}, {len(i.drawings)} images" for i in icon_sets]
    lines += [f"captions: {PACKAGES[NAMES][0]}, MIT (Unicode CLDR short names)"]
    (out_dir / "LICENSES.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def prepare_demo(out_dir: Path, parts: Sequence[str] = ()) -> None:
    """Download, draw and write the demo's data; leave a complete folder as it is.

    Args:
        out_dir: folder to write.
        parts: optional parts to add: `unseen`, `roles`.

    Raises:
        UserError: the folder has other files, or a package cannot be downloaded.
        OSError: npm does not answer, or sends another package.
    """
    out_dir = out_dir.absolute()
    if report := read_report(out_dir, MADE_BY, "the demo"):
        if set(parts) <= set(report["parts"]):
            print(f"{out_dir} is complete: nothing to do")
            return
        parts = sorted({*parts, *report["parts"]})
        if others := sorted({path.name for path in out_dir.iterdir()} - _FILES):
            raise UserError(f"{out_dir} would be written anew, and holds {others[0]}; move that away")
    check_renderer()
    with tempfile.TemporaryDirectory() as downloads:
        icon_sets = load_icon_sets(Path(downloads))
    drawings = [drawing for icon_set in icon_sets for drawing in icon_set.drawings]
    pictures = [Picture(*pair) for pair in zip(drawings, render(drawings), strict=True)]
    install(out_dir, icon_sets, pictures, parts)


def install(out_dir: Path, icon_sets: Sequence[IconSet], pictures: Sequence[Picture], parts: Sequence[str]) -> None:
    """Write everything aside, put it in place of `out_dir`, and print a line about each part."""
    with atomic_write(out_dir) as folder:
        folder.mkdir(parents=True)
        counts = write_parts(folder, pictures, parts)
        write_report(folder, icon_sets, counts, parts)
    for part, count in counts.items():
        print(f"{out_dir / part}: {count['images']:,} images, {count['captions']:,} captions")


@dataclass(frozen=True)
class Options:
    """Download and draw the emoji of the demo: training shards, a test, a tokenizer.

    Args:
        directory: Folder to write, data/demo in the demo's recipes.
        with_unseen: Write also a test of a tenth of the concepts, and training data without these concepts.
        with_roles: Write also women and men in the same roles, for association.py.
    """

    directory: OutputFolder
    _: KW_ONLY
    with_unseen: bool = False
    with_roles: bool = False


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the data that the command line asks for."""
    with report_user_errors():
        start_logging()
        options = parse_command(Options, arguments)
        prepare_demo(options.directory, [part for part in _PARTS if getattr(options, f"with_{part}")])


if __name__ == "__main__":
    main()
