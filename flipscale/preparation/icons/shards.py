"""Shards of drawings whose pictures lie in the files of `drawing`."""

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flipscale.data.sources.tar_file import add_member
from flipscale.io.atomic import atomic_write, sync, unique_partial_path


@dataclass(frozen=True)
class Sample:
    """A picture in a file of pictures, its caption and, in a test set, its class."""

    file: Path
    start: int
    size: int
    caption: str
    label: int | None

    def png(self) -> bytes:
        """Return the picture."""
        with open(self.file, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)


def write_shard(path: Path, first: int, samples: Sequence[Sample]) -> None:
    """Write a shard aside and rename it."""
    with atomic_write(path, unique_partial_path(path)) as partial:
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, sample in enumerate(samples, first):
                add_member(tar, f"{number:06d}.png", sample.png())
                add_member(tar, f"{number:06d}.txt", sample.caption.encode())
                if sample.label is not None:
                    add_member(tar, f"{number:06d}.cls", str(sample.label).encode())
        sync(partial)
