"""Which drawings are for training, for choosing and for testing, by who drew them, and which are left out and why."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flipscale.preparation.icons.collection import LICENCES, IconSet, digest, path_digests

TEST = ("carbon", "tabler", "iconoir")
VALIDATION = ("ph", "hugeicons", "ri")
HELD_OUT = TEST + VALIDATION
# The test artist of `prepare demo` drew them, and a model of these data may be tested there.
DEMO_TEST = ("fluent-emoji", "fluent-emoji-flat", "fluent-emoji-high-contrast")
# A name is tested if so many training sets have it.
NAMED_BY = 5
# A set is a relative of a held-out one, a fork or a copy, if it shares as much as this of its own drawings with it and
# no fewer than so many; simple signs (a plus, three lines) are drawn alike by everybody.
RELATED_SHARE, RELATED_LEAST = 0.05, 10
# Relatives by equal pixels, in the pinned package: set, its kin, and how many pictures are equal. Named here, because a
# fraction of the drawings does not tell. The next after these shares 4.1 %.
BY_PIXELS = {"heroicons-outline": ("tabler", 22), "meteor-icons": ("tabler", 25)}


@dataclass(frozen=True)
class SetFacts:
    """What is known of a set without its drawings.

    Args:
        paths: a digest of the paths of each drawing, uint64 `(names,)`, 0 where there is none.
    """

    prefix: str
    title: str
    author: str
    url: str
    licence: str
    names: tuple[str, ...]
    paths: np.ndarray
    num_withdrawn: int

    @classmethod
    def of(cls, icons: IconSet) -> "SetFacts":
        """Return the facts of a set."""
        return cls(
            *(icons.prefix, icons.title, icons.author, icons.url, icons.licence),
            tuple(icon.name for icon in icons.icons),
            path_digests(icons.icons),
            icons.num_withdrawn,
        )


@dataclass(frozen=True)
class Relative:
    """A set that shares drawings with a held-out one, or an author.

    Args:
        prefix: of the set.
        of: the held-out set.
        shared: how many of its drawings have the paths or the pixels of one of the other's.
        num_icons: of the set.
    """

    prefix: str
    of: str
    shared: int
    num_icons: int


def find_relatives(sets: Sequence[SetFacts]) -> list[Relative]:
    """Return the sets that are forks or copies of a held-out one, or by the same author, the closest kin of each."""
    held = [facts for facts in sets if facts.prefix in HELD_OUT]
    found = []
    for facts in sets:
        if facts.prefix in HELD_OUT:
            continue
        shared = {other.prefix: int((np.isin(facts.paths, other.paths) & (facts.paths > 0)).sum()) for other in held}
        authors = {other.prefix: shared[other.prefix] for other in held if other.author == facts.author}
        of, most = max((authors or shared).items(), key=lambda item: item[1], default=("", 0))
        if facts.prefix in BY_PIXELS:
            of, most = BY_PIXELS[facts.prefix]
        elif not authors and most < max(RELATED_LEAST, RELATED_SHARE * len(facts.names)):
            continue
        found.append(Relative(facts.prefix, of, most, len(facts.names)))
    return found


def why_left_out(facts: SetFacts, relatives: Sequence[Relative]) -> str | None:
    """Return why no drawing of a set is used; None if they are."""
    if facts.licence not in LICENCES:
        return "licence"
    if facts.prefix in DEMO_TEST:
        return "demo_test"
    return "relative" if facts.prefix in {relative.prefix for relative in relatives} else None


def place_of(prefix: str, name: str) -> float:
    """Return the place of a drawing in the order of training, from 0 to below 1: by a hash of its set and name, so
    that it is nobody's choice, and the first eighth of the drawings is a part of the first quarter."""
    return digest(f"flipscale prepare icons {prefix}:{name}".encode()) / 2**64


def narrowed(facts: SetFacts, fraction: float) -> SetFacts:
    """Return the facts of a set with only those drawings that are in a fraction of the training data; of a held-out one
    with all."""
    if facts.prefix in HELD_OUT:
        return facts
    chosen = np.array([place_of(facts.prefix, name) < fraction for name in facts.names], bool)
    names = tuple(name for name, is_chosen in zip(facts.names, chosen, strict=True) if is_chosen)
    return replace(facts, names=names, paths=facts.paths[chosen])


def sets_of_names(sets: Sequence[SetFacts]) -> Counter[str]:
    """Return how many training sets have each name."""
    return Counter(name for facts in sets if facts.prefix not in HELD_OUT for name in facts.names)
