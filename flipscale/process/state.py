"""The state of the whole process: the garbage collector, standard streams, environment, warnings, Ctrl-C in imports.

Other modules change it by these functions only. A command changes its process for good; `kept_state` restores it for
scripts. `flipscale.process.preemption` handles signals. The forms that a model takes on GPUs, `_gpu_types`, stay in
`flipscale.model`, which imports no other folder.
"""

import gc
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from flipscale.io.streams import SafeStream


@contextmanager
def kept_state() -> Iterator[None]:
    """Restore the collector, the environment and the warnings at the end of a `with` block."""
    was_on, froze, before = gc.isenabled(), gc.get_freeze_count() > 0, dict(os.environ)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        (gc.enable if was_on else gc.disable)()
        if not froze:
            gc.unfreeze()
        _set({name: before.get(name) for name in {*before, *os.environ}})


def begin_imports() -> None:
    """Prepare a command for its imports, which take seconds: UTF-8, no collections, and no traceback at Ctrl-C."""
    use_utf8()
    gc.disable()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_imports() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again. The collector stays off."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def use_utf8() -> None:
    """Start this command anew in Python's UTF-8 mode if the locale has another encoding.

    Python would take names of files and words of the command line for other characters, and could not open files that
    a UTF-8 text names.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@contextmanager
def safe_streams() -> Iterator[None]:
    """Make stdout and stderr safe for any text in a `with` block: names and captions may hold control characters.

    A closed stream becomes /dev/null; otherwise the next opened file would get its number.
    """
    before = sys.stdout, sys.stderr
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            try:
                os.fstat(descriptor)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is `descriptor`
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout = SafeStream(sys.stdout, is_optional=False)  # type: ignore[assignment]
    sys.stderr = SafeStream(sys.stderr, is_optional=True)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


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
def without_collector() -> Iterator[None]:
    """Turn the collector off in a `with` block, and on at its end.

    Through a start, it would go through the objects of all imports again and again, for a fifth of the start's time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def freeze_imports() -> None:
    """Freeze all objects, the imports', so that the collection before the first step is short."""
    gc.freeze()


def begin_steps() -> None:
    """Collect, freeze the objects of the set-up, which live as long as the run, and turn the collector off."""
    gc.collect()
    gc.freeze()
    gc.disable()


def collect_garbage() -> None:
    """Collect garbage between two steps, because the collector is off."""
    gc.collect()


def collect_frozen_garbage() -> None:
    """Collect among frozen objects too, and freeze the rest again if the loop has frozen them."""
    froze = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if froze:
        gc.freeze()


def turn_collector_on() -> None:
    """Turn the collector on, also for frozen objects."""
    gc.enable()
    gc.unfreeze()


def begin_worker(ignored: Sequence[signal.Signals]) -> None:
    """Set up a loader's worker: signals `ignored`, collector on, tokenizers on one thread.

    A terminal or a batch system signals all processes, but the trainer needs its workers until it has saved. The
    trainer turns its collector off, and forked workers inherit that.
    """
    signal.set_wakeup_fd(-1)  # else the trainer would get its workers' signals, too
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    gc.enable()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizer reads it at each batch


def set_defaults(**variables: str) -> None:
    """Set variables of the environment that are not set."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


@contextmanager
def changed_environment(**variables: str | None) -> Iterator[None]:
    """Change variables of the environment in a `with` block; None removes one."""
    before = {name: os.environ.get(name) for name in variables}
    _set(variables)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        elif os.environ.get(name) != value:
            os.environ[name] = value
