"""A Hub of models on loopback: real HTTP, real hashes, commits, branches and large-file storage, and faults on demand.

It answers what huggingface_hub asks when a folder is pushed, and when a model or a data set is loaded. Clients are
told by `HF_ENDPOINT`; `HF_HUB_DISABLE_XET=1`, because Xet is a storage service of its own.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_loopbackTokenThatNobodyMaySee"
OWNERS = ("tester", "org")  # where TOKEN may write
LARGE = (".safetensors", ".png", ".tar", ".parquet")


@dataclass(frozen=True)
class Stored:
    """A file of a commit: the hash of its content and, for a small file, git's id of it."""

    sha256: str
    size: int
    git_oid: str | None

    @property
    def oid(self) -> str:
        return self.git_oid or self.sha256


@dataclass
class Repo:
    """A repository: its commits by hash (parent, files), its branches, and who may read it."""

    private: bool
    gated: bool = False
    commits: dict[str, tuple[str | None, dict[str, Stored]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Stored]) -> str:
        parent = self.branches.get(branch)
        content = [parent, len(self.commits), sorted((p, f.oid) for p, f in files.items())]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha] = (parent, files)
        self.branches[branch] = sha
        return sha

    def files(self, revision: str) -> dict[str, Stored]:
        return self.commits[self.branches.get(revision, revision)][1]


@dataclass(frozen=True)
class Request:
    """What a client sent."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """What it gets."""

    status: int = 200
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)


def refusal(status: int, message: str, code: str = "") -> Reply:
    return Reply(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})


class LoopbackHub:
    """The server; `endpoint` is its address, `requests` all that it was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self._faults: list[tuple[str, Reply]] = []
        self._lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def add(self, repo_id: str, files: dict[str, bytes], gated: bool = False) -> str:
        """Put these files into a repository, as its newest commit; returns the commit."""
        repo = self.repos.setdefault(repo_id, Repo(private=False, gated=gated))
        return repo.commit("main", {path: self.keep(c, path.endswith(LARGE)) for path, c in files.items()})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail_next(self, count: int, path: str = "", status: int = 503, message: str = "out of order") -> None:
        """The next `count` requests whose `METHOD path` the pattern `path` is found in are answered with an error."""
        self._faults += [(path, refusal(status, message))] * count

    def asked(self, pattern: str) -> list[Request]:
        """The requests whose `METHOD path` the pattern is found in."""
        return [r for r in self.requests if re.search(pattern, f"{r.method} {r.path}")]

    def content(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision."""
        return {path: self.blobs[stored.sha256] for path, stored in self.repos[repo_id].files(revision).items()}

    def answer(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            asked = f"{request.method} {request.path}"
            for fault in self._faults:
                if re.search(fault[0], asked):
                    self._faults.remove(fault)
                    return fault[1]
            for pattern, route in _ROUTES:
                if found := re.fullmatch(pattern, asked):
                    return route(self, request, *(unquote(part or "") for part in found.groups()))
            return refusal(404, f"no route for {asked}")

    def may_write(self, request: Request, repo_id: str) -> Reply | None:
        """None, or why the request may not change the repository."""
        if "authorization" not in request.headers:
            return refusal(401, "Invalid username or password.")
        if request.headers["authorization"] != f"Bearer {TOKEN}":
            return refusal(401, "Invalid credentials in Authorization header")
        if (owner := repo_id.split("/")[0]) not in OWNERS:
            return refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        return None

    def may_read(self, request: Request, repo_id: str) -> bool:
        repo = self.repos.get(repo_id)
        return repo is not None and (not repo.private or request.headers.get("authorization") == f"Bearer {TOKEN}")

    def keep(self, content: bytes, large: bool) -> Stored:
        sha256 = hashlib.sha256(content).hexdigest()
        self.blobs[sha256] = content
        git_oid = None if large else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return Stored(sha256, len(content), git_oid)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests read `requests`."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply = self.hub.answer(Request(self.command, urlsplit(self.path).path, headers, body))
        raw = isinstance(reply.body, bytes)
        content = reply.body if raw else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        kind, length = "application/octet-stream" if raw else "application/json", str(len(content))
        headers = {"Content-Type": kind, "Content-Length": length, **reply.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with suppress(ConnectionError):  # a client may be killed
            self.wfile.write(content)
        self.close_connection = headers["Content-Length"] != length  # a body shorter than promised

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve


def create(hub: LoopbackHub, request: Request) -> Reply:
    asked = json.loads(request.body)
    repo_id = f"{asked.get('organization') or OWNERS[0]}/{asked['name']}"
    if refused := hub.may_write(request, repo_id):
        return refused
    place = {"url": f"{hub.endpoint}/{repo_id}", "name": repo_id}
    if repo_id in hub.repos:
        return Reply(409, {"error": "You already created this model repo", **place})
    hub.repos[repo_id] = Repo(asked.get("visibility") == "private")
    hub.repos[repo_id].commit("main", {})
    return Reply(body=place)


def branch(hub: LoopbackHub, request: Request, repo_id: str, name: str) -> Reply:
    if refused := hub.may_write(request, repo_id):
        return refused
    repo = hub.repos[repo_id]
    if name in repo.branches:
        return refusal(409, "Reference already exists")
    repo.branches[name] = repo.branches[json.loads(request.body or b"{}").get("startingPoint") or "main"]
    return Reply(body={})


def validate(hub: LoopbackHub, request: Request) -> Reply:
    """Checks of a card's metadata, as far as tests break it."""
    header = re.match(r"---\n(.*?)\n---", json.loads(request.body)["content"], re.DOTALL)
    is_wrong = header is not None and not isinstance(yaml.safe_load(header[1]).get("license", ""), str)
    errors = [{"message": '"license" must be a string'}] if is_wrong else []
    return Reply(400 if errors else 200, {"errors": errors, "warnings": []})


def info(hub: LoopbackHub, request: Request, repo_id: str, revision: str = "main") -> Reply:
    def describe(repo: Repo, sha: str, files: dict[str, Stored]) -> Reply:
        siblings = [
            {"rfilename": path, "size": f.size, "blobId": f.oid}
            | ({} if f.git_oid else {"lfs": {"sha256": f.sha256, "size": f.size, "pointerSize": 134}})
            for path, f in sorted(files.items())
        ]
        about = {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private}
        return Reply(body={**about, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    return _of_revision(hub, request, repo_id, revision, describe)


def _entry(path: str, f: Stored) -> dict[str, Any]:
    large = {} if f.git_oid else {"lfs": {"oid": f.sha256, "size": f.size, "pointerSize": 134}}
    return {"type": "file", "path": path, "size": f.size, "oid": f.oid, **large}


def paths_info(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Reply:
    asked = json.loads(request.body)["paths"]

    def entries(repo: Repo, sha: str, files: dict[str, Stored]) -> Reply:
        folders = [path for path in asked if any(name.startswith(f"{path}/") for name in files)]
        found = [_entry(path, files[path]) for path in asked if path in files]
        return Reply(body=found + [{"type": "directory", "path": path, "oid": sha} for path in folders])

    return _of_revision(hub, request, repo_id, revision, entries)


def tree(hub: LoopbackHub, request: Request, repo_id: str, revision: str, folder: str) -> Reply:
    def entries(repo: Repo, sha: str, files: dict[str, Stored]) -> Reply:
        inside = [_entry(p, f) for p, f in sorted(files.items()) if p.startswith(f"{folder}/" if folder else "")]
        return Reply(body=inside) if inside or not folder else refusal(404, "no such folder", "EntryNotFound")

    return _of_revision(hub, request, repo_id, revision, entries)


def preupload(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Reply:
    if refused := hub.may_write(request, repo_id):
        return refused

    def modes(repo: Repo, sha: str, files: dict[str, Stored]) -> Reply:
        found = []
        for asked in json.loads(request.body)["files"]:
            mode = "lfs" if asked["path"].endswith(LARGE) else "regular"
            oid = files[asked["path"]].oid if asked["path"] in files else None
            found.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Reply(body={"files": found})

    return _of_revision(hub, request, repo_id, revision, modes)


def batch(hub: LoopbackHub, request: Request, repo_id: str) -> Reply:
    """An object that is there already needs no action."""
    if refused := hub.may_write(request, repo_id):
        return refused
    objects = []
    for asked in json.loads(request.body)["objects"]:
        actions = {"upload": {"href": f"{hub.endpoint}/storage/{asked['oid']}", "header": {}}}
        objects.append({**asked, **({} if asked["oid"] in hub.blobs else {"actions": actions})})
    return Reply(body={"transfer": "basic", "objects": objects})


def store(hub: LoopbackHub, request: Request, oid: str) -> Reply:
    if hashlib.sha256(request.body).hexdigest() != oid:
        return refusal(400, "the content is not that of its hash")
    hub.keep(request.body, large=True)
    return Reply()


def commit(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Reply:
    if refused := hub.may_write(request, repo_id):
        return refused
    repo = hub.repos[repo_id]
    files = dict(repo.files(revision))
    for line in request.body.splitlines():
        operation = json.loads(line)
        key, value = operation["key"], operation["value"]
        if key == "file":
            files[value["path"]] = hub.keep(base64.b64decode(value["content"]), large=False)
        elif key == "lfsFile":
            files[value["path"]] = Stored(value["oid"], len(hub.blobs[value["oid"]]), None)
        elif key == "deletedFile":
            del files[value["path"]]
    sha = repo.commit(revision, files)
    return Reply(body={"success": True, "commitOid": sha, "commitUrl": f"{hub.endpoint}/{repo_id}/commit/{sha}"})


def resolve(hub: LoopbackHub, request: Request, repo_id: str, revision: str, path: str) -> Reply:
    def send(repo: Repo, sha: str, files: dict[str, Stored]) -> Reply:
        if path not in files:
            missing = refusal(404, "Entry not found", "EntryNotFound")
            return Reply(404, missing.body, {**missing.headers, "X-Repo-Commit": sha})
        stored, content = files[path], hub.blobs[files[path].sha256]
        headers = {"ETag": f'"{stored.oid}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if stored.git_oid is None:
            headers |= {"X-Linked-Size": str(stored.size), "X-Linked-Etag": f'"{stored.oid}"'}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")):
            first, last = int(part[1]), int(part[2] or stored.size - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{stored.size}"
            return Reply(206, content[first : last + 1], headers)
        return Reply(body=content, headers=headers)

    return _of_revision(hub, request, repo_id, revision, send)


def _of_revision(
    hub: LoopbackHub,
    request: Request,
    repo_id: str,
    revision: str,
    reply: Callable[[Repo, str, dict[str, Stored]], Reply],
) -> Reply:
    if not hub.may_read(request, repo_id):
        return refusal(404, "Repository not found", "RepoNotFound")
    repo = hub.repos[repo_id]
    if repo.gated:
        return refusal(403, f"Access to dataset {repo_id} is restricted.", "GatedRepo")
    sha = repo.branches.get(revision, revision)
    if sha not in repo.commits:
        return refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return reply(repo, sha, repo.commits[sha][1])


_REPO = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, Callable[..., Reply]]] = [
    (r"POST /api/repos/create", create),
    (r"POST /api/validate-yaml", validate),
    (rf"POST /api/models/{_REPO}/branch/([^/]+)", branch),
    (rf"GET /api/(?:models|datasets)/{_REPO}", info),
    (rf"GET /api/(?:models|datasets)/{_REPO}/revision/([^/]+)", info),
    (rf"GET /api/(?:models|datasets)/{_REPO}/tree/([^/]+)(?:/(.+))?", tree),
    (rf"POST /api/datasets/{_REPO}/paths-info/([^/]+)", paths_info),
    (rf"POST /api/models/{_REPO}/preupload/([^/]+)", preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", batch),
    (r"PUT /storage/([0-9a-f]{64})", store),
    (rf"POST /api/models/{_REPO}/commit/([^/]+)", commit),
    (rf"(?:GET|HEAD) (?:/datasets)?/{_REPO}/resolve/([^/]+)/(.+)", resolve),
]
