"""A page in a real browser: headless Chromium, which can reach no network, and what it found there."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome")
OPTIONS = (
    # Tests may run as root, and in a container with little shared memory.
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--proxy-server=127.0.0.1:9"),
)
# Initiator of a browser's own requests in its network log.
_NO_ORIGIN = "not an origin"
# Measures the page as it stands after a moment: its pictures, headings and width.
LOOK = """
<script>
addEventListener("load", () => setTimeout(() => {
  const every = selector => [...document.querySelectorAll(selector)];
  const facts = {
    lang: document.documentElement.lang,
    title: document.title,
    pictures: every("img").map(image => [image.alt, image.naturalWidth]),
    headings: every("h1, h2, h3, h4, h5, h6").map(heading => [Number(heading.tagName[1]), heading.textContent.trim()]),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    scrolled: every(".scroll").filter(f => f.scrollWidth > f.clientWidth).map(f => f.getAttribute("aria-labelledby")),
    shown: every(".search").filter(row => !row.hidden).length,
    resources: performance.getEntriesByType("resource").map(entry => entry.name),
  };
  const node = document.createElement("script");
  node.type = "application/json";
  node.id = "facts";
  node.textContent = JSON.stringify(facts).replaceAll("<", "\\\\u003c");
  document.body.append(node);
}, 500));
</script>
"""


@dataclass(frozen=True)
class Opened:
    """A page that a browser has opened.

    Args:
        dom: as the browser has it.
        facts: what `LOOK` measured.
        requests: the addresses that the page asked a network for.
    """

    dom: str
    facts: dict[str, Any]
    requests: list[str]


def program() -> str:
    """The browser; without one the test is skipped, and says so."""
    found = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("pages are looked at in a browser, and there is none: apt-get install chromium-headless-shell")
    return found


def look(page: Path, folder: Path, width: int = 1000, dark: bool = False, script: str = "") -> Opened:
    """Open a page.

    Args:
        folder: for the copy that is opened, which has `script` and then `LOOK` at its end.
        dark: as where dark pages are preferred.
    """
    text = page.read_text()
    if dark:
        assert "@media (prefers-color-scheme: dark)" in text
        text = text.replace("@media (prefers-color-scheme: dark)", "@media all")
    copy, log = folder / f"{page.stem}-copy.html", folder / "network.json"
    acting = f"<script>{script}</script>" if script else ""
    copy.write_text(text.replace("</body>", f"{acting}{LOOK}</body>"))
    command = [program(), *OPTIONS, f"--window-size={width},900", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--log-net-log={log}", "--virtual-time-budget=3000", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    facts = re.search(r'<script type="application/json" id="facts">(.*?)</script>', done.stdout, re.DOTALL)
    assert facts is not None, done.stderr
    return Opened(done.stdout, json.loads(facts[1]), list(dict.fromkeys(_requests(json.loads(log.read_text())))))


def _requests(log: dict[str, Any]) -> Iterator[str]:
    """Yield the addresses that the page asked a network for: those of its requests, and the hosts of its preconnects.

    A whole Chromium also calls its maker's hosts. Such a request has no origin, and its connection belongs to no page.
    """
    for event in log["events"]:
        fields = event.get("params", {})
        if fields.get("initiator", _NO_ORIGIN) != _NO_ORIGIN:
            yield fields["url"]
        elif " <file:" in (connection := fields.get("group_id", "")):
            yield connection.split()[0]


def check_accessible(opened: Opened) -> None:
    """Assert that whoever cannot see a page, or sees it on a phone or in the dark, can read it."""
    facts = opened.facts
    assert facts["lang"] == "en"
    assert facts["title"]
    assert facts["pictures"]
    for alt, width in facts["pictures"]:
        assert alt.strip()
        assert width > 0, f"the picture {alt!r} is broken"
    levels = [level for level, _ in facts["headings"]]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels)), facts["headings"]
    assert facts["overflow"] <= 0, f"{facts['overflow']} pixels too wide"


def check_offline(opened: Opened) -> None:
    """Assert that a page asked no network for anything."""
    assert opened.requests == []
    assert [name for name in opened.facts["resources"] if not name.startswith("data:")] == []
