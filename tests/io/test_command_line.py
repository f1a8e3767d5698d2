"""A parser that tells a user's mistake in one sentence, and options that are in a range."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from flipscale.io.command_line import Parser, number, output_folder
from flipscale.io.ranges import Count, Positive, Share


def test_the_option_is_named() -> None:
    parser = Parser(prog="flipscale evaluate")
    parser.add_argument("--batch_size", type=number(Count))
    with pytest.raises(
        ValueError, match=r"^--batch_size is -1; it must be at least 1 and .*; see flipscale evaluate --help"
    ):
        parser.parse_args(["--batch_size", "-1"])
    with pytest.raises(ValueError, match=r"^unrecognized arguments: --nothing; see flipscale evaluate --help"):
        parser.parse_args(["--nothing"])


def test_a_folder_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert output_folder(str(tmp_path / "new")) == tmp_path / "new"
    with pytest.raises(argparse.ArgumentTypeError, match="file is a file: name another folder"):
        output_folder(f"{tmp_path}/file/new")


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (Count, "0", "is 0; it must be at least 1 and at most 1,000,000,000"),
        (Count, "1.5", "is '1.5'; it must be a whole number, at least 1"),
        (Share, "nan", "is nan; it must be at least 0 and at most 1"),
        (Positive, "ten", "is 'ten'; it must be a number, above 0"),
        (Positive, "inf", "is inf; it must be above 0"),
    ],
)
def test_an_option_out_of_its_range(kind: Any, text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        number(kind)(text)


def test_an_option_in_its_range() -> None:
    assert number(Count)("3") == 3
    assert number(Share)("0.25") == 0.25
