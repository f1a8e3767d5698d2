"""Limits on requests to a server in the Hub's place. `tests/attacks/test_hub.py` has long waits and bad names."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from huggingface_hub import close_session, get_session
from huggingface_hub.errors import HTTPError

from flipscale.io import hub_requests

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n"
BUSY = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n"


@pytest.fixture
def address() -> Iterator[Callable[..., str]]:
    """Starts a server that sends some parts and keeps the connection open."""
    close_session()
    hub_requests.guard_requests()
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


@pytest.mark.parametrize("parts", [(), (HEAD + b"\r\n", b"x")], ids=["before", "within"])
def test_silence_ends_a_request(
    address: Callable[..., str], parts: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_requests, "TIMEOUT_SECONDS", 0.2)
    close_session()  # as after an error, when huggingface_hub makes a new client
    with pytest.raises(HTTPError):
        get_session().get(address(*parts), timeout=None)


def test_a_wait_of_minutes_is_allowed(address: Callable[..., str]) -> None:
    assert get_session().get(address(BUSY + b'RateLimit: "api";r=0;t=200\r\n\r\n')).status_code == 503
