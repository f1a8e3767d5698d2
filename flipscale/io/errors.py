"""The error that a user can fix, and the words of other errors."""


class UserError(ValueError):
    """An input that the user must change.

    Commands print it as one line, `flipscale: error: MESSAGE`, and exit with 2. The message names the field, the value
    and the rule or fix: `global_batch_size 65536 is not divisible by 48 processes; use 32 or 64 processes`.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of an error without a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
