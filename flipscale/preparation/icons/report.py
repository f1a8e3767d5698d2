"""What the folder of icons says of itself: `report.json`, and `LICENSES.txt`."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flipscale.io.atomic import write_text
from flipscale.preparation.icons.parts import Drawings, Part
from flipscale.preparation.icons.splits import Relative, SetFacts

REPORT, LICENSES = "report.json", "LICENSES.txt"


def write_report(
    folder: Path,
    made: Mapping[str, Any],
    parts: Sequence[Part],
    drawings: Drawings,
    left_out: Mapping[str, int],
    relatives: Sequence[Relative],
) -> dict[str, Any]:
    """Write `report.json`, and return it: what made the folder, its parts, what was left out and why, and a digest of
    all files that are there, to compare with another machine's.

    Args:
        made: what it was made by and of.
    """
    known = {drawings.names[number] for part in parts if not part.is_test for number in part.numbers}
    counts = {}
    for part in parts:
        names = {drawings.names[number] for number in part.numbers}
        sets = {drawings.prefixes[number] for number in part.numbers}
        counts[part.name] = {"images": len(part.numbers), "names": len(names), "sets": len(sets)}
        if part.is_test:
            # A training drawing that was left out as a copy may have been the last of its name, and so does a fraction.
            counts[part.name]["names_in_training"] = len(names & known)
    report = {
        **made,
        "counts": counts,
        "left_out": dict(sorted((cause, count) for cause, count in left_out.items() if count)),
        "relatives": [vars(relative) for relative in relatives],
        "sha256": _digest(folder),
    }
    write_text(folder / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def _digest(folder: Path) -> str:
    """Return the SHA-256 of the names and SHA-256s of all files but hidden ones and the report."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        relative = path.relative_to(folder)
        if path.name == REPORT or any(name.startswith(".") for name in relative.parts):
            continue
        digest.update(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {relative}\n".encode())
    return digest.hexdigest()


def write_licences(folder: Path, sets: Sequence[SetFacts], parts: Sequence[Part], drawings: Drawings) -> None:
    """Write `LICENSES.txt`: authors and licences of the sets, and how many drawings of each are in which part."""
    counts = {part.name: Counter(drawings.prefixes[number] for number in part.numbers) for part in parts}
    lines = [
        "The images in this folder were rendered from these icon sets; the licence of each goes with its images. The",
        "set of each image is in PART.tsv.",
        "",
    ]
    for facts in sets:
        where = ", ".join(f"{count[facts.prefix]:,} {part}" for part, count in counts.items() if count[facts.prefix])
        if where:
            url = f" ({facts.url})" if facts.url else ""
            lines.append(f"{facts.prefix}: {facts.title} by {facts.author}{url}, {facts.licence}: {where}")
    write_text(folder / LICENSES, "\n".join(lines) + "\n")


def summary(report: Mapping[str, Any], folder: Path) -> list[str]:
    """Return a line about each part and about what was left out."""
    lines = [
        f"{folder / name}: {count['images']:,} images, {count['names']:,} names, {count['sets']} sets"
        for name, count in report["counts"].items()
    ]
    causes = ", ".join(f"{count:,} {cause.replace('_', ' ')}" for cause, count in report["left_out"].items())
    return [*lines, f"left out: {causes}", f"sha256 of all: {report['sha256']}"]
