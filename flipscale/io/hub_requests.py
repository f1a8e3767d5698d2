"""Requests of huggingface_hub's, with limits that it does not set itself, and without what leads out of its cache."""

import importlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

# A request is given up when no answer comes in so long, or less than so many bytes of one. Without this, a request to a
# silent server waits for ever, and one to a server that sends a byte a minute nearly so.
SILENT_SECONDS = 60.0
_LEAST_BYTES = 20_000
# Servers say how long to wait before the next try, and may say years.
_LONGEST_WAIT = 300
_WAITS = {"retry-after": r"(\d+)", "ratelimit": r"\bt=(\d+)"}
# By these, huggingface_hub names files and folders of its cache.
_COMMIT = re.compile("[0-9a-f]{40,64}")
_TAG = re.compile(r'(W/)?"?[\w.:+=-]*"?')
# The answer to this says which commit a name stands for.
_ABOUT = re.compile(r"/api/(models|datasets)/[^/]+(/[^/]+)?(/revision/.+)?\Z")


def guard_requests() -> None:
    """Have each request of huggingface_hub's in this process end when its server is silent, or all but silent, for
    `SILENT_SECONDS`, whatever time-out its caller gives, and raise an OSError for an answer that asks for a wait of
    hours, or by which a file would be written outside of the cache."""
    from huggingface_hub import get_session, set_client_factory

    plain = get_session()
    if _hurry in plain.event_hooks["request"]:
        return
    hooks: dict[str, list[Any]] = {
        "request": [*plain.event_hooks["request"], _hurry],
        "response": [*plain.event_hooks["response"], _watch, _refuse_names],
    }
    # A client is closed and made anew after errors, and in forked processes.
    set_client_factory(lambda: type(plain)(event_hooks=hooks, follow_redirects=True, timeout=SILENT_SECONDS))


def _hurry(request: Any) -> None:
    """Give a request the time-outs that it has not; huggingface_hub asks for none in places."""
    given = request.extensions.get("timeout") or {}
    names = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {n: SILENT_SECONDS if given.get(n) is None else given[n] for n in names}


def _watch(response: Any) -> None:
    """Watch how fast the body of an answer comes.

    Raises:
        OSError: the server asks for a wait that nobody has time for, and huggingface_hub would wait.
    """
    for name, number in _WAITS.items():
        seconds = re.search(number, response.headers.get(name, ""))
        if seconds is not None and (len(seconds[1]) > 9 or int(seconds[1]) > _LONGEST_WAIT):
            raise OSError(f"{response.url.host} is busy and asks to come back in {seconds[1]:.20} s; start again then")
    response.stream = _watched(response.stream)


def _refuse_names(response: Any) -> None:
    """Raise unless commits and tags are what huggingface_hub takes them for.

    Raises:
        OSError: one is none.
    """
    commits = [response.headers.get("x-repo-commit")]
    if response.status_code == 200 and _ABOUT.search(response.url.path):
        response.read()
        with suppress(ValueError, RecursionError, AttributeError):  # no Hub's answer, of which its reader complains
            commits.append(json.loads(response.content).get("sha"))
    for commit in commits:
        if commit is not None and not (isinstance(commit, str) and _COMMIT.fullmatch(commit)):
            raise OSError(f"{response.url.host} says that a commit is {commit!r:.80}, which is none")
    for name in ("etag", "x-linked-etag"):
        tag = response.headers.get(name, "")
        if "/resolve/" in response.url.path and not _TAG.fullmatch(tag):
            raise OSError(f"{response.url.host} says that a file's tag is {tag!r:.80}, which is none")


def _watched(stream: Any) -> Any:
    """Return a stream that raises a time-out when too little of it comes."""
    from huggingface_hub.errors import HTTPError

    # The package that huggingface_hub makes its requests with has had two names.
    client = importlib.import_module(HTTPError.__module__.partition(".")[0])

    class Watched(client.SyncByteStream):  # type: ignore[misc, name-defined]
        def __iter__(self) -> Iterator[bytes]:
            parts, seconds, came = iter(stream), 0.0, 0
            while True:
                began = time.monotonic()
                part = next(parts, None)
                if part is None:
                    return
                seconds, came = seconds + time.monotonic() - began, came + len(part)
                if seconds > SILENT_SECONDS:
                    if came < _LEAST_BYTES:
                        raise client.ReadTimeout(f"{came} bytes came in {seconds:.0f} seconds")
                    seconds, came = 0.0, 0
                yield part

        def close(self) -> None:
            stream.close()

    return Watched()
