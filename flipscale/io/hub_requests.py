"""Limits on huggingface_hub's requests, set by its own hook `set_client_factory`."""

import json
import re
from contextlib import suppress
from typing import Any

# huggingface_hub waits for ever in places, such as for the facts about a model.
TIMEOUT_SECONDS = 20.0
# huggingface_hub waits as long as a busy server asks for, which may be years.
_LONGEST_WAIT_SECONDS = 300
_WAIT_HEADERS = {"retry-after": r"(\d+)", "ratelimit": r"\bt=(\d+)"}
# huggingface_hub uses commits and tags as names of folders and files in its cache.
_COMMIT = re.compile("[0-9a-f]{40,64}")
_TAG = re.compile(r'(W/)?"?[\w.:+=-]*"?')
# Address of the request for a model's facts, which name the commit.
_FACTS = re.compile(r"/api/(models|datasets)/[^/]+(/[^/]+)?(/revision/.+)?\Z")
# What huggingface_hub raises when another server, such as a proxy, answers in the Hub's place.
NO_HUB = (ValueError, TypeError, AttributeError, LookupError, AssertionError, RecursionError)


def http_failure(error: Exception) -> tuple[int | None, str]:
    """Return the HTTP status (None without a response) and the message of an error that huggingface_hub raised."""
    from huggingface_hub.errors import HfHubHTTPError

    cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    words = getattr(cause, "server_message", None) or str(cause or error).split("\n\n")[-1]
    return status, " ".join(words.split()) or type(error).__name__


def guard_requests() -> None:
    """Limit all requests of huggingface_hub in this process.

    A silent server ends a request after `TIMEOUT_SECONDS`. A response raises an OSError if it asks for a wait of hours,
    or if its commit or tag would lead out of the cache.
    """
    from huggingface_hub import get_session, set_client_factory

    plain = get_session()
    if _limit_time in plain.event_hooks["request"]:
        return
    hooks: dict[str, list[Any]] = {
        "request": [*plain.event_hooks["request"], _limit_time],
        "response": [*plain.event_hooks["response"], _check_wait, _check_names],
    }
    # huggingface_hub makes a new client after errors and in forked processes.
    set_client_factory(lambda: type(plain)(event_hooks=hooks, follow_redirects=True, timeout=TIMEOUT_SECONDS))


def _limit_time(request: Any) -> None:
    given = request.extensions.get("timeout") or {}
    kinds = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {k: TIMEOUT_SECONDS if given.get(k) is None else given[k] for k in kinds}


def _check_wait(response: Any) -> None:
    for name, pattern in _WAIT_HEADERS.items():
        wait = re.search(pattern, response.headers.get(name, ""))
        if wait is not None and (len(wait[1]) > 9 or int(wait[1]) > _LONGEST_WAIT_SECONDS):
            raise OSError(f"{response.url.host} is busy and asks to come back in {wait[1]:.20} s; start again then")


def _check_names(response: Any) -> None:
    commits = [response.headers.get("x-repo-commit")]
    if response.status_code == 200 and _FACTS.search(response.url.path):
        response.read()
        with suppress(ValueError, RecursionError, AttributeError):  # huggingface_hub refuses such responses itself
            commits.append(json.loads(response.content).get("sha"))
    for commit in commits:
        if commit is not None and not (isinstance(commit, str) and _COMMIT.fullmatch(commit)):
            raise OSError(f"{response.url.host} sends the commit {commit!r:.80}; expected a hash")
    if "/resolve/" in response.url.path:
        for name in ("etag", "x-linked-etag"):
            tag = response.headers.get(name, "")
            if not _TAG.fullmatch(tag):
                raise OSError(f"{response.url.host} sends the file tag {tag!r:.80}; expected a name")
