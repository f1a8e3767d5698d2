"""Upload a model folder to the Hub. The repository is created if needed, and transient errors are retried.

`HfApi.upload_folder` resumes an interrupted upload when it is called again: by chunks with hf_xet, which
huggingface_hub installs, otherwise by whole files. Files that the Hub has are not sent again, so weights are sharded.
`upload_large_folder`, which kept a list of its own, is gone from huggingface_hub 2. The token is the one that
huggingface_hub finds (HF_TOKEN, a stored login). It is read here only to keep it out of messages.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects, validate_repo_id

_log = logging.getLogger(__name__)

# Seconds before each retry. huggingface_hub also retries single requests by itself.
WAITS = (1, 2, 4, 8, 16, 32, 64)
# Files of an earlier push that are deleted if the folder no longer has them: weights in another number of shards.
_REPLACED = ["*.safetensors", "*.safetensors.index*.json"]
_IGNORED = ["*.partial"]
_TEMPORARY = (408, 409, 412, 429)  # the transient 4xx: timeouts, a concurrent commit, rate limits


@dataclass(frozen=True)
class Target:
    """Where a model is uploaded to.

    Args:
        repo_id: ORG/NAME, or NAME for the account of the token.
        private: the visibility of a repository that is created; None takes the organisation's default.
        revision: the branch, created if it does not exist; None is main.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise ValueError(f"{self.repo_id!r} is not a valid model name on the Hub; use ORG/NAME ({error})") from None

    def __str__(self) -> str:
        return self.repo_id + (f" (revision {self.revision})" if self.revision else "")


@dataclass(frozen=True)
class Pushed:
    """A finished upload: the URL of the model, its commit, and whether that changed anything."""

    url: str
    commit: str
    changed: bool


def open_repo(target: Target) -> str:
    """Create the target's repository and revision if they do not exist, and return the repository's full name.

    Raises:
        ValueError: there is no token, it is invalid or may not write there, or the organisation is unknown.
        OSError: the Hub cannot be reached.
    """
    if get_token() is None:
        raise ValueError(
            f"no token to push to {target} with; log in with `hf auth login`, or set HF_TOKEN to a token that may write"
        )
    api = HfApi()
    try:
        repo_id = api.create_repo(target.repo_id, private=target.private, exist_ok=True).repo_id
        if target.revision:
            api.create_branch(repo_id, branch=target.revision, exist_ok=True)
    except (OSError, RuntimeError, HTTPError) as error:
        raise _explained(error, target) from None
    return repo_id


def push_folder(folder: Path, target: Target, message: str, waits: Sequence[float] = WAITS) -> Pushed:
    """Upload the files of `folder` in one commit, with a retry for each of `waits`.

    Files that only the repository has are kept, except shards of weights.

    Raises:
        ValueError: as `open_repo`, or the Hub refuses the card.
        OSError: the Hub cannot be reached or failed every time.
    """
    for wait in (*waits, None):
        try:
            return _push(folder, target, message)
        except OSError as error:
            if wait is None:
                raise
            _log.warning("%s; trying again in %g s", error, wait)
            time.sleep(wait)
    raise AssertionError("the last try either returns or raises")


def _push(folder: Path, target: Target, message: str) -> Pushed:
    repo_id = open_repo(target)
    api = HfApi()
    try:
        before = api.model_info(repo_id, revision=target.revision).sha
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=target.revision,
            commit_message=message,
            ignore_patterns=list(_IGNORED),
            delete_patterns=_REPLACED,
        )
    except (OSError, RuntimeError, HTTPError) as error:
        raise _explained(error, target) from None
    url = f"{api.endpoint}/{repo_id}" + (f"/tree/{target.revision}" if target.revision else "")
    return Pushed(url, commit.oid, commit.oid != before)


def files_to_push(folder: Path) -> list[tuple[str, int]]:
    """Return the names and sizes in bytes of the files that `push_folder` would upload."""
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    kept = filter_repo_objects(names, ignore_patterns=[*_IGNORED, *DEFAULT_IGNORE_PATTERNS])
    return [(name, (folder / name).stat().st_size) for name in kept]


def _explained(error: Exception, target: Target) -> Exception:
    """Return a ValueError for an error that retrying cannot fix, an OSError for a transient one, without the token."""
    cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    said = _without_token(" ".join((getattr(cause, "server_message", None) or str(cause or error)).split()))
    if isinstance(error, OfflineModeIsEnabled):
        return ValueError(f"cannot push to {target}: HF_HUB_OFFLINE is set; unset it")
    if status == 401:
        return ValueError(f"the Hub rejects the token for {target} ({said}); log in with `hf auth login`")
    if status in (403, 404):
        return ValueError(
            f"the token may not write to {target} ({said}); use an organisation that you are a member of, and a token "
            "with write access"
        )
    if status is not None and 400 <= status < 500 and status not in _TEMPORARY:
        return ValueError(f"the Hub refuses the push to {target} ({said})")
    return OSError(f"the push to {target} failed ({said or type(error).__name__})")


def _without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "<token>") if token else text
