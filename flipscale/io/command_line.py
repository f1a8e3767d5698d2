"""Command lines from dataclasses: a field is an argument, its type checks the value, and its docstring is the help."""

import argparse
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Protocol, TypeVar, get_args, get_origin, get_type_hints

from docstring_parser import parse

from flipscale.io.errors import UserError
from flipscale.io.paths import check_writable

T = TypeVar("T")
# A folder that can be written, or made.
OutputFolder = Annotated[Path, "output"]
# Metadata of a list field whose flag takes one value each time.
REPEATED = {"action": "append", "nargs": None}
# Metadata of a list field that gets the words of no other field, such as flags of a recipe.
OTHERS = {"others": True}


class Command(Protocol):
    """A frozen dataclass of the arguments of a command. Fields before `KW_ONLY` are positional, others are flags."""

    def run(self) -> None:
        """Do what the arguments ask for."""


Commands = type[Command] | Mapping[str, type[Command]]  # the second has a command for each subject of a verb


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are UserErrors; argparse itself prints the usage and exits."""

    def error(self, message: str) -> NoReturn:
        sentence = re.sub(r"^argument ([^:]+): is ", r"\1 is ", message)
        raise UserError(f"{sentence}; see {self.prog} --help")


def parse_command(kind: type[T], words: Sequence[str] | None = None, prog: str | None = None) -> T:
    """Return the dataclass of a command line, by default this process's. Raise UserError for a wrong one."""
    return kind(**vars(_parser(kind, prog).parse_args(words)))


def parse_known(kind: type[T], words: Sequence[str], prog: str) -> tuple[T, list[str]]:
    """Return the dataclass of a command line, and its words that belong to no field of it."""
    parsed, others = _parser(kind, prog).parse_known_args(words)
    return kind(**vars(parsed)), others


def add_commands(parser: argparse.ArgumentParser, commands: Commands) -> None:
    """Add the arguments of a verb. The parsed namespace has its dataclass as `command`."""
    if isinstance(commands, Mapping):
        subparsers = parser.add_subparsers(metavar="KIND", required=True)
        for name, kind in commands.items():
            words = _description(kind)
            add_commands(subparsers.add_parser(name, help=words, description=words), kind)
    else:
        _add_fields(parser, commands)
        parser.set_defaults(command=commands)
        if others_field(commands):  # a flag of a recipe is not an abbreviation, and the docstring tells of these flags
            parser.allow_abbrev, parser.description = False, _description(commands)


def others_field(kind: type[Command]) -> str | None:
    """Return the name of the field with the metadata `OTHERS`."""
    return next((field.name for field in dataclasses.fields(kind) if field.metadata == OTHERS), None)  # type: ignore[arg-type]


def _parser(kind: type, prog: str | None) -> Parser:
    parser = Parser(prog=prog, description=_description(kind), allow_abbrev=False)
    _add_fields(parser, kind)
    return parser


def _description(kind: type) -> str:
    docstring = parse(kind.__doc__ or "")
    return " ".join(filter(None, (docstring.short_description, docstring.long_description)))


def _add_fields(parser: argparse.ArgumentParser, kind: type) -> None:
    docstrings = [parse(base.__doc__ or "") for base in reversed(kind.__mro__[:-1])]
    helps = {one.arg_name: one.description or "" for docstring in docstrings for one in docstring.params}
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        if field.metadata == OTHERS:
            continue
        hint = hints[field.name]
        if type(None) in get_args(hint):
            hint = next(one for one in get_args(hint) if one is not type(None))
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        is_required = default is dataclasses.MISSING
        # The dataclass has the defaults, because argparse would extend the default of a list.
        options: dict[str, Any] = {"help": _help(helps[field.name], default), "default": argparse.SUPPRESS}
        if hint is bool:
            options["action"] = "store_true"
        elif get_origin(hint) is list:
            (hint,), options["action"] = get_args(hint), "extend"
            options["nargs"] = "+" if is_required or field.kw_only else "*"
            if get_origin(hint) is list:  # a list for each time that the flag is given
                (hint,), options["action"] = get_args(hint), "append"
        elif get_origin(hint) is tuple:
            hint, *others = get_args(hint)
            options["nargs"] = 1 + len(others)
        elif not is_required and not field.kw_only:
            options |= {"nargs": "?", "default": default}  # argparse would read SUPPRESS as a value
        if get_origin(hint) is Literal:
            options["choices"] = get_args(hint)
        elif hint is not bool:
            options["type"] = reader_of(hint)
        options |= field.metadata
        if field.kw_only:
            parser.add_argument(f"--{field.name}", required=is_required, **options)
        else:
            name = field.name.upper()
            parser.add_argument(field.name, metavar=name.removesuffix("S") if "action" in options else name, **options)


def _help(words: str, default: Any) -> str:
    """Return an argument's help, with its default unless the words name it."""
    shown = " ".join(map(str, default)) if isinstance(default, list) else f"{default}"
    if shown in ("", "None", "False") or default is dataclasses.MISSING or "Default:" in words:
        return words.replace("%", "%%")
    return f"{words} Default: {shown}.".replace("%", "%%")


def reader_of(hint: Any) -> Callable[[str], Any]:
    """Return an argparse type that reads a value of the type `hint` and checks it."""
    base, allowed = get_args(hint) if get_origin(hint) is Annotated else (hint, None)
    expected = {int: "a whole number", float: "a number"}.get(base, base.__name__)

    def read(text: str) -> Any:
        try:
            value = base(text)
            if hint == OutputFolder:
                check_writable(text, "")
            elif allowed is not None and value not in allowed:
                raise argparse.ArgumentTypeError(f"is {text[:40]}; it must be {allowed}")
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error).strip()) from None
        except ValueError:
            expectation = ", ".join(filter(None, (expected, allowed and str(allowed))))
            raise argparse.ArgumentTypeError(f"is {text[:40]!r}; it must be {expectation}") from None
        return value

    return read
