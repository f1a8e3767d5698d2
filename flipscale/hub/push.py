"""Push models to the Hub: a folder, each checkpoint while a run trains, and the finished model.

`HfApi.upload_folder` sends only changed files and resumes an interrupted upload when it is called again. The token is
the one that huggingface_hub finds (HF_TOKEN, a stored login). It is read here only to keep it out of messages.
"""

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from flipscale.hub.card import read_audit
from flipscale.io.digests import check_weight
from flipscale.io.errors import UserError
from flipscale.io.hub_requests import NO_HUB, guard_requests, http_failure
from flipscale.io.model_folder import LOADED, check_folder, open_weight_file
from flipscale.io.paths import last_line
from flipscale.recipe.data import PRECOMPUTED_TOWERS
from flipscale.recipe.outputs import HubRecipe
from flipscale.recipe.recipe import Recipe

_log = logging.getLogger(__name__)

# Seconds before each retry of a push. huggingface_hub also retries single requests by itself.
WAITS = (1, 2, 4, 8, 16, 32, 64)
# Files that flipscale writes into a model folder. Other files are never uploaded, because they may be secrets.
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt"),
)
_WRITTEN = (
    *("README.md", "results.md", "results.jsonl", "results.png", "figures/*.png"),
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("model*.safetensors", "model*.safetensors.index*.json", *_TOKENIZER, "[!.]*.model", "chat_template.jinja"),
    *("configuration_flip.py", "modeling_flip.py", "modeling_flip_caption.py", "modeling_flip_vqa.py"),
    *("processing_flip.py", "patches.py", "modeling_dual_encoder.py"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
    *(f"{tower}/{name}" for tower in PRECOMPUTED_TOWERS.values() for name in LOADED),
    *("open_clip_config.json", "open_clip_model.safetensors"),
    *(f"{graph}.onnx{data}" for graph in ("image_model", "text_model") for data in ("", ".data")),
    *(f"{tower}/model.onnx{data}" for tower in ("visual", "textual") for data in ("", ".data")),
    *("visual/preprocess_cfg.json", *(f"textual/{name}" for name in _TOKENIZER)),
)
# Files of an earlier push that weights of these names replace, in another number of shards.
_REPLACED = ["model*.safetensors", "model*.safetensors.index*.json"]
_SHOWN = 6  # names in the line about other files
_TRANSIENT = (408, 409, 412, 429)  # 4xx worth a retry: timeouts, a concurrent commit, rate limits
_FAILURES = (OSError, RuntimeError, HTTPError, *NO_HUB)

_NICENESS = 10  # below the data workers, because the accelerators wait for these
# A background push sees no accelerator and uses one thread. People read its log.
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


@dataclass(frozen=True)
class Target:
    """Place of a model on the Hub.

    Args:
        repo_id: ORG/NAME, by which the card loads the model.
        private: visibility of a new repository; None for the organisation's default.
        revision: branch, created if it does not exist; None for main.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise UserError(f"{self.repo_id!r} is not a valid model name on the Hub; use ORG/NAME ({error})") from None
        if "/" not in self.repo_id:
            raise UserError(f"{self.repo_id!r} has no account; use ORG/NAME, such as YOUR_ACCOUNT/{self.repo_id}")

    def __str__(self) -> str:
        return self.repo_id + (f" (revision {self.revision})" if self.revision else "")

    def command(self, run_dir: Path) -> list[str]:
        """Return the command that pushes a run's model to this place."""
        private = ["--private"] if self.private else []
        revision = ["--revision", self.revision] if self.revision else []
        return ["flipscale", "push", str(run_dir), self.repo_id, *private, *revision]


def target_of(recipe: HubRecipe) -> Target | None:
    """Return the target of a run's pushes, or None if the run is not pushed. Raise UserError if its name is invalid."""
    if not recipe.push_to_hub or recipe.hub_model_id is None:
        return None
    return Target(recipe.hub_model_id, recipe.hub_private_repo, recipe.hub_revision)


def card_name(recipe: Recipe) -> str:
    """Return the name that loads a run's finished model: its Hub name if it is pushed, else its folder."""
    target = target_of(recipe.hub)
    return target.repo_id if target else str(Path(recipe.output_dir) / "model")


def open_repo(target: Target) -> str:
    """Create the target's repository and revision if they do not exist, and return the repository's full name.

    Raises:
        UserError: the token is missing, invalid or may not write there, the organisation is unknown, or a private
            repository is wanted and a public one exists.
        OSError: the Hub cannot be reached.
    """
    if get_token() is None:
        raise UserError(f"no token to push to {target}; log in with `hf auth login`, or set HF_TOKEN")
    guard_requests()
    api = HfApi()
    try:
        repo_id = api.create_repo(target.repo_id, private=target.private, exist_ok=True).repo_id
        is_public = target.private and not api.model_info(repo_id).private
        if target.revision and not is_public:
            api.create_branch(repo_id, branch=target.revision, exist_ok=True)
    except _FAILURES as error:
        raise _explain(error, target) from None
    if is_public:
        raise UserError(f"{repo_id} is public; expected a private model. Fix: make it private on the Hub")
    return repo_id


def open_target(recipe: HubRecipe, resumes: bool) -> None:
    """Check the audit of a run and create the repository of its pushes, so that training does not begin in vain.

    Only rank 0 creates it. The run continues if the Hub cannot be reached. A resumed run always continues. Raise
    UserError if the audit is unusable, or as `open_repo`.
    """
    if recipe.audit:
        read_audit(recipe.audit)
    target = target_of(recipe)
    if target is None or not _is_rank_0():
        return
    try:
        open_repo(target)
    except (UserError, OSError) as error:
        if isinstance(error, UserError) and not resumes:
            raise
        _log.warning("%s; the run continues and will push its next checkpoint", error)


def push_folder(folder: Path, target: Target, message: str, waits: Sequence[float] = WAITS) -> tuple[str, str | None]:
    """Upload flipscale's files in `folder` in one commit, with a retry after each of `waits` seconds.

    Files that only the repository has are kept, except shards of weights. One log line names what is not uploaded.

    Returns:
        URL of the model, and the new commit, or None if the repository had the same files.

    Raises:
        UserError: see `open_repo`; or the folder is not a complete model, or the Hub refuses the card.
        OSError: the Hub cannot be reached, or every try failed.
    """
    check_to_push(folder)
    if others := left_out(folder):
        _log.warning("%s: %s", folder, others)
    for wait in waits:
        try:
            return _push(folder, target, message)
        except OSError as error:
            _log.warning("%s; trying again in %g s", error, wait)
            time.sleep(wait)
    return _push(folder, target, message)


def _push(folder: Path, target: Target, message: str) -> tuple[str, str | None]:
    repo_id, api, files = open_repo(target), HfApi(), split_own_files(folder)[0]
    has_weights = any(fnmatchcase(name, _REPLACED[0]) for name in files)
    try:
        before = api.model_info(repo_id, revision=target.revision).sha
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=target.revision,
            commit_message=message,
            allow_patterns=[escape(name) for name in files],
            delete_patterns=_REPLACED if has_weights else None,
        )
    except _FAILURES as error:
        raise _explain(error, target) from None
    url = f"{api.endpoint}/{repo_id}" + (f"/tree/{target.revision}" if target.revision else "")
    return url, None if commit.oid == before else commit.oid


def split_own_files(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of flipscale's own files in a model folder, which a push uploads, and of all others.

    Links belong to the others and are marked.
    """
    folders = [folder / name for name in ("figures", "visual", "textual", *PRECOMPUTED_TOWERS.values())]
    folders = [inner for inner in folders if inner.is_dir() and not inner.is_symlink()]
    own, others = [], []
    for path in sorted(path for place in (folder, *folders) for path in place.iterdir()):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            others.append(f"{name} (a link)")
        elif path.is_file() and any(fnmatchcase(name, pattern) for pattern in _WRITTEN):
            own.append(name)
        elif path not in folders:
            others.append(name)
    return own, others


def left_out(folder: Path) -> str | None:
    """Return a sentence that names the other files and links in a folder, or None if there are none."""
    if not (names := split_own_files(folder)[1]):
        return None
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"left out, because flipscale did not write it: {', '.join(names[:_SHOWN])}{more}"


def check_to_push(folder: Path) -> None:
    """Raise UserError unless a folder is a complete model with finite weights and without links."""
    converted = ("visual/model.onnx", "image_model.onnx", "open_clip_model.safetensors")
    if any((folder / name).is_file() for name in converted):
        return  # `flipscale convert` has read the finite weights of its model
    for file in [folder / "config.json", folder / "README.md", *check_folder(folder)]:
        if file.is_symlink():
            raise UserError(f"{file} is a link, which is not uploaded; put the file itself there")
    for name, file in open_weight_file(folder).items():
        check_weight(name, file.get_tensor(name))


def _explain(error: Exception, target: Target) -> UserError | OSError:
    """Return a UserError for an error that needs the user, an OSError for a transient error, without the token."""
    status, words = http_failure(error)
    words = words.replace(get_token() or "\0", "<token>")
    is_refused = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
    if isinstance(error, OfflineModeIsEnabled):
        return UserError(f"cannot push to {target}: HF_HUB_OFFLINE is set; unset it")
    if status == 401:
        return UserError(f"the Hub rejects the token for {target} ({words}); log in with `hf auth login`")
    if status in (403, 404):
        remedy = "use an organisation that you are a member of, and a token with write access"
        return UserError(f"the token may not write to {target} ({words}); {remedy}")
    if is_refused or (status is not None and 400 <= status < 500 and status not in _TRANSIENT):
        return UserError(f"the Hub refuses the push to {target} ({words})")
    if isinstance(error, NO_HUB):
        reason = f"{constants.ENDPOINT} does not answer as the Hub does ({words}); check HF_ENDPOINT and the proxy"
        return OSError(f"the push to {target} failed: {reason}")
    return OSError(f"the push to {target} failed ({words})")


class BackgroundPush:
    """Pushes checkpoints while a run trains, one at a time. Training never waits for a push.

    Each push is a process, `flipscale push RUN ORG/NAME --step N`, which writes to the run's `push.log`. A thread would
    share the trainer's interpreter, and could not be ended. A checkpoint that is saved during a push is left to the
    next push, because it would only be replaced. A failed push is logged.

    Args:
        last_step: last step of the run, which `push_finished` pushes; None if unknown.
        is_main_process: whether this is rank 0; other ranks push nothing.
    """

    def __init__(self, recipe: Recipe, last_step: int | None, is_main_process: bool):
        self.run_dir = Path(recipe.output_dir)
        self.last_step = last_step
        self._target = target_of(recipe.hub) if is_main_process else None
        self._process: subprocess.Popen[bytes] | None = None
        self._step = 0

    def offer(self, step: int | None) -> None:
        """Start to push the checkpoint of a step, unless another push runs. `step` is None if none was saved."""
        if self._target is None or step is None or (self.last_step is not None and step >= self.last_step):
            return
        if self._process is not None and self._process.poll() is None:
            return
        self._report()
        self._step = step
        command = [*self._target.command(self.run_dir)[1:], "--step", str(step)]
        try:
            with open(self.run_dir / "push.log", "ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "flipscale.cli", *command],
                    env={**os.environ, **_ENVIRONMENT},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            os.setpriority(os.PRIO_PROCESS, self._process.pid, _NICENESS)
        except OSError as error:  # no memory for a process, or no space for its log
            self._warn(str(error))

    def close(self) -> None:
        """End a running push at once: a newer model follows, from this run or when it resumes."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        else:
            self._report()
        shutil.rmtree(export_folder(self.run_dir, self._step), ignore_errors=True)

    def _report(self) -> None:
        """Log the failure of a push that has ended."""
        process, self._process = self._process, None
        if process is not None and process.returncode != 0:
            self._warn(last_line(self.run_dir / "push.log"))

    def _warn(self, reason: str) -> None:
        message = "step %d was not pushed to %s (%s); the run continues and will push its next checkpoint"
        _log.warning(message, self._step, self._target, reason)


def push_finished(recipe: Recipe) -> None:
    """Push the model of a finished run if its recipe asks for a push. Only rank 0 does so. Raise OSError if the push
    failed; the message has the command that pushes the model by hand."""
    target, run_dir = target_of(recipe.hub), Path(recipe.output_dir)
    if target is None or not _is_rank_0() or not (run_dir / "DONE").exists():
        return
    try:
        url, _ = push_folder(run_dir / "model", target, f"{run_dir.resolve().name}, finished")
    except (UserError, OSError) as error:
        raise OSError(
            f"{run_dir} is done, but its model is not on the Hub: {error}; push it by hand: "
            + shlex.join(target.command(run_dir))
        ) from error
    print(f"{run_dir} is on the Hub: {url}")


def export_folder(run_dir: Path, step: int) -> Path:
    """Return the temporary folder of a checkpoint's model during its push."""
    return run_dir / f".push-step-{step:08d}"


def _is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"
