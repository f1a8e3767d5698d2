"""Files that somebody names, and that must be files: a pipe would be waited for, and a device read for ever."""

from pathlib import Path

from flipscale.io.errors import UserError

_MOST_BYTES = 64 << 20


def refuse_others(path: Path) -> None:
    """Raise unless a path is a plain file, or nothing is there.

    Raises:
        ValueError: it is a folder, a pipe or a device.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'no plain file'}; move it away")


def refuse_no_png(path: Path, flag: str) -> None:
    """Raise before a picture is drawn if it could not be written then.

    Raises:
        ValueError: it is no name of a PNG file in a folder, or there is something else than a file.
    """
    if path.suffix.lower() != ".png" or not path.absolute().parent.is_dir():
        raise UserError(f"{flag} {path} cannot be written; name a PNG file in a folder that exists")
    refuse_others(path)


def plain_text(path: Path) -> str:
    """Return the text of a file, UTF-8.

    Raises:
        ValueError: it is a folder, a pipe or a device, has more than 64 MB, or is not UTF-8.
        OSError: it is not there, or cannot be read.
    """
    refuse_others(path)
    if path.stat().st_size > _MOST_BYTES:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes; at most {_MOST_BYTES:,} are read")
    return path.read_text(encoding="utf-8")


def is_utf8(text: str) -> bool:
    """Return whether a text can be written; halves of surrogate pairs, as file names that are no UTF-8 have, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
