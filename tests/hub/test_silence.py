"""A server in the Hub's place that says nothing, next to nothing, or to come back in a year."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from huggingface_hub import close_session, get_session
from huggingface_hub.errors import HTTPError

from flipscale.io import hub_requests
from flipscale.io.hub_requests import guard_requests

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n"
FILE = "/org/name/resolve/main/a"
BUSY = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n"


@pytest.fixture
def address() -> Iterator[Callable[..., str]]:
    """Starts a server that sends this to whoever comes, each part a while after the other, and keeps the connection."""
    close_session()
    guard_requests()
    listening, kept = socket.create_server(("127.0.0.1", 0)), []

    def serve(parts: list[bytes]) -> None:
        connection, _ = listening.accept()
        kept.append(connection)
        connection.recv(10_000)
        with suppress(OSError):  # the client has gone
            for part in parts:
                connection.sendall(part)
                time.sleep(0.05)

    def start(*parts: bytes) -> str:
        threading.Thread(target=serve, args=(list(parts),), daemon=True).start()
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    yield start
    for connection in kept:
        connection.close()
    listening.close()
    close_session()  # its time-out is this test's


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_requests, "SILENT_SECONDS", 0.2)


@pytest.mark.usefixtures("impatient")
def test_a_silent_server_is_not_waited_for(address: Callable[..., str]) -> None:
    # Without a time-out is how huggingface_hub asks for what it knows of a model.
    with pytest.raises(HTTPError):
        get_session().get(address(), timeout=None)


@pytest.mark.usefixtures("impatient")
def test_nor_one_that_stops_in_the_middle(address: Callable[..., str]) -> None:
    with pytest.raises(HTTPError):
        get_session().get(address(HEAD + b"\r\n", b"x"), timeout=None)


def test_nor_one_that_sends_a_byte_now_and_then(address: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    # So long that between two bytes no server is silent, however busy the machine.
    monkeypatch.setattr(hub_requests, "SILENT_SECONDS", 3.0)
    with pytest.raises(HTTPError, match=r"\d+ bytes came in \d seconds"):
        get_session().get(address(HEAD + b"\r\n", *[b"x"] * 80), timeout=None)


@pytest.mark.usefixtures("impatient")
def test_the_limit_holds_for_the_client_that_follows_an_error(address: Callable[..., str]) -> None:
    close_session()
    with pytest.raises(HTTPError):
        get_session().get(address(), timeout=None)


@pytest.mark.parametrize("header", [b"Retry-After: 30", b'RateLimit: "api";r=0;t=200'])
def test_a_wait_of_minutes_is_huggingface_hubs(address: Callable[..., str], header: bytes) -> None:
    assert get_session().get(address(BUSY + header + b"\r\n\r\n")).status_code == 503


@pytest.mark.parametrize(
    "header", [b"Retry-After: 86400", b"Retry-After: " + b"9" * 50, b'RateLimit: "api";r=0;t=7200']
)
def test_a_wait_of_hours_is_an_error(address: Callable[..., str], header: bytes) -> None:
    with pytest.raises(OSError, match=r"127.0.0.1 is busy and asks to come back in \d{4,20} s; start again then"):
        get_session().get(address(BUSY + header + b"\r\n\r\n"))


@pytest.mark.parametrize(
    ("path", "header"),
    [
        (FILE, b'ETag: "../../a"'),
        (FILE, b"X-Repo-Commit: ../a"),
        ("/api/models/org/name/revision/main", b"A: b"),
    ],
)
def test_what_leads_out_of_the_cache_is_an_error(address: Callable[..., str], path: str, header: bytes) -> None:
    body = b'{"sha": "../../a"}'
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%b\r\n\r\n%b" % (len(body), header, body)
    with pytest.raises(OSError, match=r"127.0.0.1 says that a (commit|file's tag) is '.*a'?.*, which is none"):
        get_session().get(address(answer) + path)
