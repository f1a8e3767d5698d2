"""The files of a data set on the Hub: their sizes and digests before a download, and each whole or not there after."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from flipscale.io.atomic import partial_path, sync
from flipscale.io.errors import UserError
from flipscale.io.hub_requests import guard_requests

_CHUNK_BYTES = 1 << 20
# In a row that bring nothing, before a download is given up.
_TRIES = 3
_SECONDS = 30.0  # for an answer


class WrongFile(OSError):
    """What arrives is not the file that the Hub lists; others may be."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Args:
        name: its path in the repository.
        digest: `sha256:HEX` of a large file, `git:HEX` (git's id of the content) of a small one.
        path: where it goes in the folder that is prepared.
    """

    name: str
    size: int
    digest: str
    path: str


@dataclass(frozen=True)
class Snapshot:
    """A repository of data sets at one commit."""

    repo: str
    commit: str
    files: tuple[HubFile, ...]


def list_files(repo: str, revision: str) -> Snapshot:
    """Return what the Hub, or the mirror that `HF_ENDPOINT` names, has of a repository at a branch or commit.

    Raises:
        ValueError: there is no such repository or revision, or it may not be read.
        OSError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    guard_requests()
    try:
        info = HfApi().dataset_info(repo, revision=revision, files_metadata=True, timeout=_SECONDS)
        files = []
        for file in info.siblings or []:
            has = f"sha256:{file.lfs.sha256}" if file.lfs else f"git:{file.blob_id}"
            files.append(HubFile(file.rfilename, max(int(file.size or 0), 0), has, file.rfilename))
    except Exception as error:
        # What is no Hub's answer, such as a page of a proxy, makes huggingface_hub raise anything.
        raise _explained(error, repo, revision) from None
    if not info.sha:
        raise _explained(UserError("it does not say which commit it has"), repo, revision)
    return Snapshot(repo, info.sha, tuple(files))


def is_whole(path: Path, file: HubFile) -> bool:
    """Return whether a file of this machine has the size and the content that the Hub states."""
    return path.is_file() and path.stat().st_size == file.size and digest(path, file.digest) == file.digest


def bytes_there(path: Path, file: HubFile) -> int:
    """Return how much of a file is on this machine, its content not compared."""
    for place in (path, partial_path(path)):
        if place.is_file() and place.stat().st_size <= file.size:
            return place.stat().st_size
    return 0


def digest(path: Path, like: str = "sha256:") -> str:
    """Return the digest of a file, of the form of `like`."""
    kind = like.partition(":")[0]
    content = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            content.update(chunk)
    return f"{kind}:{content.hexdigest()}"


def download(snapshot: Snapshot, files: Sequence[HubFile], folder: Path, bar: tqdm) -> None:
    """Download the files to their paths in `folder`, but for those that are whole. What a kill left of a file is gone
    on with (huggingface_hub's own downloads begin such a file anew).

    Args:
        bar: counts the bytes of all files.

    Raises:
        ValueError: the repository may not be read.
        WrongFile: a file is not what the Hub says.
        OSError: the Hub cannot be reached, or the disk is full.
    """
    from huggingface_hub.errors import HTTPError

    before = bar.n
    for file in files:
        path = folder / file.path
        if not is_whole(path, file):
            bar.set_postfix_str(f"{snapshot.repo} {file.name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = partial_path(path)
            try:
                _fetch(snapshot, file, partial, bar)
            except WrongFile:
                partial.unlink(missing_ok=True)
                raise
            except (OSError, RuntimeError, HTTPError) as error:
                raise _explained(error, snapshot.repo, snapshot.commit) from None
            if not is_whole(partial, file):
                partial.unlink()
                raise WrongFile(
                    f"{file.name} of {snapshot.repo} did not arrive as the Hub states it ({file.size:,} bytes, "
                    f"{file.digest}); start the same command again"
                )
            sync(partial)
            os.replace(partial, path)
        before += file.size
        bar.n = before
        bar.refresh()


def _fetch(snapshot: Snapshot, file: HubFile, partial: Path, bar: tqdm) -> None:
    """Write what is missing of a file to `partial`. A broken connection is opened again, until `_TRIES` in a row bring
    nothing."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    start, tries = bar.n, _TRIES
    if partial.exists() and partial.stat().st_size > file.size:
        partial.unlink()
    while True:
        there = partial.stat().st_size if partial.exists() else 0
        bar.n = start + there
        try:
            return _go_on(snapshot, file, partial, there, bar)
        except HfHubHTTPError:
            raise
        except HTTPError:
            tries = _TRIES if partial.exists() and partial.stat().st_size > there else tries - 1
            if not tries:
                raise


def _go_on(snapshot: Snapshot, file: HubFile, partial: Path, there: int, bar: tqdm) -> None:
    """Append a file's bytes from `there` on to `partial`."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(snapshot.repo, file.name, repo_type="dataset", revision=snapshot.commit)
    # Compressed, the bytes of an answer could not be counted.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if there > 0:
        headers["Range"] = f"bytes={there}-"
    if there == file.size > 0:
        return
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with http_stream_backoff("GET", url, headers=headers, timeout=timeout, max_retries=_TRIES) as response:
        hf_raise_for_status(response)
        # A server that does not know ranges sends the whole file.
        with open(partial, "ab" if response.status_code == 206 else "wb", buffering=0) as stream:
            if response.status_code != 206:
                bar.update(-there)
            for chunk in response.iter_raw(_CHUNK_BYTES):
                if stream.tell() + len(chunk) > file.size:
                    raise WrongFile(
                        f"{file.name} of {snapshot.repo} goes on after the {file.size:,} bytes that the Hub states; "
                        "start the same command again"
                    )
                stream.write(chunk)
                bar.update(len(chunk))


def _explained(error: Exception, repo: str, revision: str) -> Exception:
    """Return what to tell of a failed request: a UserError if the user can mend it, else an OSError."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cause = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
    where = f"data set {repo} at {constants.ENDPOINT}"
    if isinstance(cause, OfflineModeIsEnabled):
        return UserError(f"cannot read {where}: HF_HUB_OFFLINE is set; unset it")
    if isinstance(cause, GatedRepoError):
        return UserError(f"{where} is gated; accept its terms on its page, then log in with `hf auth login`")
    if isinstance(cause, RevisionNotFoundError):
        return UserError(f"{where} has no revision {revision}")
    if isinstance(cause, RepositoryNotFoundError):
        return UserError(f"{where} does not exist, or may be read only by others; a mirror may lack it")
    if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, ConnectionError):
        return cause
    said = " ".join(str(getattr(cause, "server_message", None) or cause).split())
    return OSError(f"{where} cannot be read ({said}); the same command goes on later, or name a mirror in HF_ENDPOINT")
