"""`flipscale search`: its hits, its page, and its errors for bad input."""

import base64
import csv
import io
import json
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from conftest import COLOURS, SHAPES, draw
from pages.browser import check_accessible, check_offline, look
from PIL import Image

from flipscale import cli
from flipscale.evaluation.embedding import image_embeds, text_embeds
from flipscale.model import FlipModel, FlipProcessor
from flipscale.pages import search_page
from flipscale.pages.page import shortened
from flipscale.pages.search_page import MOST_BYTES


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve pictures in folders, one of them with a name that would do harm, and one that is damaged."""
    folder, rng = tmp_path / "mine", np.random.default_rng(3)
    for number, colour in enumerate(list(COLOURS) * 3):
        place = folder / colour / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(colour, SHAPES[number % 4], rng)).save(place)
    (folder / "red/0.png").rename(folder / 'red/"><img src=x onerror=alert(1)>.png')
    (folder / "red/4.txt").write_text("a red disc <b>\n")
    (folder / "grey/3.png").write_bytes((folder / "grey/3.png").read_bytes()[:60])
    return folder


def search(*arguments: str | Path) -> None:
    cli.main(["search", *map(str, arguments)])


def test_it_finds_the_nearest_and_keeps_the_embeddings(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "out/found.html"
    (tmp_path / "queries.txt").write_text("a grey ring\n\na red disc\n")
    asked = [trained / "model", pictures, "a red disc", pictures / "blue/2.png"]
    search(*asked, "--queries", tmp_path / "queries.txt", "--out", page, "--top", "3")
    printed = capsys.readouterr().out
    assert "1 of 12 pictures cannot be read and are left out, the first: grey/3.png: " in printed
    assert f"{page}: 3 queries over 11 pictures; open it in a browser" in printed

    files = sorted(path for path in pictures.rglob("*.png") if path != pictures / "grey/3.png")
    model, processor = (kind.from_pretrained(trained / "model") for kind in (FlipModel, FlipProcessor))
    embeds = image_embeds(model.eval(), processor, files)
    for query, found in (
        ("a red disc", text_embeds(model, processor, ["a red disc"])),
        (str(pictures / "blue/2.png"), image_embeds(model, processor, [pictures / "blue/2.png"])),
    ):
        cosines = dict(zip((str(path.relative_to(pictures)) for path in files), embeds @ found[0], strict=True))
        line = next(line for line in printed.splitlines() if line.startswith(f"{shortened(query, 60)}: "))
        found_files = r"(\w+/(?:\d+|\">.*alert\(1\)>)\.png)\)? (-?\d\.\d\d)"
        hits = re.findall(found_files, line.removeprefix(f"{shortened(query, 60)}: "))
        assert len(hits) == 3, line
        # The processor resizes a little differently.
        best = sorted(cosines.values(), reverse=True)
        for (name, shown), expected in zip(hits, best, strict=False):
            assert float(shown) == pytest.approx(cosines[name], abs=0.01)
            assert float(shown) == pytest.approx(expected, abs=0.01)

    # The second time nothing is embedded; of other pictures, everything.
    monkeypatch.setattr(search_page, "_embed", None)
    search(*asked[:3], "--out", page)
    assert "1 of 12 pictures cannot be read" in capsys.readouterr().out
    (pictures / "red/8.png").unlink()
    with pytest.raises(SystemExit):
        search(*asked[:3], "--out", page)


def test_a_mended_model_embeds_again(
    trained: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(trained / "model", tmp_path / "model")
    asked = model, pictures, "a red disc", "--out", tmp_path / "colours.html"
    search(*asked)
    monkeypatch.setattr(search_page, "_embed", None)
    search(*asked)
    content = json.loads((model / "config.json").read_text())
    content["vision_config"]["image_mean"] = [0.9, 0.8, 0.7]
    (model / "config.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        search(*asked)


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl"])
def test_hits_have_the_titles_of_a_table(
    trained: Path, pictures: Path, tmp_path: Path, table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(path.relative_to(pictures)) for path in sorted(pictures.rglob("*.png"))]
    rows = [{"file_name": f"./{file}", "text": f"my <i>title</i>, {number}"} for number, file in enumerate(files[:-1])]
    with open(pictures / table, "w", newline="") as file:
        if table.endswith(".csv"):
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows([*rows, {"file_name": files[-1], "text": ""}])
        else:
            file.writelines(json.dumps(row) + "\n" for row in [*rows, {"file_name": files[-1]}])
    search(trained / "model", pictures, "a red disc", "--out", tmp_path / "a.html", "--top", "20")
    labels = [unescape(alt) for alt in re.findall(r'alt="([^"]*)"', (tmp_path / "a.html").read_text())]
    titled = {f"my <i>title</i>, {number}" for number, file in enumerate(files[:-1]) if file != "grey/3.png"}
    # A text beside a picture is its title, and a picture without any has its name.
    titled -= {f"my <i>title</i>, {files.index('red/4.png')}"}
    assert set(labels) == {*titled, "a red disc <b>", files[-1]}
    assert re.search(r"my <i>title</i>, \d+ \(\w+/", capsys.readouterr().out)


def test_maps_lie_over_the_hits(trained: Path, pictures: Path, tmp_path: Path) -> None:
    page = tmp_path / "maps.html"
    search(trained / "model", pictures, "a red disc", pictures / "blue/2.png", "--out", page, "--top", "2", "--maps")
    text = page.read_text()
    maps = re.findall(
        r'<img class="map" src="data:image/webp;base64,([^"]+)" alt="" width="(\d+)" height="(\d+)">', text
    )
    shown = re.findall(r'alt="[^"]+" width="(\d+)" height="(\d+)"><img class="map"', text)
    assert [tuple(size) for _, *size in maps] == shown, "a map has the size of its picture"
    assert len(maps) == 2, "words have maps, and a picture as a query has none"
    assert 'id="where"' in text
    with Image.open(io.BytesIO(base64.b64decode(maps[0][0]))) as image:
        *colours, alpha = np.moveaxis(np.asarray(image), 2, 0)
    assert alpha.max() > alpha.min() == 0
    assert not np.any(colours), "a shadow keeps the hues"
    search(trained / "model", pictures, "a red disc", "--out", page, "--top", "2")
    assert 'class="map"' not in page.read_text()
    assert 'id="where"' not in page.read_text()


def test_a_browser_shows_it(trained: Path, pictures: Path, tmp_path: Path) -> None:
    page = tmp_path / "search.html"
    hostile = "</datalist><script>document.title = 'taken'</script>"
    search(trained / "model", pictures, "a red disc", hostile, pictures / "blue/2.png", "--out", page)
    assert len(page.read_bytes()) <= MOST_BYTES
    assert page.read_text().count("<script") == 2
    opened = look(page, tmp_path, 390, dark=True)
    check_offline(opened)
    check_accessible(opened)
    assert opened.facts["shown"] == 3
    shown = {alt for alt, _ in opened.facts["pictures"]}
    assert {'red/"><img src=x onerror=alert(1)>.png', "a red disc <b>"} <= shown

    typing = "const box = document.getElementById('query'); box.value = 'RED'; box.dispatchEvent(new Event('input'));"
    typed = look(page, tmp_path, script=typing + "document.querySelector('.search button').click();")
    assert typed.facts["shown"] == 1
    assert "1 of 3 queries" in typed.dom
    assert "Most similar on this page" in [text for _, text in typed.facts["headings"]]
    assert len(typed.facts["pictures"]) == len(opened.facts["pictures"]) + 1 + min(8, 10)
    check_accessible(typed)


def test_a_large_page_of_shards_has_small_pictures(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "a.html"
    search(trained / "model", trained.parent / "test", "a red disc", "--out", page)
    assert re.search(r"a red disc: a \w+ \w+ \(00000\.tar#\d+\) -?\d\.\d\d, ", capsys.readouterr().out)
    size = len(page.read_bytes())
    monkeypatch.setattr(search_page, "MOST_BYTES", size - 1)
    search(trained / "model", trained.parent / "test", "a red disc", "--out", page)
    assert len(page.read_bytes()) < size
    monkeypatch.setattr(search_page, "MOST_BYTES", 1000)
    with pytest.raises(SystemExit):
        search(trained / "model", pictures, "red", "--out", page)
    assert "fewer queries, or a smaller --top" in capsys.readouterr().err


def test_bad_input_is_one_line(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], subtests: pytest.Subtests
) -> None:
    model, page = trained / "model", tmp_path / "a.html"
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    shutil.copy(pictures / "grey/3.png", tmp_path / "damaged/a.png")
    (tmp_path / "many.txt").write_text("\n".join(map(str, range(501))))
    for arguments, words in (
        ([model, pictures], "there is no query; give words such as 'two arrows in a circle', or --queries FILE"),
        ([model, pictures, "--queries", tmp_path / "many.txt"], "there are 501 queries; a page has at most 500"),
        ([model, tmp_path / "empty", "red"], "empty has no pictures; expected files named .avif"),
        ([model, tmp_path / "none", "red"], "none is not a folder; name a folder of pictures, or shards"),
        ([model, tmp_path / "damaged", "red"], "none of the 1 pictures can be read, the first: a.png: "),
        ([model, pictures, "none/3.PNG"], "the query none/3.PNG is not a file"),
        ([model, pictures, pictures / "grey/3.png"], "3.png cannot be read as a picture"),
        ([model, pictures, "red", "--dims", "1000"], "dims is 1000, and the embeddings of "),
        ([model, pictures, "red", "--out", tmp_path], "name a file that ends in .html"),
        ([model, pictures, "red", "--out", pictures / "red/4.txt/a.html"], "is a file: name another folder"),
    ):
        with subtests.test(words):
            given = arguments if "--out" in arguments else [*arguments, "--out", page]
            with pytest.raises(SystemExit) as ended:
                search(*given)
            (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flipscale: error: ")]
            assert words in line
            assert ended.value.code == 2
            assert not page.exists()
