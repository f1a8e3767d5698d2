"""Silence from other packages, so that every line on the terminal is one that its reader can use."""

import logging
import os
import sys
import warnings

# Loggers of other packages whose warnings are for their own developers; their errors are shown.
_LOGGERS = ("accelerate", "DeepSpeed", "torch.distributed", "transformers", "wandb")


def silence_other_packages() -> None:
    """Hide warnings of other packages in this process and those that it starts: deprecations, advice on numbers of
    workers, accelerators that were not found. Python's own `-W default` or `PYTHONWARNINGS` shows them."""
    for name in _LOGGERS:
        # A filter, since a package sets its logger's level when it is imported, and keeps filters.
        logging.getLogger(name).addFilter(_is_error)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        os.environ["PYTHONWARNINGS"] = "ignore"
        warnings.simplefilter("ignore")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
