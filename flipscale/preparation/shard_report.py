"""What `prepare shards` wrote and left out: a file beside the shards, a table, and an error if nothing is left."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flipscale.io import json_lines
from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.preparation.lists.files import shown

MANIFEST, REPORT, LEFT_OUT = "manifest.jsonl", "report.json", "left_out.jsonl"
DUPLICATE = "duplicate"
# What mends the usual causes.
_REMEDIES = {
    "missing_caption": "put KEY.txt beside KEY.jpg, or name the captions' column with --caption_column",
    "undecodable_caption": "save texts as UTF-8, or name the captions' column with --caption_column",
    "unreadable_file": "paths are relative to the folder of the list; correct them, or name the images' column with "
    "--image_column",
    "outside_folder": "move the files there, or read them all the same with --allow_outside",
    "undecodable_image": "save them as JPEG, PNG or WebP, or name the images' column with --image_column",
    "malformed_row": "save the table as UTF-8, with fields that have a delimiter in quotes",
    "missing_label": "name the classes' column with --labels, or leave --labels out",
}


def write_report(out_dir: Path, begun: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Write `report.json`, with counts of what was written and left out, and all left out in `left_out.jsonl`."""
    left_out: Counter[str] = sum((line["left_out"] for line in lines), Counter())
    first: dict[str, Any] = {}
    for line in lines:
        first = {**line["first"], **first}
    report = {
        **begun,
        "shards": len(lines),
        **{name: sum(line[name] for line in lines) for name in ("written", "shrunk", "image_bytes", "tar_bytes")},
        "left_out": dict(left_out.most_common()),
        "first_left_out": first,
    }
    json_lines.rewrite(out_dir / LEFT_OUT, _left_out(out_dir / MANIFEST))
    write_text(out_dir / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def _left_out(manifest: Path) -> Iterator[dict[str, Any]]:
    """Yield what was left out in the order of the pairs; the manifest's lines are in the order of their finish."""
    with open(manifest, "rb") as file:
        begins = {}
        while True:
            begin = file.tell()
            if not (line := file.readline()):
                break
            begins[json.loads(line).get("shard", -1)] = begin
        for shard in sorted(begins.keys() - {-1}):
            file.seek(begins[shard])
            yield from json.loads(file.readline())["left_out"]


def report_table(report: dict[str, Any], out_dir: Path) -> str:
    """Return a report as text to print."""
    written, num_left_out = report["written"], sum(report["left_out"].values())
    shards = f"in {report['shards']:,} shard{'s' * (report['shards'] != 1)}"
    rows = [("pairs read", written + num_left_out, ""), ("written", written, shards)]
    rows += [
        ("  shrunk", report["shrunk"], f"to a short side of {report['short_side']}, JPEG {report['jpeg_quality']}")
    ]
    rows += [("left out", num_left_out, f"each in {out_dir / LEFT_OUT}" if num_left_out else "")]
    rows += [(f"  {cause}", count, f"such as {_first(report, cause)}") for cause, count in report["left_out"].items()]
    mean = report["image_bytes"] / written / 1000 if written else 0
    lines = [f"{name:<24}{count:>14,}  {remark}".rstrip() for name, count, remark in rows]
    return "\n".join([*lines, f"{'bytes':<24}{report['tar_bytes']:>14,}  {mean:.1f} kB an image"])


def _first(report: dict[str, Any], cause: str) -> str:
    """Return the first pair that was left out for a cause."""
    fault = report["first_left_out"][cause]
    return shown(f"{fault['key']}: {fault['detail']}")


def check_left_out(report: dict[str, Any], out_dir: Path, max_bad_fraction: float) -> None:
    """Raise if too many pairs cannot be used; duplicates can.

    Raises:
        ValueError: nothing was written, or more than `max_bad_fraction` of the pairs is unusable.
    """
    unusable = {cause: n for cause, n in report["left_out"].items() if cause != DUPLICATE}
    written, bad = report["written"], sum(unusable.values())
    pairs = written + sum(report["left_out"].values())
    if not bad or (written and bad <= max_bad_fraction * pairs):
        return
    cause = max(unusable, key=lambda cause: unusable[cause])
    many = f"more than --max_bad_fraction {max_bad_fraction:g}" if written else "which leaves none"
    remedy = _REMEDIES.get(cause, "mend the list") + (", and name a new folder" if written else "")
    raise UserError(
        f"{bad:,} of {pairs:,} pairs of {report['source']} cannot be used, {many}: {unusable[cause]:,} for {cause}, "
        f"such as {_first(report, cause)}; {remedy} (all are in {out_dir / LEFT_OUT})"
    )
