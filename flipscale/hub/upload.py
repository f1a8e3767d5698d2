"""A model folder onto the Hub: the repository made if need be, what is there already not sent again, faults outwaited.

`HfApi.upload_folder` does the sending. It is what resumes: an upload that was cut off goes on when it is called again,
by chunks with hf_xet (which huggingface_hub brings along), by whole files without it (an object that the storage has is
not sent twice, hence weights in shards). `upload_large_folder`, which kept a list of its own, is gone from
huggingface_hub 2. The token is what huggingface_hub finds (HF_TOKEN, a stored login); it is never read here but to keep
it out of messages.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects, validate_repo_id

# Seconds before each new try, besides huggingface_hub's own for single requests.
WAITS = (1, 2, 4, 8, 16, 32, 64)
# Files of an earlier push that are removed if the folder no longer has them: weights in another number of shards.
_REPLACED = ["*.safetensors", "*.safetensors.index*.json"]
_IGNORED = ["*.partial"]
_TEMPORARY = (408, 409, 412, 429)  # of the 4xx, those that pass: timeouts, somebody else's commit, rate limits


@dataclass(frozen=True)
class Target:
    """Where a model goes.

    Args:
        repo_id: ORG/NAME, or NAME under the account that the token belongs to.
        private: of a repository that is made; None takes the organisation's default.
        revision: the branch, made if it does not exist; None is main.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise ValueError(f"{self.repo_id!r} is no name of a model on the Hub; use ORG/NAME ({error})") from None

    def __str__(self) -> str:
        return self.repo_id + (f" (revision {self.revision})" if self.revision else "")


@dataclass(frozen=True)
class Pushed:
    """A push that is done: the page of the model, its commit, and whether anything was new."""

    url: str
    commit: str
    changed: bool


def open_repo(target: Target) -> str:
    """The full name of the target's repository, which exists when this returns, as does its revision.

    Raises:
        ValueError: no token, a token that is not valid or may not write there, an unknown organisation.
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
    """The commit that holds the files of `folder`, after as many tries as `waits` allow.

    Files of the repository that the folder does not have stay, but for weights in shards that it no longer has.

    Raises:
        ValueError: what `open_repo` raises, or a card that the Hub finds invalid.
        OSError: the Hub cannot be reached, or failed every time.
    """
    for wait in (*waits, None):
        try:
            return _push(folder, target, message)
        except OSError as error:
            if wait is None:
                raise
            print(f"{error}; trying again in {wait:g} s", file=sys.stderr, flush=True)
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
    """What `push_folder` looks at: names within the folder and sizes in bytes."""
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    kept = filter_repo_objects(names, ignore_patterns=[*_IGNORED, *DEFAULT_IGNORE_PATTERNS])
    return [(name, (folder / name).stat().st_size) for name in kept]


def _explained(error: Exception, target: Target) -> Exception:
    """The ValueError of a mistake that no waiting mends, the OSError of a fault that may pass; without the token."""
    cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    said = _without_token(" ".join((getattr(cause, "server_message", None) or str(cause or error)).split()))
    if isinstance(error, OfflineModeIsEnabled):
        return ValueError(f"cannot push to {target}: HF_HUB_OFFLINE is set; unset it")
    if status == 401:
        return ValueError(f"the Hub does not take the token to push to {target} ({said}); log in with `hf auth login`")
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
