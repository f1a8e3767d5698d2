"""Requests for files at URLs. Each has a limit of time and of size, is tried again, and ends in one sentence."""

import asyncio
import errno
import logging
import time
from collections.abc import Awaitable, Callable
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar

from flipscale.io.errors import UserError
from flipscale.io.hub_requests import guard_requests

# A server is given up for a while when it sends less than so many bytes in so many seconds.
_SILENT_SECONDS = 20.0
_LEAST_BYTES = 20_000
# Long lists come in pages.
_LISTING_SECONDS = 200.0
# No other try is begun later than this after the first.
_PATIENCE_SECONDS = 90.0
_TRIES = 6
_FIRST_DELAY_SECONDS = 0.5  # doubled for each try; before the last one it is 8 seconds
_ENDING_SECONDS = 5.0
# Of the user's errors, those that may be gone the next time: time-out, too early, too many requests.
_MAY_PASS = (408, 425, 429)

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


def file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the name in it.

    Raises:
        ValueError: the protocol is unknown, or its package is not installed.
    """
    import fsspec

    if url.startswith("hf:"):
        guard_requests()
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url!r} cannot be read: {error}") from error
    return system, path


def information(url: str) -> dict[str, Any]:
    """Return what the server says of a file: its `size`, None if it does not say, and its checksum or time.

    Raises:
        FileNotFoundError, PermissionError: there is none, or it may not be read.
        OSError: the server does not answer.
    """
    return patiently(url, lambda: information_at_once(url))


def information_at_once(url: str) -> dict[str, Any]:
    """Do as `information`, in one try.

    Raises:
        Exception: of any kind that its protocol has for a broken connection.
    """
    system, remote = file_system(url)
    found: dict[str, Any] = _within(system, "info", lambda: 0, _SILENT_SECONDS, remote)
    return found


def listed(url: str) -> list[str]:
    """Return the URLs that a pattern stands for, sorted.

    Raises:
        OSError: the server does not answer.
    """

    def ask() -> list[str]:
        system, remote = file_system(url)
        found = _within(system, "glob", lambda: 0, _LISTING_SECONDS, remote)
        return sorted(system.unstrip_protocol(name) for name in found)

    return patiently(url, ask)


def fetch(url: str, path: Path, size: int | None, most_bytes: int) -> None:
    """Write a file to `path`, in one try.

    Args:
        size: it must have; None if it is not known.
        most_bytes: it may have; no more are written.

    Raises:
        Exception: of any kind that its protocol has for a broken connection; OSError if another number of bytes came,
            or too few in their time.
    """
    import fsspec

    class Counted(fsspec.callbacks.Callback):
        """Ends the transfer when more comes than may."""

        bytes = 0

        def relative_update(self, inc: int = 1) -> None:
            self.bytes += inc
            if self.bytes > most_bytes:
                raise OSError(f"more than {most_bytes} bytes came")

    system, remote = file_system(url)
    counted = Counted()
    _within(system, "get_file", lambda: counted.bytes, _SILENT_SECONDS, remote, str(path), callback=counted)
    got = path.stat().st_size
    if size is not None and got != size:
        raise OSError(f"{got} of {size} bytes came")


def patiently(url: str, ask: Callable[[], Result]) -> Result:
    """Return what `ask` returns, called again while it raises what may pass. Says so each time.

    Raises:
        FileNotFoundError, PermissionError, ValueError: as `ask`.
        OSError: it has not passed, or there is no room on this machine's disk.
    """
    started = time.monotonic()
    for number in range(1, _TRIES + 1):
        try:
            return ask()
        except Exception as error:
            # A page of a proxy in the place of an answer may be gone the next time.
            if isinstance(error, PermissionError | ValueError) and not isinstance(error, JSONDecodeError):
                raise
            # Every protocol raises exceptions of its own for a broken connection.
            if isinstance(error, FileNotFoundError) and not _may_pass(error.__cause__):
                raise
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise OSError(
                    f"{url} cannot be kept ({error.strerror}); make room, or name another folder in data.cache_dir"
                ) from error
            said = error.__cause__ if isinstance(error, FileNotFoundError) else error
            reason = " ".join(str(said).split()) or type(said).__name__
            if number == _TRIES or time.monotonic() - started > _PATIENCE_SECONDS:
                raise OSError(
                    f"{url} could not be fetched in {number} tries ({reason}); start the run again when it can"
                ) from error
            _log.warning("%s could not be fetched (%s); trying again", url, reason)
            time.sleep(_FIRST_DELAY_SECONDS * 2 ** (number - 1))
    raise AssertionError("the last try returns or raises")


def _may_pass(cause: BaseException | None) -> bool:
    """Return whether it is for a broken connection that a file was not found: fsspec says so of HTTP in any case."""
    if cause is None or not (isinstance(cause, OSError) or type(cause).__module__.startswith(("aiohttp", "asyncio"))):
        return False
    # aiohttp's errors have it themselves, the Hub's in their response.
    status = getattr(cause, "status", None) or getattr(getattr(cause, "response", None), "status_code", None)
    return status is None or not 400 <= status < 500 or status in _MAY_PASS


def _within(system: Any, name: str, progress: Callable[[], int], seconds: float, *arguments: Any, **named: Any) -> Any:
    """Return what a method of a file system returns, if `progress` goes on by `_LEAST_BYTES` every so many seconds.

    Only methods that run in fsspec's loop are watched; those of the Hub's file system have time-outs of their own
    (`guard_requests`).
    """
    from fsspec.asyn import sync

    if not getattr(system, "async_impl", False):
        return getattr(system, name)(*arguments, **named)
    method: Callable[..., Awaitable[Any]] = getattr(system, f"_{name}")

    async def watched() -> Any:
        task = asyncio.ensure_future(method(*arguments, **named))
        before = 0
        while not (await asyncio.wait({task}, timeout=seconds))[0]:
            now = progress()
            if now - before < _LEAST_BYTES:
                task.cancel()
                await asyncio.wait({task}, timeout=_ENDING_SECONDS)
                raise OSError(f"{now - before} bytes came in {seconds:g} seconds")
            before = now
        return task.result()

    return sync(system.loop, watched)
