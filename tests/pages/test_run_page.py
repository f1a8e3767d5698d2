"""The report of a run: its content, in a browser too, and that its failure never ends a run."""

import base64
import dataclasses
import io
import re
import shlex
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import changed_recipe
from pages.browser import check_accessible, check_offline, look
from pages.conftest import HOSTILE
from PIL import Image

from flipscale.evaluation.results import BEFORE, THIS_MODEL, Result, append_results, latest, read_results
from flipscale.hub.loading import load_dual_encoder
from flipscale.pages.run_page import MOST_BYTES, mask_rows, write_run_page
from flipscale.recipe.outputs import EvalRecipe
from flipscale.recipe.recipe import Recipe
from flipscale.start.complete_recipe import parse_recipe


def recipe_of(run_dir: Path) -> Recipe:
    return parse_recipe(["--config", str(run_dir / "recipe.yaml")])


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run without its report."""
    shutil.copytree(trained, tmp_path / "copy")
    (tmp_path / "copy/report.html").unlink()
    return tmp_path / "copy"


def test_a_run_ends_with_its_report(trained: Path) -> None:
    page = (trained / "report.html").read_text()
    assert len(page.encode()) <= MOST_BYTES
    cells = [unescape(cell) for cell in re.findall(r"<td[^>]*>([^<]*)", page)]
    for result in latest(read_results(trained)):
        assert result.value_text in cells
        assert result.interval_text in cells
    text = " ".join(unescape(re.sub(r"<[^>]*>", " ", page)).split())
    assert "whole </table>: whole" in text
    (top1,) = [result for result in latest(read_results(trained)) if result.name == "zero_shot/top1"]
    right = round(top1.value * 40 / 100)
    assert f"Counted over 40 of the set's 40 pictures, of which the finished model names {right} right" in text
    assert "base_lr: 0.012" in text
    assert "Missing on this page" not in page


@pytest.mark.parametrize(("width", "dark"), [(1000, False), pytest.param(390, True, marks=pytest.mark.long)])
def test_a_browser_shows_it(trained: Path, tmp_path: Path, width: int, dark: bool) -> None:
    page = (trained / "report.html").read_text()
    assert "<script" not in page
    assert 'onerror="' not in page
    assert "{{ 7 * 7 }}" in page
    assert "word word…" in page
    assert HOSTILE[-1].strip() not in page
    opened = look(trained / "report.html", tmp_path, width, dark)
    check_offline(opened)
    check_accessible(opened)
    assert len(opened.facts["pictures"]) > 30
    assert "results" not in opened.facts["scrolled"], "the last columns are hidden"


def test_what_is_gone_is_named_and_the_rest_is_there(copied: Path) -> None:
    recipe = dataclasses.replace(recipe_of(copied), output_dir=str(copied))
    gone = dataclasses.replace(
        recipe,
        eval=EvalRecipe(zero_shot=str(copied / "gone")),
        data=dataclasses.replace(recipe.data, shards=str(copied / "gone too")),
    )
    page = unescape(write_run_page(gone, load_dual_encoder).read_text())
    assert re.search(r"<li>The test pictures: .*gone.*</li>", page)
    assert re.search(r"<li>What was masked: .*gone too.*</li>", page)
    assert ">Results<" in page
    (copied / "results.jsonl").unlink()
    shutil.rmtree(copied / "model/figures")
    lines = [line for line in (copied / "metrics.jsonl").open() if "zero_shot" not in line]
    (copied / "metrics.jsonl").write_text("".join(lines))
    page = write_run_page(dataclasses.replace(recipe, eval=EvalRecipe()), load_dual_encoder).read_text()
    assert "the recipe has no evaluation that names pictures or finds captions" in page
    assert "What was masked" in page
    assert ">Results<" not in page


def test_left_out_results_and_figures_are_counted(copied: Path) -> None:
    recipe = dataclasses.replace(recipe_of(copied), output_dir=str(copied), eval=EvalRecipe())
    last = read_results(copied)[-1]
    (copied / "results.jsonl").unlink()
    named = [dataclasses.replace(last.result, task=f"Task{n}", headline=True, made_by={"data": "A"}) for n in range(70)]
    append_results(copied, named, last.step, last.samples_seen, last.trained_seconds)
    for number in range(10):
        shutil.copy(copied / "figures/loss.png", copied / f"figures/{number}.png")
    count = len(list((copied / "figures").iterdir()))
    page = write_run_page(recipe, load_dual_encoder).read_text()
    for words in ("<p>Task0 of A, ", "<li>10 more results: results.jsonl", f"<li>{count - 8} more figures: figures "):
        assert words in page
    for folder in ("figures", "model/figures"):
        shutil.rmtree(copied / folder)
    assert "pip install" not in write_run_page(recipe, load_dual_encoder).read_text()


def test_before_after_and_change_are_columns_and_the_loss_leads(copied: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(recipe_of(copied), output_dir=str(copied), eval=EvalRecipe())
    last = read_results(copied)[-1]
    (copied / "results.jsonl").unlink()
    shape = Result("own", "zero_shot", "top1", 0.0, 1000, chance=4.0, made_by={"data": "fruit"})
    figures = (("own", 20.0, 60.0), ("guard", 70.5, 50.25), ("other", 30.0, 30.5))
    for index, who in ((1, BEFORE), (2, THIS_MODEL)):
        made = [(one, one[index]) for one in figures]
        results = [
            dataclasses.replace(shape, task=one[0], value=value, low=value - 2, high=value + 2, who=who)
            for one, value in made
        ]
        append_results(copied, results, last.step, last.samples_seen, last.trained_seconds)
    page = write_run_page(recipe, load_dual_encoder)
    text = page.read_text()
    lead = text.partition("</header>")[0]
    assert lead.index("Lost against the model before: guard of fruit top-1 -20.2 points") < lead.index("Won against")
    assert "other of fruit" not in lead
    head = re.findall(r"<th[^>]*>([^<]*)</th>", text.partition("<thead>")[2].partition("</thead>")[0])
    assert head == ["metric", "before", "after", "change", "chance", "n"]
    (row,) = re.findall(r"guard of fruit</th></tr>\s*(<tr>.*?</tr>)", text, re.DOTALL)
    cells = [" ".join(re.sub(r"<[^>]*>", " ", cell).split()) for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)]
    before, after, change = "70.5 % 68.5 to 72.5", "50.2 % 48.2 to 52.2", "-20.2 points, lost -23.1 to -17.4"
    assert cells == ["top-1", before, after, change, "4.0 %", "1,000"]
    opened = look(page, tmp_path)
    check_accessible(opened)
    assert "results" not in opened.facts["scrolled"], "the last columns are hidden"


def test_it_names_the_start_of_a_run(copied: Path) -> None:
    recipe = dataclasses.replace(recipe_of(copied), output_dir=str(copied), eval=EvalRecipe())
    assert "It learned from " in write_run_page(recipe, load_dual_encoder).read_text()
    kept = yaml.safe_load((copied / "recipe.yaml").read_text())
    for fields, shown in (({"init_from": "models/<b>"}, "models/&lt;b&gt;"), ({"vision": "v", "text": "t"}, "v and t")):
        (copied / "recipe.yaml").write_text(yaml.safe_dump({**kept, "model": {**kept["model"], **fields}}))
        page = write_run_page(recipe, load_dual_encoder).read_text()
        assert f"It began with the weights of {shown} and learned from " in page


def test_captions_are_answers_where_there_are_no_classes(copied: Path, trained: Path) -> None:
    tasks = EvalRecipe(retrieval=str(trained.parent / "captions"))
    run_dir = copied.rename(copied.with_name("my 'run' $(x)"))
    changed = dataclasses.replace(recipe_of(run_dir), eval=tasks, output_dir=str(run_dir))
    page = write_run_page(changed, load_dual_encoder).read_text()
    assert f"the three nearest of {len(HOSTILE)} captions" in page
    assert "<script" not in page
    commands = [shlex.split(unescape(text)) for text in re.findall(r"<pre[^>]*>(flipscale .*?)</pre>", page)]
    assert [words[1:3] for words in commands] == [[verb, str(run_dir)] for verb in ("search", "evaluate", "push")]


@pytest.mark.parametrize("views", [1, 2])
def test_pictures_have_the_sizes_and_masks_of_their_stages(recipe: dict, tmp_path: Path, views: int) -> None:
    stages = [
        {"name": "small", "samples": 16, "image_size": 16, "base_lr": 0.01},
        {"name": "masked", "samples": 16, "image_size": 16, "mask_ratio": 0.5},
        {"name": "own", "samples": 16},
        {"name": "tuned", "samples": 16, "image_size": 16},
    ]
    content = changed_recipe({**recipe, "stages": stages}, {"mask": {"views": views}})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    rows = mask_rows(recipe_of(tmp_path), 2)
    masked = "masked: 50 % of the patches left out, at 16 x 16 pixels"
    assert {title: {(picture.width, picture.height) for picture in pictures} for title, pictures in rows.items()} == {
        "own: whole": {(32, 32)},
        "small, tuned: whole, at 16 x 16 pixels": {(16, 16)},
        masked: {(16, 16)},
    }
    for picture in rows[masked]:
        alpha = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2]))))[..., 3]
        assert (alpha == 255).mean() == 0.5
        assert set(np.unique(alpha)) == {0, 255}
