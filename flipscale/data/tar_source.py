"""Random access to webdataset tar shards, as img2dataset writes them: KEY.jpg|png|webp + KEY.txt (+ KEY.cls)."""

import glob
import os
import re
import tarfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# One row a sample: offset and size in bytes of the image, the caption and the class number; offset -1 where absent.
FIELDS = ("image", "txt", "cls")
_MAX_OPEN_SHARDS = 64


@dataclass(frozen=True)
class Sample:
    """One undecoded sample. `caption` and `label` are None where the shard has none."""

    name: str
    image: bytes
    caption: bytes | None
    label: int | None


def expand_shards(shards: str) -> list[Path]:
    """The shard files that `shards` names, sorted: a folder, a glob, or a range such as `{00000..00041}.tar`.

    Raises:
        ValueError: nothing is there.
    """
    numbered = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", shards)
    if numbered:
        head, first, last, tail = numbered.groups()
        paths = [Path(f"{head}{number:0{len(first)}d}{tail}") for number in range(int(first), int(last) + 1)]
    elif Path(shards).is_dir():
        paths = sorted(Path(shards).glob("*.tar"))
    else:
        paths = sorted(Path(path) for path in glob.glob(shards))
    if not paths:
        raise ValueError(
            f"no shards at {shards!r}; name a folder of *.tar, a glob, or a range like {{00000..00041}}.tar"
        )
    for path in paths:
        if not path.is_file():
            raise ValueError(f"shard {path} does not exist; check data.shards")
    return paths


def _build_index(shard: Path) -> np.ndarray:
    """int64 `(samples, fields, 2)`: offset and size of each field of each sample that has an image."""
    samples: OrderedDict[str, dict[str, tuple[int, int]]] = OrderedDict()
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                field = "image" if extension.lower() in IMAGE_EXTENSIONS else extension.lower()
                if member.isfile() and field in FIELDS:
                    key = f"{folder}/{stem}"
                    samples.setdefault(key, {})[field] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"shard {shard} cannot be read ({error}); fetch it again or remove it") from error
    rows = [[fields.get(field, (-1, 0)) for field in FIELDS] for fields in samples.values() if "image" in fields]
    return np.array(rows, dtype=np.int64).reshape(len(rows), len(FIELDS), 2)


def index_path(shard: Path) -> Path:
    """Where the index of `shard` lies: beside it."""
    return shard.with_name(shard.name + ".index.npy")


def load_index(shard: Path) -> np.ndarray:
    """The index of `shard`, memory-mapped, built and written beside it first where it is missing or older.

    Raises:
        ValueError: the shard cannot be read.
    """
    path = index_path(shard)
    try:
        if path.stat().st_mtime_ns >= shard.stat().st_mtime_ns:
            return np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        pass
    index = _build_index(shard)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            np.save(file, index)
        os.replace(partial, path)
    except OSError:
        # A read-only data folder: the index lives in memory instead.
        partial.unlink(missing_ok=True)
    return index


class TarSource:
    """Samples of tar shards by (shard, number), through indices of offsets: no stream, no state.

    Raises:
        ValueError: a shard that is missing or unreadable.
    """

    def __init__(self, shards: str):
        self.paths = expand_shards(shards)
        # Lengths alone stay in memory: the indices of two billion samples are 100 GB.
        self.shard_sizes = [len(load_index(path)) for path in self.paths]
        self._open: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def read(self, shard: int, number: int) -> Sample:
        """Sample `number` of shard `shard`, its bytes as stored."""
        file, index = self._shard(shard)
        image, caption, label = (
            None if offset < 0 else os.pread(file, size, offset) for offset, size in index[number].tolist()
        )
        assert image is not None
        return Sample(
            name=f"{self.paths[shard].name}#{number}",
            image=image,
            caption=caption,
            label=None if label is None else int(label),
        )

    def _shard(self, shard: int) -> tuple[int, np.ndarray]:
        """File descriptor and index of a shard, the last few kept open."""
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            if len(self._open) >= _MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1][0])
            self._open[shard] = (os.open(self.paths[shard], os.O_RDONLY), load_index(self.paths[shard]))
        return self._open[shard]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}
