"""Which columns of a table or a data set hold images and captions."""

from collections.abc import Sequence

IMAGE_COLUMNS = ("image", "file_name", "filename", "path", "filepath", "image_path", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "txt")
_MOST_NAMED, _SHOWN = 20, 60


def column(name: str, columns: Sequence[str], asked: str | None, usual: Sequence[str], kind: str) -> str:
    """Return the column `asked` for, or the first of the usual names that exists.

    Raises:
        ValueError: there is none, or there are two of that name.
    """
    found = next((column for column in ([asked] if asked else usual) if column in columns), None)
    if found is None:
        named = [one if len(one) <= _SHOWN else f"{one[:_SHOWN]}..." for one in columns[:_MOST_NAMED]]
        raise ValueError(
            f"{name} has no column {asked or ' or '.join(usual)}; name the {kind}s' with --{kind}_column, "
            f"one of {', '.join(named) or 'none'}"
        )
    if list(columns).count(found) > 1:
        raise ValueError(f"{name} has two columns {found}; rename one, or name another with --{kind}_column")
    return found
