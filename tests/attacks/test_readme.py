"""The README's table of attacks is that of the tests."""

import importlib
from pathlib import Path

from attacks.attack import Attack

ROOT = Path(__file__).parents[2]
# The rows of the README, in its order, by the modules of their attacks.
ROWS = {
    "images and captions": ("test_samples",),
    "shards, indices, servers": ("test_shards",),
    "checkpoints": ("test_checkpoints",),
    "run directories, signals": ("test_runs",),
    "recipes and flags": ("test_recipes",),
    "studies": ("test_studies",),
    "processes, locales, launchers": ("test_processes",),
    "lists and archives to prepare": ("test_lists", "test_folders", "test_sets"),
    "model folders, pushes": ("test_models",),
    "servers in the Hub's place": ("test_hub",),
    "searches for pictures": ("test_search",),
    "what other programs left": ("test_engines",),
}


def rows() -> list[str]:
    """The table's rows: how many attacks there are, and how many end each way."""
    lines, total = [], [0, 0, 0, 0]
    for title, modules in ROWS.items():
        attacks: list[Attack] = [
            attack for module in modules for attack in importlib.import_module(f"attacks.{module}").ATTACKS
        ]
        counts = [len(attacks), *(sum(attack.code == code for attack in attacks) for code in (0, 2))]
        counts.append(counts[0] - sum(counts[1:]))
        total = [a + b for a, b in zip(total, counts, strict=True)]
        lines.append(f"| {title} | {' | '.join(map(str, counts))} |")
    return [*lines, f"| all | {' | '.join(map(str, total))} |"]


def test_every_table_is_in_the_readme() -> None:
    modules = {file.stem for file in Path(__file__).parent.glob("test_*.py")} - {"test_readme"}
    assert modules == {module for own in ROWS.values() for module in own}


def test_the_readme_counts_them() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in rows():
        assert row in text
