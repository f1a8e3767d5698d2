"""Files of data sets on the Hub, listed and downloaded whole."""

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, hf_hub_download
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from flipscale.io.atomic import remove, sync
from flipscale.io.errors import UserError

_LIST_SECONDS = 30.0


class WrongFile(OSError):
    """A downloaded file differs from the one that the Hub lists; other files may be right."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Args:
        name: path in the repository.
        digest: `sha256:HEX` of a large file, `git:HEX` (git's id of the content) of a small one.
        path: path in the folder that is prepared.
    """

    repo: str
    commit: str
    name: str
    size: int
    digest: str
    path: str

    def has_size(self, path: Path) -> bool:
        """Return whether `path` is a file of the size that the Hub lists."""
        return path.is_file() and path.stat().st_size == self.size

    def is_whole(self, path: Path) -> bool:
        """Return whether `path` has the size and content that the Hub lists."""
        if not self.has_size(path):
            return False
        if self.digest.startswith("git:"):
            return self.digest == f"git:{git_hash(path.read_bytes())}"
        with open(path, "rb") as file:
            return self.digest == f"sha256:{sha_fileobj(file).hex()}"


def list_files(repo: str, revision: str) -> list[HubFile]:
    """Return the files of a data set on the Hub, or on the mirror that `HF_ENDPOINT` names. Raise UserError if it does
    not exist or may not be read, OSError if the request fails."""
    files = []
    try:
        info = HfApi().dataset_info(repo, revision=revision, files_metadata=True, timeout=_LIST_SECONDS)
        for file in info.siblings or []:
            content = f"sha256:{file.lfs.sha256}" if file.lfs else f"git:{file.blob_id}"
            size, name = max(int(file.size or 0), 0), file.rfilename
            files.append(HubFile(repo, info.sha or "", name, size, content, name))
    # A proxy's page in place of the Hub's answer raises the last four.
    except (OSError, HTTPError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise _explained(error, repo, revision) from None
    if not info.sha:
        raise _explained(UserError("it does not say which commit it has"), repo, revision)
    return files


def download(file: HubFile, path: Path, folder: Path) -> None:
    """Download a file to `path` by way of `folder`, unless it is whole. Raise WrongFile if it differs from the one that
    the Hub lists, and otherwise as `list_files`."""
    repo, commit = file.repo, file.commit
    if file.is_whole(path):
        return
    remove(folder)  # because a file of a killed run is downloaded anew
    try:
        arrived = Path(hf_hub_download(repo, file.name, repo_type="dataset", revision=commit, local_dir=folder))
    except OSError as error:
        if "Consistency check failed" not in str(error):
            raise _explained(error, repo, commit) from None
        arrived = folder
    except (HTTPError, RuntimeError, ValueError) as error:
        raise _explained(error, repo, commit) from None
    if not file.is_whole(arrived):
        remove(folder)
        raise WrongFile(
            f"{file.name} of {repo} did not arrive as the Hub states it ({file.size:,} bytes, {file.digest}); start "
            "the same command again"
        )
    sync(arrived)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(arrived, path)


def _explained(error: Exception, repo: str, revision: str) -> Exception:
    """Return the error to raise for a failed request: a UserError if the user can correct it, else an OSError."""
    cause = error if isinstance(error, errors.HfHubHTTPError) else error.__cause__ or error
    where = f"data set {repo} at {constants.ENDPOINT}"
    correctable = {
        errors.OfflineModeIsEnabled: f"cannot read {where}: HF_HUB_OFFLINE is set; unset it",
        errors.GatedRepoError: f"{where} is gated; accept its terms on its page, then log in with `hf auth login`",
        errors.RevisionNotFoundError: f"{where} has no revision {revision}",
        errors.RepositoryNotFoundError: f"{where} does not exist, or may be read only by others; a mirror may lack it",
    }
    for kind, message in correctable.items():
        if isinstance(cause, kind):
            return UserError(message)
    if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, ConnectionError):
        return cause
    reason = " ".join(str(getattr(cause, "server_message", None) or cause).split())
    return OSError(f"{where} cannot be read ({reason}); the same command resumes later; or set HF_ENDPOINT to a mirror")
