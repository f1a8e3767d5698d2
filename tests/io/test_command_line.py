"""A dataclass as a command line: positional fields, flags of every type, their help, and errors that name a flag."""

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from flipscale.io.command_line import REPEATED, OutputFolder, parse_command, parse_known
from flipscale.io.errors import UserError
from flipscale.io.options import Count, Positive, Share


@dataclass(frozen=True)
class Draw:
    """Draw pictures.

    Args:
        sources: Folders, 100% of them.
        count: Number of pictures.
        shares: Shares of each.
        task: A task of its own.
        scale: Least and most scale.
        seconds: Time. Default: none.
        kinds: Kinds of pictures.
        out: Folder to write.
        dry: Draw nothing.
    """

    sources: list[Path]
    _: KW_ONLY
    count: Count
    shares: list[Share] = field(default_factory=lambda: [0.5])
    task: list[str] = field(default_factory=list, metadata=REPEATED)
    scale: tuple[Positive, Positive] | None = None
    seconds: Positive | None = None
    kinds: list[Literal["a", "b"]] = field(default_factory=list)
    out: OutputFolder = Path("drawn")
    dry: bool = False


def test_words_become_fields() -> None:
    assert parse_command(Draw, ["x", "y", "--count", "3"]) == Draw([Path("x"), Path("y")], count=3)
    words = (
        "x --count=010 --shares 0 1 --task {a:} --task null --scale 1 2 --seconds 1e3 --kinds a b --shares 0.1 --dry"
    )
    assert parse_command(Draw, words.split()) == Draw(
        *([Path("x")],), count=10, shares=[0, 1, 0.1], task=["{a:}", "null"], scale=[1, 2], seconds=1000.0,  # type: ignore[arg-type]
        kinds=["a", "b"], dry=True,
    )  # fmt: skip
    assert parse_known(Draw, ["x", "--count", "1", "--other", "2"], "draw") == (
        Draw([Path("x")], count=1), ["--other", "2"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--count 1", "required: SOURCE;"),
        ("x", "required: --count;"),
        ("x --count 0", "^--count is 0; it must be at least 1 and at most 1,000,000,000; see draw --help"),
        ("x --count 1.5", "--count is '1.5'; it must be a whole number, at least 1"),
        ("x --count 1 --shares nan", "--shares is nan; it must be at least 0 and at most 1"),
        ("x --count 1 --seconds 1:30", "--seconds is '1:30'; it must be a number, above 0"),
        ("x --count 1 --seconds inf", "--seconds is inf; it must be above 0"),
        ("x --count 1 --kinds c", "--kinds.*'c'.*'a', 'b'"),
        ("x --count 1 --out FILE/new", "--out is '.*file/new'; .*file is a file: name another folder"),
        ("x --count 1 --nothing", "^unrecognized arguments: --nothing; see draw --help"),
    ],
)
def test_wrong_words_are_named(words: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        parse_command(Draw, words.replace("FILE", f"{tmp_path}/file").split(), "draw")


def test_the_help_is_the_docstring_with_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_command(Draw, ["--help"], "draw")
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "Draw pictures.",
        "SOURCE Folders, 100% of them.",
        "Shares of each. Default: 0.5.",
        "Default: drawn.",
    ):
        assert words in text
