"""Parts of pages: texts, pictures, masks, and the facts of a run."""

import shutil
from pathlib import Path

import pytest
from pages import browser

from flipscale.pages.page import rendered


def test_a_page_has_no_tag_control_or_half_of_a_letter_from_outside() -> None:
    empty: dict[str, object] = {name: {} for name in ("searches", "shown", "asked", "maps", "names", "number")}
    values = {"model": "<i>\x00\ud800</i>", "place": "a&b", "num_pictures": 1, "num_damaged": 2}
    values |= {"top": 8, "dim": 4, "embeds": "", "tower": None}
    text = rendered("search.html", **empty, **values)
    assert "&lt;i&gt;\\ud800&lt;/i&gt;" in text
    assert "<h1>a&amp;b</h1>" in text
    assert "2 more could not be read" in text


@pytest.mark.parametrize("program", browser.PROGRAMS)
def test_a_browser_tells_the_requests_of_a_page_from_its_own(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"there is no {program}")
    monkeypatch.setattr(browser, "PROGRAMS", (program,))
    place, page = "http://127.0.0.1:9", tmp_path / "page.html"
    page.write_text("<body><p>nothing from outside</p></body>")
    browser.check_offline(browser.look(page, tmp_path))
    style = f'<style>@import "{place}/a.css"; body {{ background: url({place}/b.png) }}</style>'
    script = f"<script>fetch('{place}/c').catch(() => 0); new WebSocket('ws://127.0.0.1:9/d')</script>"
    elements = f'<img src="{place}/e.png"><iframe src="{place}/f.html"></iframe>'
    page.write_text(f"<body>{style}{script}{elements}</body>")
    opened = browser.look(page, tmp_path)
    with pytest.raises(AssertionError):
        browser.check_offline(opened)
    expected = {f"{place}/{name}" for name in ("a.css", "b.png", "c", "e.png", "f.html")}
    assert set(opened.requests) == {*expected, "ws://127.0.0.1:9/d"}
