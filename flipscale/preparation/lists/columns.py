"""Which columns of a table or a data set hold images, captions and classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flipscale.io.errors import UserError

IMAGE_COLUMNS = ("image", "file_name", "filename", "path", "filepath", "image_path", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "txt")
LABEL_COLUMNS = ("label", "class", "category", "labels")
_MOST_NAMED, _SHOWN = 20, 60


@dataclass(frozen=True)
class Columns:
    """The columns of a list that are read.

    Args:
        label: of classes; None if they are not asked for.
        classes: the names of classes, by the column that holds their numbers.
        usual_label: a column that has a usual name of classes, whether or not they are asked for.
    """

    image: str
    caption: str
    label: str | None = None
    classes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    usual_label: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The columns in the order in which rows are returned."""
        return (self.image, self.caption, *([self.label] if self.label else []))

    def named(self, column: str, value: Any) -> Any:
        """Return the name of a class if the column holds its number, else the value as it is."""
        names = dict(self.classes).get(column, ())
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else value

    def told(self) -> str:
        """Return what is read of which column, for the line about the layout."""
        told = f"images of the column {self.image}, captions of {self.caption}"
        return f"{told}, classes of {self.label}" if self.label else told


@dataclass(frozen=True)
class AskedColumns:
    """The columns that somebody asks for; None is the first with a usual name, of classes none at all."""

    image: str | None = None
    caption: str | None = None
    label: str | None = None

    def among(self, source: str, names: Sequence[str], features: dict[str, Any] | None = None) -> Columns:
        """Return the columns of a list.

        Args:
            source: the list, for messages.
            names: all of its columns.
            features: what `datasets` says of them.

        Raises:
            ValueError: one is missing, or there are two of its name.
        """
        image = _column(source, names, self.image, IMAGE_COLUMNS, "image")
        caption = _column(source, names, self.caption, CAPTION_COLUMNS, "caption")
        label = _column(source, names, self.label, (), "label") if self.label else None
        usual = next((name for name in LABEL_COLUMNS if name in names), None)
        named = {name: _class_names(feature) for name, feature in (features or {}).items() if name in (caption, label)}
        classes = tuple((name, found) for name, found in named.items() if found)
        return Columns(image, caption, label, classes, usual)


def _column(source: str, columns: Sequence[str], asked: str | None, usual: Sequence[str], kind: str) -> str:
    """Return the column `asked` for, or the first of the usual names that exists."""
    flag = "--labels" if kind == "label" else f"--{kind}_column"
    found = next((column for column in ([asked] if asked else usual) if column in columns), None)
    if found is None:
        named = [one if len(one) <= _SHOWN else f"{one[:_SHOWN]}..." for one in columns[:_MOST_NAMED]]
        raise UserError(
            f"{source} has no column {asked or ' or '.join(usual)}; name the {kind}s' with {flag}, "
            f"one of {', '.join(named) or 'none'}"
        )
    if list(columns).count(found) > 1:
        raise UserError(f"{source} has two columns {found}; rename one, or name another with {flag}")
    return found


def _class_names(feature: Any) -> tuple[str, ...]:
    """Return the names that `datasets` knows for the numbers of a column; none if it holds no classes."""
    return tuple(getattr(feature, "names", None) or ())
