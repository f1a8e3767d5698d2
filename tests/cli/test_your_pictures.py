"""docs/your_pictures.md from top to bottom: its commands and its Python on 300 drawings, with a short training."""

import csv
import json
import os
import re
import shlex
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import pytest
from cli.pages import ROOT, commands
from cli.test_pages import ends_well, run
from hub.conftest import hub, logged_in  # noqa: F401 (fixtures)

from examples.demo import data as demo
from examples.demo.data import Drawing
from examples.shared import download
from flipscale import cli

PAGE = ROOT / "docs/your_pictures.md"
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


@pytest.mark.long
def test_the_page_from_top_to_bottom(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    logged_in: None,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    lay_out(tmp_path)
    printed: dict[str, str] = {}
    for command in commands(PAGE):
        if re.match(r"flipscale prepare shards$", command.text):
            continue
        with ends_well(command.text, capsys):
            if command.text.startswith("flipscale pretrain"):
                # Elsewhere, pages only have it print the recipe.
                cli.main(shlex.split(command.text.replace("--budget_minutes 5", "--budget_minutes 0.05"))[1:])
            else:
                run(command, is_real=True)
        printed[command.text] = capsys.readouterr().out
    layouts = {text.split()[3]: out.splitlines()[0] for text, out in printed.items() if "prepare shards" in text}
    (shown,) = re.findall(r"\n\n```\n(.*?)\n```", PAGE.read_text(), re.DOTALL)
    assert shown == layouts["pictures"], "the page shows another line"
    assert list(layouts) == ["pictures", "with_texts", "with_table", "list.csv", "list.jsonl", "list.parquet", "saved"]
    assert all(line.startswith("300 ") for line in layouts.values())
    results = [json.loads(line) for line in Path("runs/mine/results.jsonl").read_text().splitlines()]
    assert {result["kind"] for result in results} >= {"zero_shot", "retrieval"}
    for file in ("sheet.png", "runs/mine/report.html", "search.html", "mine-onnx/image_model.onnx", "large.yaml"):
        assert Path(file).is_file(), file
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(snippet, "docs/your_pictures.md", "exec"), {})
    guesses = capsys.readouterr().out
    assert "sport" in guesses
    assert "clothing" in guesses
