"""Make the icons' data: a third of a million drawings with names, of 230 sets in Iconify's collection.

    python examples/icons/data.py data/icons [--fraction 0.125]

A *set* has one designer or team, and each of its drawings has a name such as `arrow-bend-down-left`. The name without
its hyphens is the caption. All files depend only on the pinned npm package and the fraction, so two machines get the
same bytes. The files are made in `.NAME.partial`. A killed run continues there and ends with the same bytes.
"""

import hashlib
import json
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from filelock import FileLock, Timeout

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.shared import check_renderer, download, read_report, write_shard
from flipscale.data.tokenizers import train_sentencepiece
from flipscale.io.atomic import atomic_write, partial_path, remove, sync, unique_partial_path, write_text
from flipscale.io.command_line import OutputFolder, parse_command
from flipscale.io.cores import usable_cores
from flipscale.io.errors import UserError
from flipscale.io.options import ShareAboveZero, Threads
from flipscale.io.paths import check_disk_space
from flipscale.io.progress import Progress, each
from flipscale.preparation.audit.duplicates import (
    LEAST_LIKENESS,
    MOST_DIFFERENCE,
    likeness,
    look,
    near_hashes,
    thumbnail,
)
from flipscale.preparation.shard_writer import write_classes
from flipscale.preparation.worker_pool import worker_pool
from flipscale.process.console import report_user_errors, start_logging

PACKAGE = "@iconify/json@2.2.535"
DIGEST = "nAV60ACUSHwnsb6fsp+letHlNkrwO4vzBtcC6B4EDHErQQfezk7E3nJdnwJjve6OCfMNO0uVT5Vrgna9/NCmXw=="
MADE_BY = "examples/icons/data.py"  # marks a folder that this script wrote
IMAGE_SIZE = 64  # a crop of 70 % of the area is 54 px wide, so training at 32 px never enlarges
VOCAB_SIZE = 8000
MAX_LENGTH = 16  # tokens; longer captions are cut
PAIRS_PER_SHARD = 8192

# These allow derived works, some under conditions that LICENSES.txt names. NonCommercial and GPL sets are left out.
LICENCES = {
    *("Apache-2.0", "BSD-3-Clause", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC0-1.0", "ISC", "MIT"),
    *("MPL-2.0", "OFL-1.1", "Unlicense"),
}
TEST = ("carbon", "tabler", "iconoir")
VALIDATION = ("ph", "hugeicons", "ri")
HELD_OUT = TEST + VALIDATION
# Sets by the demo's test artist are left out, because a model of these data may be tested there.
DEMO_TEST = ("fluent-emoji", "fluent-emoji-flat", "fluent-emoji-high-contrast")
NAMED_BY = 5  # training sets that must have a name before it is tested
# A set is a fork of a held-out set if it shares at least this part of its drawings, and at least so many. Simple signs
# (a plus, three lines) look the same in all sets.
RELATED_SHARE, RELATED_LEAST = 0.05, 10
# Forks by equal pixels in the pinned package: set, held-out set, and number of equal pictures. Listed here because a
# fraction of the drawings cannot show it. The next set shares 4.1 %.
BY_PIXELS = {"heroicons-outline": ("tabler", 22), "meteor-icons": ("tabler", 25)}

BLOCK = 1024  # drawings in a block
# Row of a picture: bytes of its PNG, digest of its pixels, perceptual hash, whether it is nearly blank, and whether it
# has no PNG because it is blank or cannot be drawn. The hash of a nearly blank picture is useless.
ROW = np.dtype([("size", "<u4"), ("pixels", "<u8"), ("looks", "<u8"), ("faint", "?"), ("blank", "?")])
_BLANK_BELOW = 16  # of 255 levels from white; a lighter picture shows nothing
_SET_FILE = re.compile(r"package/json/([a-z0-9-]+)\.json")
_PATH_DATA = re.compile(r'\bd="([^"]+)"')
_LEAST_PATH_DATA = 20  # characters; shorter path data, such as a line from edge to edge, is in many sets
_DOWNLOAD, _DRAWN, _BEGUN = ".download", ".drawn", ".begun.json"  # temporary files
_REPORT = "report.json"
_LEAST_BYTES, _TRAIN_BYTES = 200_000_000, 1_150_000_000  # package and test sets; all training drawings and shards
_CELLS, _PAIRS_AT_ONCE = 8, 1 << 16


@dataclass(frozen=True)
class Icon:
    """A drawing: its set, its name in the set, its SVG without the outer element, and its viewBox."""

    prefix: str
    name: str
    body: str
    box: str

    @property
    def svg(self) -> str:
        """SVG of `IMAGE_SIZE` square. A drawing that is not square is centred; the current colour is black."""
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="black" '
            f'width="{IMAGE_SIZE}" height="{IMAGE_SIZE}" viewBox="{self.box}">{self.body}</svg>'
        )

    @property
    def paths(self) -> int:
        """64-bit digest of the paths in any order and colour; 0 if they are too short to identify the drawing."""
        data = sorted(_PATH_DATA.findall(self.body))
        return digest("\n".join(data).encode()) if sum(map(len, data)) >= _LEAST_PATH_DATA else 0


@dataclass(frozen=True)
class IconSet:
    """A set without its drawings; `names` and `paths` (uint64 digests) have an entry for each drawing."""

    prefix: str
    title: str
    author: str
    url: str
    licence: str
    names: tuple[str, ...]
    paths: np.ndarray
    num_withdrawn: int

    def narrowed(self, fraction: float) -> "IconSet":
        """Return the set with the drawings of a fraction of the training data; a held-out set keeps all."""
        if self.prefix in HELD_OUT:
            return self
        chosen = np.array([place_of(self.prefix, name) < fraction for name in self.names], bool)
        names = tuple(name for name, is_chosen in zip(self.names, chosen, strict=True) if is_chosen)
        return replace(self, names=names, paths=self.paths[chosen])


def digest(content: bytes) -> int:
    """Return a 64-bit digest, never 0."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") or 1


def caption(name: str) -> str:
    """Return the words of a drawing's name."""
    return name.replace("-", " ")


def place_of(prefix: str, name: str) -> float:
    """Return the place of a drawing in the order of training, from 0 to below 1.

    The place is a hash, so the first eighth of the drawings is a part of the first quarter.
    """
    return digest(f"flipscale prepare icons {prefix}:{name}".encode()) / 2**64


def read_sets(tarball: Path) -> Iterator[tuple[IconSet, list[Icon]]]:
    """Yield the sets of the package with their drawings, in the order of the tarball."""
    with tarfile.open(tarball, "r|gz") as tar:
        for member in tar:
            if _SET_FILE.fullmatch(member.name):
                file = tar.extractfile(member)
                assert file is not None
                yield _icon_set(json.load(file))


def _icon_set(content: dict[str, Any]) -> tuple[IconSet, list[Icon]]:
    info, prefix = content["info"], content["prefix"]
    icons = []
    for name, entry in content["icons"].items():
        if not entry.get("hidden"):
            numbers = [entry.get(side, content.get(side, 16)) for side in ("width", "height")]
            corner = [entry.get(side, content.get(side, 0)) for side in ("left", "top")]
            icons.append(Icon(prefix, name, entry["body"], " ".join(f"{number:g}" for number in corner + numbers)))
    author, licence = info["author"], info["license"]
    icon_set = IconSet(
        *(prefix, info["name"], author["name"], author.get("url") or licence.get("url") or "", licence["spdx"]),
        tuple(icon.name for icon in icons),
        np.array([icon.paths for icon in icons], np.uint64),
        len(content["icons"]) - len(icons),
    )
    return icon_set, icons


def find_relatives(sets: Sequence[IconSet]) -> list[dict[str, Any]]:
    """Return the forks of held-out sets and the other sets by their authors, each with its closest held-out set."""
    held = [one for one in sets if one.prefix in HELD_OUT]
    relatives = []
    for one in sets:
        if one.prefix in HELD_OUT:
            continue
        shared = {other.prefix: int((np.isin(one.paths, other.paths) & (one.paths > 0)).sum()) for other in held}
        by_author = {other.prefix: shared[other.prefix] for other in held if other.author == one.author}
        of, most = max((by_author or shared).items(), key=lambda item: item[1], default=("", 0))
        if one.prefix in BY_PIXELS:
            of, most = BY_PIXELS[one.prefix]
        elif not by_author and most < max(RELATED_LEAST, RELATED_SHARE * len(one.names)):
            continue
        relatives.append({"prefix": one.prefix, "of": of, "shared": most, "num_icons": len(one.names)})
    return relatives


def why_left_out(icon_set: IconSet, relatives: Sequence[dict[str, Any]]) -> str | None:
    """Return why a set is left out; None if it is used."""
    if icon_set.licence not in LICENCES:
        return "licence"
    if icon_set.prefix in DEMO_TEST:
        return "demo_test"
    return "relative" if icon_set.prefix in {relative["prefix"] for relative in relatives} else None


@dataclass(frozen=True)
class Block:
    """Drawings of a set. Its file `SET.NUMBER.npz` holds a `ROW` for each, and their PNGs in a row."""

    folder: Path
    prefix: str
    number: int
    names: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self.folder / f"{self.prefix}.{self.number:03d}.npz"


def blocks(folder: Path, prefix: str, names: Sequence[str]) -> list[Block]:
    """Return the blocks of a set's drawings."""
    starts = range(0, len(names), BLOCK)
    return [Block(folder, prefix, start // BLOCK, tuple(names[start : start + BLOCK])) for start in starts]


def render(svg: str) -> np.ndarray | None:
    """Return the picture of an SVG, uint8 BGR `(IMAGE_SIZE, IMAGE_SIZE, 3)`, on white; None if it cannot be drawn."""
    import resvg_py

    try:
        # Without the system's fonts, because they differ between machines.
        png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    except ValueError:
        return None
    pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    return pixels if pixels is not None and pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) else None


def encode(pixels: np.ndarray) -> bytes:
    """Return the PNG of uint8 BGR `(height, width, 3)`; a grey picture gets one channel, two thirds of the bytes."""
    is_grey = (pixels == pixels[..., :1]).all()
    stored = np.ascontiguousarray(pixels[..., 0]) if is_grey else pixels
    return cv2.imencode(".png", stored, [cv2.IMWRITE_PNG_COMPRESSION, 6])[1].tobytes()


def draw_all(tarball: Path, blocks_of: Mapping[str, Sequence[Block]], pool: Executor, at_once: int) -> None:
    """Draw the missing blocks, at most `at_once` of them in memory.

    Raises:
        OSError: a worker died, or the disk is full.
    """
    every = [block for chosen in blocks_of.values() for block in chosen]
    missing = {block for block in every if not block.path.exists()}
    total, left = (sum(len(block.names) for block in some) for some in (every, missing))

    def work() -> Iterator[tuple[Block, list[str]]]:
        for icon_set, icons in read_sets(tarball):
            svgs = {icon.name: icon.svg for icon in icons}
            for block in blocks_of.get(icon_set.prefix, ()):
                if block in missing:
                    yield block, [svgs[name] for name in block.names]

    waiting: dict[Future[None], int] = {}
    todo = work() if missing else iter(())
    with Progress(total, "drawing", "icons", initial=total - left) as progress:
        while True:
            for block, svgs in islice(todo, at_once - len(waiting)):
                waiting[pool.submit(_draw, block, svgs)] = len(svgs)
            if not waiting:
                return
            for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                done.result()
                progress.update(waiting.pop(done))


def _draw(block: Block, svgs: Sequence[str]) -> None:
    rows, pngs = np.zeros(len(svgs), ROW), []
    for row, svg in zip(rows, svgs, strict=True):
        pixels = render(svg)
        if pixels is None or 255 - int(pixels.min()) < _BLANK_BELOW:
            row["blank"] = True
            continue
        png = encode(pixels)
        row["looks"], row["faint"] = look(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
        row["size"], row["pixels"] = len(png), digest(pixels.tobytes())
        pngs.append(png)
    # Under a name of this process, because a worker of a killed run may live a little into the next run.
    with atomic_write(block.path, unique_partial_path(block.path)) as partial:
        with open(partial, "wb") as file:
            np.savez(file, rows=rows, pngs=np.frombuffer(b"".join(pngs), np.uint8))
        sync(partial)


@dataclass(frozen=True)
class Drawings:
    """All drawings by number, a third of a gigabyte.

    Args:
        prefixes: set of each drawing.
        paths: digest of the paths of each drawing, uint64.
        rows: `ROW` of each picture.
        pngs: picture of each drawing; empty for blank ones.
    """

    prefixes: list[str]
    names: list[str]
    paths: np.ndarray
    rows: np.ndarray
    pngs: list[bytes]

    @classmethod
    def read(cls, blocks: Sequence[Block], paths: np.ndarray) -> "Drawings":
        """Return the drawings of finished blocks."""
        rows: list[np.ndarray] = [np.zeros(0, ROW)]
        pngs: list[bytes] = []
        for block in blocks:
            with np.load(block.path) as stored:
                rows.append(stored["rows"])
                content = stored["pngs"].tobytes()
            ends = np.cumsum(rows[-1]["size"]).tolist()
            pngs += [content[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        names = [(block.prefix, name) for block in blocks for name in block.names]
        return cls([prefix for prefix, _ in names], [name for _, name in names], paths, np.concatenate(rows), pngs)

    def files(self, number: int, labels: Mapping[str, int]) -> dict[str, bytes]:
        """Return the files of a sample by extension; `labels` has the classes of the captions of a test set."""
        text = caption(self.names[number])
        files = {"png": self.pngs[number], "txt": text.encode()}
        return {**files, "cls": str(labels[text]).encode()} if labels else files


@dataclass(frozen=True)
class Part:
    """A folder of shards: the numbers of its drawings in order, int64."""

    name: str
    numbers: np.ndarray
    is_test: bool


def find_copies(drawings: Drawings, held: np.ndarray, train: np.ndarray) -> dict[str, np.ndarray]:
    """Return the training drawings that a held-out designer has too: the same paths, the same pixels, or nearly so.

    Args:
        drawings: all drawings.
        held: numbers of the held-out drawings, int64.
        train: numbers of the training drawings, int64.
    """
    rows, paths = drawings.rows, drawings.paths
    same_paths = np.isin(paths[train], paths[held]) & (paths[train] > 0)
    same_pixels = np.isin(rows["pixels"][train], rows["pixels"][held]) & ~same_paths
    left = train[~same_paths & ~same_pixels]
    asked, known = (numbers[~rows["faint"][numbers]] for numbers in (held, left))
    thumbnails, alike = _Thumbnails(drawings), np.zeros(len(rows), bool)
    pieces = near_hashes(rows["looks"][asked], rows["looks"][known])
    for one, other in each(pieces, "near duplicates", "pieces", delay=2):
        is_new = ~alike[known[other]]
        firsts, seconds = asked[one[is_new]], known[other[is_new]]
        fit = thumbnails.may_be_alike(firsts, seconds)
        for first, second in zip(firsts[fit].tolist(), seconds[fit].tolist(), strict=True):
            if not alike[second] and likeness(thumbnails.of(first), thumbnails.of(second)) >= LEAST_LIKENESS:
                alike[second] = True
    return {"same_paths": train[same_paths], "same_pixels": train[same_pixels], "alike": np.flatnonzero(alike)}


class _Thumbnails:
    """Thumbnails of drawings; the mean grey of 8 x 8 cells, which stays in memory, tells most candidates apart."""

    def __init__(self, drawings: Drawings):
        self._drawings = drawings
        self._cells = np.zeros((len(drawings.rows), _CELLS, _CELLS), np.float32)
        self._is_known = np.zeros(len(drawings.rows), bool)

    def of(self, number: int) -> np.ndarray:
        """Return the thumbnail of a drawing, uint8 `(32, 32, 3)`."""
        pixels = cv2.imdecode(np.frombuffer(self._drawings.pngs[number], np.uint8), cv2.IMREAD_COLOR)
        assert pixels is not None
        return thumbnail(pixels)

    def may_be_alike(self, firsts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Return which pairs may have a likeness above 0, because means of cells differ no more than pixels do."""
        is_asked = np.zeros(len(self._is_known), bool)
        is_asked[firsts] = is_asked[seconds] = True
        for number in np.flatnonzero(is_asked & ~self._is_known).tolist():
            small = self.of(number).astype(np.float32)
            self._cells[number] = small.reshape(_CELLS, 32 // _CELLS, _CELLS, 32 // _CELLS, 3).mean(axis=(1, 3, 4))
        self._is_known |= is_asked
        fit = np.zeros(len(firsts), bool)
        for start in range(0, len(firsts), _PAIRS_AT_ONCE):
            some = slice(start, start + _PAIRS_AT_ONCE)
            apart = np.abs(self._cells[firsts[some]] - self._cells[seconds[some]])
            tiles = apart.reshape(len(apart), 4, _CELLS // 4, 4, _CELLS // 4).mean(axis=(2, 4))
            fit[some] = tiles.max(axis=(1, 2)) <= MOST_DIFFERENCE + 0.01  # rounding error
        return fit


def choose_parts(drawings: Drawings, num_sets: Mapping[str, int]) -> tuple[list[Part], Counter[str]]:
    """Return the parts, and how many drawings each cause leaves out; `num_sets` counts the training sets of a name."""
    shown = ~drawings.rows["blank"]
    is_held = np.isin(drawings.prefixes, HELD_OUT)
    held, train = np.flatnonzero(shown & is_held), np.flatnonzero(shown & ~is_held)
    copies = find_copies(drawings, held, train)
    train = np.setdiff1d(train, np.concatenate(list(copies.values())))
    places = np.array([place_of(drawings.prefixes[number], drawings.names[number]) for number in train])
    parts = [Part("train", train[np.argsort(places, kind="stable")], is_test=False)]

    counts = np.array([num_sets.get(drawings.names[number], 0) for number in held], int)
    by = np.array([drawings.prefixes[number] for number in held], dtype=object)
    chosen = {
        "validation": np.isin(by, VALIDATION) & (counts >= NAMED_BY),
        "test": np.isin(by, TEST) & (counts >= NAMED_BY),
        "unseen": np.isin(by, TEST) & (counts == 0),
    }
    for name, mask in chosen.items():
        order = sorted(held[mask].tolist(), key=lambda number: (drawings.names[number], drawings.prefixes[number]))
        parts.append(Part(name, np.array(order, int), is_test=True))
    left_out = Counter({cause: len(numbers) for cause, numbers in copies.items()})
    left_out["blank"] = int((~shown).sum())
    left_out["held_out_and_not_tested"] = len(held) - sum(int(mask.sum()) for mask in chosen.values())
    return parts, left_out


def write_part(out_dir: Path, part: Part, drawings: Drawings, pool: Executor) -> None:
    """Write the missing shards of a part: KEY.png, KEY.txt and, in a test set, KEY.cls.

    Line n of `out_dir/NAME.tsv`, from 0, has the set and name of drawing n. A test set gets its class names and prompt.

    Raises:
        OSError: a worker died, or the disk is full.
    """
    folder = out_dir / part.name
    folder.mkdir(exist_ok=True)
    numbers = part.numbers.tolist()
    class_names = sorted({caption(drawings.names[number]) for number in numbers}) if part.is_test else []
    if part.is_test:
        write_classes(folder, class_names)
    label_of: dict[str, int] = {name: label for label, name in enumerate(class_names)}
    lines = (f"{drawings.prefixes[number]}\t{drawings.names[number]}\n" for number in numbers)
    write_text(out_dir / f"{part.name}.tsv", "".join(lines))

    def samples(first: int) -> list[tuple[str, dict[str, bytes]]]:
        some = enumerate(numbers[first : first + PAIRS_PER_SHARD], first)
        return [(f"{at:06d}", drawings.files(number, label_of)) for at, number in some]

    firsts = {folder / f"shard-{at // PAIRS_PER_SHARD:05d}.tar": at for at in range(0, len(numbers), PAIRS_PER_SHARD)}
    missing = {path: first for path, first in firsts.items() if not path.exists()}
    written = pool.map(_write_samples, missing, map(samples, missing.values()))
    for _ in each(written, f"writing {part.name}", "shards", len(missing)):
        pass


def _write_samples(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    with atomic_write(path, unique_partial_path(path)) as partial:
        write_shard(partial, samples)
        sync(partial)


def write_report(
    folder: Path,
    made: Mapping[str, Any],
    parts: Sequence[Part],
    drawings: Drawings,
    left_out: Mapping[str, int],
    relatives: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Write `report.json` and return it: origin, parts, drawings left out, and a digest of all files."""
    trained = {drawings.names[number] for part in parts if not part.is_test for number in part.numbers}
    counts = {}
    for part in parts:
        names = {drawings.names[number] for number in part.numbers}
        sets = {drawings.prefixes[number] for number in part.numbers}
        counts[part.name] = {"images": len(part.numbers), "names": len(names), "sets": len(sets)}
        if part.is_test:
            # Fewer than all, because a copy that was left out may have been the last drawing of its name.
            counts[part.name]["names_in_training"] = len(names & trained)
    report = {
        **made,
        "counts": counts,
        "left_out": dict(sorted((cause, count) for cause, count in left_out.items() if count)),
        "relatives": list(relatives),
        "sha256": _digest_of_folder(folder),
    }
    write_text(folder / _REPORT, json.dumps(report, indent=2) + "\n")
    return report


def _digest_of_folder(folder: Path) -> str:
    """Return the SHA-256 of the names and SHA-256s of all files but hidden ones and the report."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        relative = path.relative_to(folder)
        if path.name != _REPORT and not any(name.startswith(".") for name in relative.parts):
            total.update(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {relative}\n".encode())
    return total.hexdigest()


def write_licences(folder: Path, sets: Sequence[IconSet], parts: Sequence[Part], drawings: Drawings) -> None:
    """Write `LICENSES.txt`: authors and licences of the sets, with their numbers of drawings in each part."""
    counts = {part.name: Counter(drawings.prefixes[number] for number in part.numbers) for part in parts}
    lines = [
        "The images in this folder were rendered from these icon sets; the licence of each goes with its images. The",
        "set of each image is in PART.tsv.",
        "",
    ]
    for one in sets:
        where = ", ".join(f"{count[one.prefix]:,} {part}" for part, count in counts.items() if count[one.prefix])
        if where:
            url = f" ({one.url})" if one.url else ""
            lines.append(f"{one.prefix}: {one.title} by {one.author}{url}, {one.licence}: {where}")
    write_text(folder / "LICENSES.txt", "\n".join(lines) + "\n")


def prepare_icons(out_dir: Path, fraction: float = 1.0, processes: int = 2) -> None:
    """Download and draw the collection into train/, validation/, test/, unseen/ and tokenizer/ of `out_dir`.

    A complete folder is left as it is.

    Args:
        out_dir: folder to write.
        fraction: share of the training drawings. A smaller fraction is a part of a larger one; the tests are the same.
        processes: number of processes that draw and write.

    Raises:
        UserError: the folder has other files, another fraction, no space or another writer, or the download fails.
        OSError: the package is not the pinned one, or a process died.
    """
    out_dir = out_dir.absolute()
    if _is_complete(out_dir, fraction):
        _remove_temporary(out_dir)  # of a run that was killed at its very end
        print(f"{out_dir} is complete: nothing to do")
        return
    check_renderer()
    work = partial_path(out_dir)
    if not work.is_dir():
        remove(work)
    work.mkdir(parents=True, exist_ok=True)
    lock = work.with_name(f".{out_dir.name}.lock")
    try:
        with FileLock(lock, timeout=0):
            with worker_pool(processes, remedy="the same command resumes") as pool:
                report = _prepare(out_dir, work, fraction, pool, 3 * processes)
            lock.unlink(missing_ok=True)
    except Timeout:
        raise UserError(f"another process writes {out_dir}; wait for it to end, or name another folder") from None
    for name, count in report["counts"].items():
        print(f"{out_dir / name}: {count['images']:,} images, {count['names']:,} names, {count['sets']} sets")
    causes = (f"{count:,} {cause.replace('_', ' ')}" for cause, count in report["left_out"].items())
    print(f"left out: {', '.join(causes)}")
    print(f"sha256 of all: {report['sha256']}")


def _is_complete(out_dir: Path, fraction: float) -> bool:
    """Return whether an earlier run wrote the folder.

    Raises:
        UserError: the folder has another fraction, or other files.
    """
    report = read_report(out_dir, MADE_BY, "the icons")
    if report is None:
        return False
    if (report["package"], report["fraction"]) != (PACKAGE, fraction):
        raise UserError(
            f"{out_dir} holds the fraction {report['fraction']} of {report['package']}, not {fraction:g} of {PACKAGE}; "
            "name another folder"
        )
    return True


def _prepare(out_dir: Path, work: Path, fraction: float, pool: Executor, at_once: int) -> dict[str, Any]:
    """Write everything into `work`, rename it to `out_dir`, and return the report."""
    made = {"made_by": MADE_BY, "package": PACKAGE, "fraction": fraction}
    _keep_earlier_files(work, made)
    present = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    needed = round(_LEAST_BYTES + fraction * _TRAIN_BYTES) - present
    check_disk_space(out_dir, needed, "prepare a smaller --fraction")
    tarball = download({PACKAGE: DIGEST}, work / _DOWNLOAD)[PACKAGE]

    sets = [icon_set for icon_set, _ in read_sets(tarball)]
    relatives = find_relatives(sets)
    causes = {one.prefix: why_left_out(one, relatives) for one in sets}
    used = [one for one in sets if causes[one.prefix] is None]
    chosen = [one.narrowed(fraction) for one in used]
    if not any(one.names for one in chosen if one.prefix not in HELD_OUT):
        raise UserError(f"fraction {fraction:g} leaves no drawing to train on; name a larger one")
    (work / _DRAWN).mkdir(exist_ok=True)
    blocks_of = {one.prefix: blocks(work / _DRAWN, one.prefix, one.names) for one in chosen}
    draw_all(tarball, blocks_of, pool, at_once)

    every = [block for of_set in blocks_of.values() for block in of_set]
    drawings = Drawings.read(every, np.concatenate([one.paths for one in chosen]))
    num_sets = Counter(name for one in used if one.prefix not in HELD_OUT for name in one.names)
    parts, left_out = choose_parts(drawings, num_sets)
    left_out["beyond_the_fraction"] = sum(len(one.names) for one in used) - len(drawings.names)
    for one in sets:
        left_out["withdrawn"] += one.num_withdrawn
        if cause := causes[one.prefix]:
            left_out[cause] += len(one.names)
    for part in parts:
        write_part(work, part, drawings, pool)
    captions = sorted(caption(drawings.names[number]) for number in parts[0].numbers)
    train_sentencepiece(captions, work / "tokenizer", VOCAB_SIZE, MAX_LENGTH)
    write_licences(work, used, parts, drawings)
    report = write_report(work, made, parts, drawings, left_out, relatives)
    if out_dir.exists():
        out_dir.rmdir()
    os.replace(work, out_dir)
    _remove_temporary(out_dir)
    return report


def _keep_earlier_files(work: Path, made: dict[str, Any]) -> None:
    """Keep what an earlier run of the same command left in `work`; of another command's files, only the download."""
    for partial in work.rglob(".*.partial*"):
        remove(partial)
    begun, text = work / _BEGUN, json.dumps(made)
    if not begun.is_file() or begun.read_bytes() != text.encode():
        for path in work.iterdir():
            if path.name != _DOWNLOAD:
                remove(path)
        write_text(begun, text)


def _remove_temporary(folder: Path) -> None:
    for name in (_DRAWN, _DOWNLOAD, _BEGUN):
        remove(folder / name)


@dataclass(frozen=True)
class Options:
    """Download and draw icons: training shards, test sets by others, a tokenizer.

    Args:
        directory: Folder to write, data/icons in the recipes. After an interruption, the same command continues.
        fraction: Share of the training icons to draw; a smaller share is a part of a larger one.
        num_workers: Number of worker processes. Default: one for each core.
    """

    directory: OutputFolder
    _: KW_ONLY
    fraction: ShareAboveZero = 1.0
    num_workers: Threads = field(default_factory=usable_cores)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the data that the command line asks for."""
    with report_user_errors():
        start_logging()
        options = parse_command(Options, arguments)
        prepare_icons(options.directory, options.fraction, options.num_workers)


if __name__ == "__main__":
    main()
