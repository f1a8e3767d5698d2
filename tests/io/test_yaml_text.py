"""Surprises of YAML are refused before it is loaded. `attacks/test_recipes.py` has more of them."""

import re
from pathlib import Path

import pytest

from flipscale.io.yaml_text import outline, read_yaml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"? [1]\n: 2\n", "has a list or a mapping for a key"),
        (b"a: 1:30\n", "has 1:30, which is another number to YAML"),
        (b"a: b\x00\n", "cannot be read as YAML: "),
        (b"a: 1\n---\nb: 2\n", "cannot be read as YAML: expected a single document"),
    ],
)
def test_what_is_refused(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'x.yaml'} {message}")):
        read_yaml(tmp_path / "x.yaml")


def test_a_tab_is_refused_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a:\n\tb: 1\n")
    with pytest.raises(ValueError, match=r"line 2, column 1.*; indent with spaces$"):
        read_yaml(tmp_path / "x.yaml")


def test_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes("\ufeffa: &x [1, 1e-3, '010', no]\nb: *x\n".encode())
    values = ["1", "1e-3", "010", "no"]
    assert outline(read_yaml(tmp_path / "x.yaml")) == {"a": values, "b": values}
