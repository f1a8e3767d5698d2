"""Iconify's collection of icon sets, in one npm package of a pinned version: 373,056 drawings with names, in 239 sets.

A *set* is drawn by one designer or team, and each of its drawings has a name: `arrow-bend-down-left`. The name without
its hyphens is the caption.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "@iconify/json@2.2.535"
INTEGRITY = {PACKAGE: "nAV60ACUSHwnsb6fsp+letHlNkrwO4vzBtcC6B4EDHErQQfezk7E3nJdnwJjve6OCfMNO0uVT5Vrgna9/NCmXw=="}

# At 64 px, a crop of 70 % of the area is 54 px wide, so training at 32 px never enlarges.
IMAGE_SIZE = 64

# Whoever gives a derived work away may do so with these, some under conditions that LICENSES.txt names; sets with any
# other licence (NonCommercial, GPL) are left out.
LICENCES = {
    *("Apache-2.0", "BSD-3-Clause", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC0-1.0", "ISC", "MIT"),
    *("MPL-2.0", "OFL-1.1", "Unlicense"),
}

_SET_FILE = re.compile(r"package/json/([a-z0-9-]+)\.json")
_PATH_DATA = re.compile(r'\bd="([^"]+)"')
# Shorter path data, such as a line from edge to edge, is nobody's own.
_LEAST_PATH_DATA = 20


@dataclass(frozen=True)
class Icon:
    """A drawing: its set, its name in the set, and its SVG without the outer element."""

    prefix: str
    name: str
    body: str
    box: str  # the viewBox: left, top, width and height

    @property
    def svg(self) -> str:
        """The whole SVG, of `IMAGE_SIZE` square: a drawing that is no square keeps its shape, centred. The current
        colour is black."""
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="black" '
            f'width="{IMAGE_SIZE}" height="{IMAGE_SIZE}" viewBox="{self.box}">{self.body}</svg>'
        )

    @property
    def paths(self) -> int:
        """A digest of 64 bits of the data of its paths in any order, whatever their colours and strokes; 0 if that is
        too little to tell copies by."""
        data = sorted(_PATH_DATA.findall(self.body))
        return digest("\n".join(data).encode()) if sum(map(len, data)) >= _LEAST_PATH_DATA else 0


@dataclass(frozen=True)
class IconSet:
    """A set: whose it is, and its drawings in the order of the package, without those that its designer withdrew."""

    prefix: str
    title: str
    author: str
    url: str
    licence: str
    icons: tuple[Icon, ...]
    num_withdrawn: int


def digest(content: bytes) -> int:
    """Return a digest of 64 bits, never 0."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") or 1


def caption(name: str) -> str:
    """Return the words of a drawing's name."""
    return name.replace("-", " ")


def read_sets(tarball: Path) -> Iterator[IconSet]:
    """Yield the sets of the package, one in memory at a time, in the order of the tarball."""
    with tarfile.open(tarball, "r|gz") as tar:
        for member in tar:
            if _SET_FILE.fullmatch(member.name):
                file = tar.extractfile(member)
                assert file is not None
                yield _icon_set(json.load(file))


def _icon_set(content: dict[str, Any]) -> IconSet:
    info, prefix = content["info"], content["prefix"]
    icons = []
    for name, entry in content["icons"].items():
        if not entry.get("hidden"):
            numbers = [entry.get(side, content.get(side, 16)) for side in ("width", "height")]
            corner = [entry.get(side, content.get(side, 0)) for side in ("left", "top")]
            icons.append(Icon(prefix, name, entry["body"], " ".join(f"{number:g}" for number in corner + numbers)))
    author, licence = info["author"], info["license"]
    url = author.get("url") or licence.get("url") or ""
    withdrawn = len(content["icons"]) - len(icons)
    return IconSet(prefix, info["name"], author["name"], url, licence["spdx"], tuple(icons), withdrawn)


def path_digests(icons: tuple[Icon, ...]) -> np.ndarray:
    """Return `Icon.paths` of each drawing, uint64 `(icons,)`."""
    return np.array([icon.paths for icon in icons], np.uint64)
