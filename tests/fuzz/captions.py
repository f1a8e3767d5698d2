"""The bytes of a `KEY.json` and of a `KEY.txt`."""

from contextlib import suppress
from pathlib import Path

from flipscale.data.captions import captions_of_json, choose_caption
from flipscale.data.samples import BadSample


def seeds() -> list[bytes]:
    """A caption, several, and what other tools write."""
    return [
        b"a red bar",
        b"\xef\xbb\xbfa red bar\n",
        b'{"caption": "a red bar", "similarity": NaN, "width": 40}',
        b'{"captions": ["a red bar", null, "a bar"], "caption": "a"}',
        b'{"captions": "a \\ud83d\\ude00 bar"}',
        "a red bar".encode("utf-16"),
    ]


def attack(data: bytes, folder: Path) -> None:
    """Choose among the captions, which must be texts that can be written down."""
    for read in (captions_of_json, lambda stored: (stored,)):
        with suppress(BadSample):
            text = choose_caption(read(data), 0.9)
            assert text.strip()
            assert "\0" not in text
            assert text.encode()
