"""300 drawings by a designer, laid out as people keep their pictures: what docs/your_pictures.md begins with."""

import csv
import json
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets

from examples.demo import data as demo
from examples.demo.data import Drawing
from examples.shared import download

CLASSES, OF_EACH = 12, 25


def drawings() -> dict[str, list[Drawing]]:
    """Download an artist's emoji, and return 25 of each of 12 kinds of things, people left out."""
    packages = [demo.PACKAGES[name] for name in (demo.TEST_ARTIST, demo.NAMES)]
    with TemporaryDirectory() as folder:
        tarballs = download(dict(packages), Path(folder))
        art, labels = (tarballs[name] for name, _ in packages)
        names = demo.Names(*(demo.read_member(labels, file) for file in ("en/data.json", "meta/groups.json")))
        icons, chars = (demo.read_member(art, f"{part}.json") for part in ("icons", "chars"))
    kinds = defaultdict(list)
    for drawing in demo.select_drawings(demo.TEST_ARTIST, icons, chars, names, flags=False):
        if drawing.named and not drawing.subgroup.startswith(("person", "face")):
            kinds[drawing.subgroup].append(drawing)
    largest = sorted(kinds, key=lambda kind: (-len(kinds[kind]), kind))[:CLASSES]
    return {kind: kinds[kind][:OF_EACH] for kind in largest}


def lay_out(folder: Path) -> None:
    """Write the drawings to `folder`, once in each layout that the page names."""
    rows = []
    for kind, found in drawings().items():
        place = folder / "pictures" / kind.replace(" ", "_")
        place.mkdir(parents=True)
        for drawing in found:
            name, png = f"{drawing.icon}.png", demo.render_svg(drawing.svg)
            for path in (place / name, folder / "with_texts" / name, folder / "with_table" / name):
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(png)
            (folder / "with_texts" / f"{drawing.icon}.txt").write_text(drawing.caption)
            rows.append({"file_name": name, "text": drawing.caption, "kind": kind})
    _write_csv(folder / "with_table/metadata.csv", rows)
    listed = [{**row, "file_name": f"with_table/{row['file_name']}"} for row in rows]
    _write_csv(folder / "list.csv", listed)
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    table = datasets.Dataset.from_list(listed)
    table.to_parquet(str(folder / "list.parquet"))
    images = [str(folder / row["file_name"]) for row in listed]
    table.add_column("image", images).cast_column("image", datasets.Image()).save_to_disk(str(folder / "saved"))


def _write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
