"""One's own pictures as shards: all of them, or a training and a test part, with classes as evaluations read them."""

import dataclasses
from pathlib import Path
from typing import Any

from flipscale.data.faults import BadSample
from flipscale.io.errors import UserError
from flipscale.preparation.labelled_set import write_class_texts
from flipscale.preparation.lists.pair_list import PairList
from flipscale.preparation.shard_report import MANIFEST
from flipscale.preparation.shard_writer import ShardOptions, write_shards

PARTS = ("train", "test")
# Captions of class folders are bare names, so prompts are too; the file says so, and may be changed.
TEMPLATE = "{c}"


def write_own_set(
    pairs: PairList, source: str, out_dir: Path, options: ShardOptions, processes: int
) -> dict[Path, dict[str, Any]]:
    """Write pairs as shards to `out_dir`, or to its folders `train` and `test` if a share is held out, and return the
    report of each folder.

    With `options.labels`, `classnames.txt` and the prompts are written to `out_dir`, so that it is a labelled set in
    CLIP_benchmark's layout.

    Raises:
        ValueError: no pair has a class, a part would be empty, or as `write_shards`.
        OSError: as `write_shards`.
    """
    names = class_names(pairs, source, options.labels) if options.labels else []
    parts = {out_dir: options}
    if options.held_out:
        _check_folder(out_dir)
        parts = {out_dir / part: dataclasses.replace(options, part=part) for part in PARTS}
    reports = {folder: write_shards(pairs, source, folder, part, processes, names) for folder, part in parts.items()}
    if names:
        write_class_texts(out_dir, names, TEMPLATE)
    return reports


def class_names(pairs: PairList, source: str, labels: str) -> list[str]:
    """Return the names of all classes: in the order of the alphabet, or of the numbers if all are numbers.

    Raises:
        ValueError: no pair has a class.
    """
    names: set[str] = set()
    why = ""
    for number in range(len(pairs)):
        try:
            names.add(pairs.label(number))
        except BadSample as error:
            why = why or f"{pairs.place(number)}: {error}"
    if not names:
        raise UserError(f"--labels {labels}: no pair of {source} has a class ({why}); name another column")
    return sorted(names, key=int if all(name.isdecimal() for name in names) else None)


def has_test_part(folder: Path) -> bool:
    """Return whether a folder has a test part that was held out of its training data."""
    return (folder / "test" / MANIFEST).is_file()


def check_parts(reports: dict[Path, dict[str, Any]], held_out: float) -> None:
    """Raise if a part has no image though the list has some that can be used.

    Raises:
        ValueError: it has none.
    """
    for folder, report in reports.items():
        if not report["written"] and not report["left_out"]:
            other = "smaller" if folder.name == PARTS[0] else "larger"
            raise UserError(
                f"--split {held_out:g} leaves no image for {folder}, of {report['pairs']:,}; name a {other} share and "
                "a new folder"
            )


def _check_folder(out_dir: Path) -> None:
    """Raise if a folder for two parts holds something else.

    Raises:
        ValueError: it does.
    """
    if not out_dir.is_dir() or not any(out_dir.iterdir()):
        return
    is_whole = (out_dir / MANIFEST).exists()
    if is_whole or not any((out_dir / part / MANIFEST).exists() for part in PARTS):
        what = "was written without --split" if is_whole else "holds something else"
        raise UserError(f"{out_dir} {what}; name a new folder for {' and '.join(PARTS)}")
