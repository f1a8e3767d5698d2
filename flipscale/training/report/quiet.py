"""Silence from other packages, so that every line on the terminal is one that its reader can use."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def silence_other_packages() -> None:
    """Hide what other packages warn of in this process and those that it starts: deprecations, advice on numbers of
    workers, accelerators that were not found. Their errors are shown, and `python -W default` shows the warnings."""
    if sys.warnoptions not in ([], ["ignore"]):  # the user's, or what this sets for the processes that it starts
        return
    warnings.simplefilter("ignore")
    os.environ["PYTHONWARNINGS"] = "ignore"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    # DeepSpeed sets its logger's level when it is imported, which accelerate does where it is installed.
    logging.getLogger("DeepSpeed").addFilter(_is_error)


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide the progress bars of transformers, of weights that are in memory or are written elsewhere."""
    from transformers.utils import logging as transformers_logging  # not needed by `flipscale --help`

    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
