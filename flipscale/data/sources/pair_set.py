"""Sets of image-text pairs whose shards lie on the Hub, by name: one file of `pairs/` for each."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from flipscale.io.errors import UserError
from flipscale.io.text_table import plain_table

_FILES = Path(__file__).parent / "pairs"


@dataclass(frozen=True)
class PairSet:
    """A set of pairs on the Hub.

    Args:
        repo: repository of the data set.
        train: pattern of the names of its shards.
        pairs: number of pairs, as its source states it.
        licence: licence of captions and pictures, as its source states it.
        sample: files of a sample, and what they hold.
        revision: branch or commit.
        validation: pattern of the names of held-out shards; empty if there are none.
    """

    name: str
    title: str
    repo: str
    train: str
    pairs: int
    licence: str
    sample: str
    revision: str = "main"
    validation: str = ""

    @property
    def url(self) -> str:
        """The address of the shards as `data.shards` takes it."""
        return f"hf://datasets/{self.repo}@{self.revision}/{self.train}"


@cache
def set_names() -> tuple[str, ...]:
    return tuple(sorted(file.stem for file in _FILES.glob("*.yaml")))


@cache
def read_set(name: str) -> PairSet:
    """Return the set of this name; raise UserError if there is none."""
    if name not in set_names():
        raise UserError(f"no set of pairs is called {name!r}; there are {', '.join(set_names())}")
    fields = yaml.safe_load((_FILES / f"{name}.yaml").read_text(encoding="utf-8"))
    return PairSet(name, **fields)


def named_shards(shards: str) -> str:
    """Return the address of a set's shards for its name, unless something here has this name; other words as they
    are."""
    return read_set(shards).url if shards in set_names() and not Path(shards).exists() else shards


def sets_table() -> str:
    """Return a table of all sets, and what their samples hold."""
    rows = [("set", "pairs", "repository", "licence")]
    rows += [(one.name, f"{one.pairs:,}", one.repo, one.licence) for one in _sets()]
    return "\n".join([plain_table(rows, (1,)), "", *(f"{one.name}: {one.title}; {one.sample}" for one in _sets())])


def _sets() -> Iterator[PairSet]:
    yield from map(read_set, set_names())
