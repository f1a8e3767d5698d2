"""How a command ends on a user's mistake: one line and an exit code, no traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from flipscale.training.preemption import refuse_restart


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Print a ValueError as one line and exit with 2, an OSError or FloatingPointError with 1.

    After a ValueError the batch script, if there is one, is told not to start again: the user must change something.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"flipscale: error: {' '.join(str(error).split())}", file=sys.stderr)
        if isinstance(error, ValueError):
            refuse_restart()
        sys.exit(2 if isinstance(error, ValueError) else 1)
