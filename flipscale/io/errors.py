"""The error that a user can fix."""


class UserError(ValueError):
    """An input that the user must change.

    Commands print it as one line, `flipscale: error: MESSAGE`, and exit with 2. The message names the field, the value
    and the rule or fix: `global_batch_size 65536 is not divisible by 48 processes; use 32 or 64 processes`.
    """
