"""Checks of files and folders that a user names, before they are read or written."""

import codecs
import os
import shlex
import shutil
import stat
from pathlib import Path

from flipscale.io.errors import UserError

_MOST_BYTES = 64 << 20
_LONGEST_NAME = 255  # bytes of a file name, on all usual file systems


def quoted(place: str | Path) -> str:
    """Return a path, glob or URL as a word of a command in a shell, which no program takes for an option."""
    text = str(place)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def check_plain(path: Path) -> None:
    """Raise UserError unless `path` is a plain file or nothing. A pipe blocks its reader; a device never ends.

    One look decides, because another process may remove the file at any time.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'not a plain file'}; move it away")


def check_png_path(path: Path, flag: str) -> None:
    """Raise UserError unless `path` is a PNG file name in an existing folder, and a plain file if it exists."""
    if path.suffix.lower() != ".png" or not path.absolute().parent.is_dir():
        raise UserError(f"{flag} {path} cannot be written; name a PNG file in a folder that exists")
    check_plain(path)


def check_page_path(path: Path, flag: str) -> None:
    """Raise UserError unless `path` is the name of an HTML file that can be written."""
    if path.suffix != ".html" or path.is_dir():
        raise UserError(f"{flag} is {str(path)!r}; name a file that ends in .html")
    check_writable(path.parent, flag)


def check_writable(folder: str | Path, field: str) -> None:
    """Raise UserError, which names the option or recipe field of the folder, unless it can be written, or can be made.
    Nothing is made here."""
    name = str(folder)
    nearest = next((p for p in (Path(name), *Path(name).absolute().parents) if os.path.lexists(p)), Path("/"))
    if not name or name.startswith("~"):
        reason = "name a folder, and in place of ~ the whole path"
    elif any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(name).parts):
        reason = f"use names of at most {_LONGEST_NAME} bytes"
    elif not nearest.exists():
        reason = f"{nearest} is a link to {os.readlink(nearest)}, which does not exist: name another folder"
    elif not nearest.is_dir():
        reason = f"{nearest} is a file: name another folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        reason = f"{nearest} cannot be written: change its permissions, or name another folder"
    else:
        return
    raise UserError(f"{field} is {name[:200]!r}; {reason}")


def check_disk_space(folder: Path, needed: int, remedy: str) -> None:
    """Raise UserError unless the disk of `folder`, which need not exist, has `needed` bytes free. `remedy` is a way to
    need less, such as `prepare fewer tasks with --only`."""
    free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
    if needed > free:
        raise UserError(
            f"{size_text(needed)} are needed and the disk of {folder} has {size_text(free)} free; free some space, "
            f"name another folder, or {remedy}"
        )


def size_text(num_bytes: int) -> str:
    """Return a number of bytes with a unit: `1.2 GB`."""
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}" if value < 100 else f"{value:.0f} {units[0]}"


def file_state(path: str | Path) -> tuple[int, ...]:
    """Return the size of a file and its times; empty if it is gone. A copy that keeps the rest has another `ctime`."""
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return ()
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


def read_text(path: Path) -> str:
    """Return the text of a file. Raise UserError for a folder, a pipe, a device or more than 64 MB, ValueError for
    content that is not UTF-8."""
    check_plain(path)
    if path.stat().st_size > _MOST_BYTES:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes; expected at most {_MOST_BYTES:,}")
    return path.read_text(encoding="utf-8-sig")


def last_line(log: Path) -> str:
    """Return the last line of a process's output in a file, without the mark of an error."""
    lines = log.read_text(errors="replace", encoding="utf-8").strip().splitlines() if log.exists() else []
    return lines[-1].removeprefix("flipscale: error: ") if lines else "no output"


def is_utf16(content: bytes) -> bool:
    """Return whether bytes begin with UTF-16's byte order mark, or with ASCII characters in UTF-16 without a mark."""
    head = content[:4]
    no_mark = b"\0" in head and any(head) and not (any(head[::2]) and any(head[1::2]))
    return no_mark or head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def is_utf8(text: str) -> bool:
    """Return whether a text can be encoded. File names that are not UTF-8 hold halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
