"""Upload a model folder to the Hub. The repository is created if needed, and transient errors are retried.

`HfApi.upload_folder` resumes an interrupted upload when it is called again: by chunks with hf_xet, which
huggingface_hub installs, otherwise by whole files. Files that the Hub has are not sent again, so weights are sharded.
`upload_large_folder`, which kept a list of its own, is gone from huggingface_hub 2. The token is the one that
huggingface_hub finds (HF_TOKEN, a stored login). It is read here only to keep it out of messages.
"""

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

from flipscale.io.digests import check_weight
from flipscale.io.errors import UserError
from flipscale.model.folder import check_folder
from flipscale.model.hub_requests import guard_requests

_log = logging.getLogger(__name__)

# Seconds before each retry. huggingface_hub also retries single requests by itself.
WAITS = (1, 2, 4, 8, 16, 32, 64)
# What flipscale writes into a model folder: the model with its code and tokenizer, its ONNX form, its card and results.
# Nothing else is uploaded, whatever lies there.
_WRITTEN = re.compile(
    r"""(?x) (?: open_clip_)? (?: config|generation_config|config_sentence_transformers|sentence_bert_config|modules
        |processor_config|preprocessor_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab) \.json
    | (?: open_clip_)? model [\w.-]* \.safetensors (?: \.index [\w.]* \.json)?
    | (?: image|text) _model\.onnx (?: \.data)?
    | vocab\.txt | merges\.txt | \w[\w.-]*\.model | chat_template\.jinja
    | (?: configuration_flip|configuration_parts|modeling_flip|modeling_flip_caption|modeling_flip_decoder
        |modeling_flip_vqa|processing_flip|masking|folder|patches) \.py
    | README\.md | results\.(?: md|jsonl|png) | figures/[\w.-]+\.png"""
)
_FIGURES = "figures"
_NAMED = 6
# Files of an earlier push that are deleted if the folder no longer has them: weights in another number of shards.
_REPLACED = ["*.safetensors", "*.safetensors.index*.json"]
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
            raise UserError(f"{self.repo_id!r} is not a valid model name on the Hub; use ORG/NAME ({error})") from None

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
        raise UserError(
            f"no token to push to {target} with; log in with `hf auth login`, or set HF_TOKEN to a token that may write"
        )
    guard_requests()
    api = HfApi()
    try:
        repo_id = api.create_repo(target.repo_id, private=target.private, exist_ok=True).repo_id
        if target.revision:
            api.create_branch(repo_id, branch=target.revision, exist_ok=True)
    except Exception as error:  # what is no Hub's answer makes huggingface_hub raise any
        raise _explained(error, target) from None
    return repo_id


def push_folder(folder: Path, target: Target, message: str, waits: Sequence[float] = WAITS) -> Pushed:
    """Upload what flipscale wrote into `folder` in one commit, with a retry for each of `waits`.

    Files that only the repository has are kept, except shards of weights. What else lies in the folder stays there, and
    is named in one line.

    Raises:
        ValueError: as `open_repo`, the folder is no whole model, or the Hub refuses the card.
        OSError: the Hub cannot be reached or failed every time.
    """
    check_to_push(folder)
    if others := left_out(folder):
        _log.warning("%s: %s", folder, others)
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
    api, names = HfApi(), [name for name, _ in files_to_push(folder)]
    try:
        before = api.model_info(repo_id, revision=target.revision).sha
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=target.revision,
            commit_message=message,
            allow_patterns=names,
            delete_patterns=_REPLACED,
        )
    except Exception as error:  # what is no Hub's answer makes huggingface_hub raise any
        raise _explained(error, target) from None
    url = f"{api.endpoint}/{repo_id}" + (f"/tree/{target.revision}" if target.revision else "")
    return Pushed(url, commit.oid, commit.oid != before)


def files_to_push(folder: Path) -> list[tuple[str, int]]:
    """Return the names and sizes in bytes of the files that `push_folder` would upload: those that flipscale writes.

    Raises:
        ValueError: one of them leads out of the folder, or is no file.
    """
    home, found = folder.resolve(), []
    for path in sorted([*folder.iterdir(), *folder.glob(f"{_FIGURES}/*")]):
        name = path.relative_to(folder).as_posix()
        if name != _FIGURES and not _WRITTEN.fullmatch(name):
            continue
        real = path.resolve()
        if not real.is_relative_to(home) or not (real.is_dir() if name == _FIGURES else real.is_file()):
            raise UserError(f"{path} is {real}, and no file of the folder; put the file itself there")
        if name != _FIGURES:
            found.append((name, real.stat().st_size))
    return found


def left_out(folder: Path) -> str | None:
    """Return a sentence on what lies in a folder and is not uploaded, None if there is nothing."""
    pushed = {name for name, _ in files_to_push(folder)} | {_FIGURES}
    others = sorted(path.name for path in folder.iterdir() if path.name not in pushed)
    if not others:
        return None
    more = f" and {len(others) - _NAMED:,} more" if len(others) > _NAMED else ""
    return f"left out, since flipscale did not write it: {', '.join(others[:_NAMED])}{more}"


def check_to_push(folder: Path) -> None:
    """Raise if a folder is no whole model, or one that nobody can use.

    Raises:
        ValueError: a file is missing, damaged or elsewhere, or a weight is not finite.
    """
    files_to_push(folder)
    if (folder / "image_model.onnx").is_file():  # `flipscale convert onnx` has compared it with its model
        return
    for file in check_folder(folder):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                check_weight(name, weights.get_tensor(name))


def _explained(error: Exception, target: Target) -> Exception:
    """Return a ValueError for an error that retrying cannot fix, an OSError for a transient one, without the token."""
    cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    said = _without_token(" ".join((getattr(cause, "server_message", None) or str(cause or error)).split()))
    if isinstance(error, OfflineModeIsEnabled):
        return UserError(f"cannot push to {target}: HF_HUB_OFFLINE is set; unset it")
    if status == 401:
        return UserError(f"the Hub rejects the token for {target} ({said}); log in with `hf auth login`")
    if status in (403, 404):
        return UserError(
            f"the token may not write to {target} ({said}); use an organisation that you are a member of, and a token "
            "with write access"
        )
    # A page of a proxy is no refusal.
    is_answer = isinstance(error, OSError | RuntimeError | ValueError | HTTPError)
    if isinstance(error, JSONDecodeError | RecursionError) or not is_answer:
        said = f"what {constants.ENDPOINT} answers is no Hub's: {said or type(error).__name__}"
    elif isinstance(error, ValueError) or (status is not None and 400 <= status < 500 and status not in _TEMPORARY):
        return UserError(f"the Hub refuses the push to {target} ({said})")
    return OSError(f"the push to {target} failed ({said or type(error).__name__})")


def _without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "<token>") if token else text
