"""A server in the Hub's place, with faulty answers. Each way of answering has its own server.

A way changes the right replies to requests for the model `org/name`.
"""

import functools
import gzip
from collections.abc import Callable

from attacks import ground
from hub.loopback_hub import LoopbackHub, Reply, Request

# Returns the reply to a request by its path and the right reply.
Way = Callable[[str, Reply], Reply]


def _headers(named: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in named.items()}


def _always(status: int = 200, body: bytes = b"", **headers: str) -> Way:
    return lambda path, right: Reply(status, body, _headers(headers))


def _info(**about: object) -> Way:
    """Change fields of the model's description."""
    return lambda path, right: Reply(body=right.body | about) if "/revision/" in path else right


def _tree(*names: str) -> Way:
    """List other files."""
    files = [{"type": "file", "path": name, "size": 2, "oid": "0" * 40} for name in names]
    return lambda path, right: Reply(body=files) if "/tree/" in path else right


def _file(name: str, status: int = 200, body: bytes | None = None, **headers: str) -> Way:
    """Send something else in a file's place."""

    def way(path: str, right: Reply) -> Reply:
        if not path.endswith(f"/{name}"):
            return right
        length = {"Content-Length": str(len(right.body))}
        return Reply(status, right.body if body is None else body, {**length, **right.headers, **_headers(headers)})

    return way


WAYS: dict[str, Way] = {
    **{str(status): _always(status, b'{"error": "out of order"}') for status in (401, 403, 404, 500)},
    "busy": _always(429, b"{}", Retry_After="99999999999"),
    "limited": _always(429, b"{}", ratelimit='"api";r=0;t=86400'),
    "page": _always(body=b"<html>log in first</html>", Content_Type="text/html"),
    "circle": lambda path, right: Reply(302, headers={"Location": path}),
    "elsewhere": _always(302, Location="file:///etc/passwd"),
    "short": _always(body=b'{"id": "org', Content_Length="1000"),
    "deep": _always(body=b"[" * 100_000),
    "null": _always(body=b"null"),
    "zipped": _always(body=gzip.compress(b" " * 50_000_000), Content_Encoding="gzip"),
    "not zipped": _always(body=b"{}", Content_Encoding="gzip"),
    "colours": _always(403, b'{"error": "\\u001b[2J no"}', X_Error_Message="\x1b[31mred"),
    "no commit": _info(sha=None),
    "leads out": _info(sha="../../../../out"),
    "a tag that leads out": _file("config.json", ETag='"../../../../../out"'),
    "a commit of a file that leads out": _file("config.json", X_Repo_Commit="../../../../out"),
    "no files": _tree(),
    "names that lead out": _tree("../../config.json", "/tmp/config.json", "config.json/../../../../config.json"),
    "a name in colours": _tree("\x1b[2J.json", "config.json\n"),
    "cut": _file("model.safetensors", body=b"x" * 1000),
    "a page for a file": _file("config.json", body=b"<html>log in first</html>", Content_Length="25"),
    "a file for nobody": _file("config.json", 403),
}


@functools.cache
def endpoint(way: str) -> str:
    """Return the address of a server that answers in this way."""
    return _BadHub(WAYS[way]).endpoint


class _BadHub(LoopbackHub):
    def __init__(self, way: Way) -> None:
        super().__init__()
        self.way = way

    def answer(self, request: Request) -> Reply:
        with self._lock:
            if not self.repos:  # only now, because it trains a model
                files = [file for file in ground.trained_model().iterdir() if file.is_file()]
                self.add("org/name", {file.name: file.read_bytes() for file in files})
        return self.way(request.path, super().answer(request))
