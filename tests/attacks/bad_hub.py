"""A server in the Hub's place with wrong answers: `endpoint(WAY)` is the value of HF_ENDPOINT.

A way without an answer to a request leaves it to the right answer, for the model `org/name`.
"""

import functools
import gzip
import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from attacks import ground
from attacks.attack import later

_COMMIT = "c" * 40


@dataclass(frozen=True)
class Answer:
    """An answer. The connection closes after a `body` shorter than the headers promise."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


Way = Callable[[str], Answer | None]


def _always(status: int = 200, body: bytes = b"", **headers: str) -> Way:
    return lambda path: Answer(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


def _info(**about: object) -> Way:
    """Change fields of the model's description."""
    return lambda path: _json(_about() | about) if "/revision/" in path else None


def _tree(*names: str) -> Way:
    """List other files."""
    files = [{"type": "file", "path": name, "size": 2, "oid": "0" * 40} for name in names]
    return lambda path: _json(files) if "/tree/" in path else None


@later
def _file(path: str, name: str, status: int = 200, body: bytes | None = None, **headers: str) -> Answer | None:
    """Send something else in a file's place."""
    if not path.endswith(f"/{name}"):
        return None
    whole = _resolved(path)
    changed = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, whole.body if body is None else body, {**whole.headers, **changed})


WAYS: dict[str, Way] = {
    **{str(status): _always(status, b'{"error": "out of order"}') for status in (401, 403, 404, 500)},
    "busy": _always(429, b"{}", Retry_After="99999999999"),
    "limited": _always(429, b"{}", ratelimit='"api";r=0;t=86400'),
    "page": _always(body=b"<html>log in first</html>", Content_Type="text/html"),
    "circle": lambda path: Answer(302, headers={"Location": path}),
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


def endpoint(way: str) -> str:
    """Return the address of a server that answers in this way."""
    return f"http://127.0.0.1:{_server().server_port}/{list(WAYS).index(way)}"


@functools.cache
def _server() -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def _serve(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        way = list(WAYS.values())[int(self.path.split("/")[1])]
        answer = way(self.path) or (_resolved(self.path) if "/resolve/" in self.path else _answered(self.path))
        headers = {"Content-Length": str(len(answer.body)), "Content-Type": "application/json", **answer.headers}
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):
                self.wfile.write(answer.body)
            self.close_connection = headers["Content-Length"] != str(len(answer.body))

    do_GET = do_HEAD = do_POST = do_PUT = _serve


def _json(content: object) -> Answer:
    return Answer(body=json.dumps(content).encode())


def _about() -> dict[str, object]:
    files = [{"rfilename": path.name} for path in ground.trained_model().iterdir()]
    return {"_id": "0", "id": "org/name", "sha": _COMMIT, "private": False, "tags": [], "siblings": files}


def _answered(path: str) -> Answer:
    if "/tree/" in path:
        files = [path for path in ground.trained_model().iterdir() if path.is_file()]
        return _json([{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _tag(f)} for f in files])
    return _json(_about()) if "/api/models/" in path else Answer(404, b"{}")


def _tag(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _resolved(path: str) -> Answer:
    file = ground.trained_model() / path.rsplit("/", 1)[1]
    if not file.is_file():
        return Answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _COMMIT})
    about = {"ETag": f'"{_tag(file)}"', "X-Repo-Commit": _COMMIT, "Content-Length": str(file.stat().st_size)}
    return Answer(body=file.read_bytes(), headers=about)
