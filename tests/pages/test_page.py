"""Parts of pages: texts, pictures, masks, and the facts of a run."""

from flipscale.pages.page import rendered


def test_a_page_has_no_tag_control_or_half_of_a_letter_from_outside() -> None:
    empty: dict[str, object] = {name: {} for name in ("searches", "shown", "asked", "maps", "names", "number")}
    values = {"model": "<i>\x00\ud800</i>", "place": "a&b", "num_pictures": 1, "num_damaged": 2}
    values |= {"top": 8, "dim": 4, "embeds": "", "tower": None}
    text = rendered("search.html", **empty, **values)
    assert "&lt;i&gt;\\ud800&lt;/i&gt;" in text
    assert "<h1>a&amp;b</h1>" in text
    assert "2 more could not be read" in text
