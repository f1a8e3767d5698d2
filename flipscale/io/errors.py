"""The error that a user can fix, and the words of other errors."""

import importlib
from typing import Any


class UserError(ValueError):
    """An input that the user must change.

    Commands print it as one line, `flipscale: error: MESSAGE`, and exit with 2. The message names the field, the value
    and the rule or fix: `global_batch_size 65536 is not divisible by 48 processes; use 32 or 64 processes`.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of an error without a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def needed(module: str, reason: str, package: str) -> Any:
    """Return an optional module, or raise UserError with the reason for the need and the package to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{reason}; pip install {package}") from error
