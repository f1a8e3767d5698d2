"""The README's table of attacks: its sums, and the number of attacks by exit code."""

import importlib
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_readme_counts_the_attacks() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| attacks on |")[1].split("\n\n")[0]
    rows = [tuple(map(int, numbers)) for numbers in re.findall(r"\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", table)]
    *parts, total = rows
    assert total == tuple(map(sum, zip(*parts, strict=True)))
    modules = [file.stem for file in Path(__file__).parent.glob("test_*.py") if file.stem != "test_readme"]
    codes = Counter(attack.code for name in modules for attack in importlib.import_module(f"attacks.{name}").ATTACKS)
    others = sum(count for code, count in codes.items() if code not in (0, 2))
    assert total == (codes.total(), codes[0], codes[2], others)
