"""Surprises of YAML are refused before it is loaded."""

import re
from pathlib import Path

import pytest

from flipscale.io.yaml_text import MAX_BYTES, outline, read_yaml

BOMB = "a0: &a0 [1, 2]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: 1\nb: 2\na: 3\n", "gives a twice; leave one of them out (line 3)"),
        (b"a: !!python/object/apply:os.system [ls]\n", "has the tag tag:yaml.org,2002:python/object/apply:os.system"),
        (b"a: [1, 010]\n", "has 010, which is another number to YAML; quote it or write it out"),
        (b"? [1]\n: 2\n", "has a list or a mapping for a key"),
        (b"a: 1:30\n", "has 1:30, which is another number to YAML"),
        (b"a: " + b"9" * 500, "has a number of 500 digits"),
        (b"a:\n\tb: 1\n", "cannot be read as YAML: while scanning for the next token found character"),
        (b"[" * 100 + b"]" * 100, "is nested deeper than 32 levels"),
        (b"a: &x [*x]\n", "contains itself by an alias"),
        (BOMB.encode(), "has more than 100,000 values, its aliases written out"),
        (b"a: caf\xe9\n", "is not in UTF-8 (invalid continuation byte at byte 6); save it as UTF-8"),
        (b"a: b\x00\n", "cannot be read as YAML: "),
        (b"a: 1\n---\nb: 2\n", "expected a single document"),
        (b"#" * (MAX_BYTES + 1), "has 262,145 bytes; at most 262,144 of YAML are read"),
    ],
)
def test_what_is_refused(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_yaml(tmp_path / "x.yaml")
    assert str(caught.value).startswith(str(tmp_path / "x.yaml"))


def test_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder; name a YAML file"):
        read_yaml(tmp_path)
    (tmp_path / "x.yaml").write_bytes("\ufeffa: &x [1, 1e-3, '010', no]\nb: *x\n".encode())
    values = ["1", "1e-3", "010", "no"]
    assert outline(read_yaml(tmp_path / "x.yaml")) == {"a": values, "b": values}
