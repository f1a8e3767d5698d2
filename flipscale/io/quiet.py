"""Hide warnings and progress bars of other packages."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def silence_other_packages() -> None:
    """Hide other packages' warnings in this process and its children. Errors stay, and `python -W` overrides this."""
    if sys.warnoptions not in ([], ["ignore"]):  # "ignore" comes from a parent that called this function
        return
    warnings.simplefilter("ignore")
    os.environ["PYTHONWARNINGS"] = "ignore"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    # A filter, because DeepSpeed sets its logger's level when it is imported later.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide the progress bars of transformers in a `with` block."""
    from transformers.utils import logging as transformers_logging  # slow to import, and `flipscale --help` needs none

    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
