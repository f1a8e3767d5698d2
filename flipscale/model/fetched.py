"""The folder of a model, fetched from the Hub if it is not on this machine: never its code, and no pickle unasked.

A model is named by its folder, by the run that has it in `model/`, or by its name on the Hub.
"""

from pathlib import Path

from .folder import READ
from .hub_requests import guard_requests


def local_folder(name: str) -> Path | None:
    """Return the model folder on this machine that `name` means: the folder itself, or the `model/` of a run. None if
    there is none and it may be a name on the Hub.

    Raises:
        ValueError: it is a file, a run that has no model yet, or a path that leads nowhere.
    """
    path = Path(name)
    if path.is_dir():
        if (path / "config.json").exists() or not (path / "recipe.yaml").exists():
            return path
        if (path / "model").is_dir():
            return path / "model"
        raise ValueError(
            f"the run {name!r} has no model yet, which is written at its end; let it end, or write the model of its "
            f"newest checkpoint: flipscale export {name}"
        )
    if path.exists():
        raise ValueError(f"{name!r} is a file; name the folder of a model, or of a run")
    if looks_like_a_path(name):
        raise ValueError(f"there is no folder {name!r}; name the folder of a model or of a run, or ORG/NAME on the Hub")
    return None


def looks_like_a_path(name: str) -> bool:
    """Return whether nobody can mean a name on the Hub, `NAME` or `ORG/NAME`: it begins as a path does, has more parts,
    or its first part is a folder here."""
    first, slash, rest = name.partition("/")
    is_begun = first in ("", ".", "..") or first.startswith("~")
    return is_begun or (bool(slash) and (not rest or "/" in rest or Path(first).is_dir()))


def fetched_folder(name: str, more: tuple[str, ...] = ()) -> Path:
    """Return the folder of a model: as `local_folder`, or where the Hub's cache has the model of that name.

    Args:
        more: patterns of further files to fetch.

    Raises:
        ValueError: as `local_folder`; there is no model that may be read, or the cache has none while offline.
        OSError: the Hub cannot be reached.
    """
    if (folder := local_folder(name)) is not None:
        return folder
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    guard_requests()
    try:
        found = snapshot_download(name, allow_patterns=[*READ, *more], ignore_patterns=["*/*", "*.bf16*"])
        return Path(found)
    except HFValidationError:
        raise ValueError(f"there is no folder {name!r}, and it is no name on the Hub; use ORG/NAME") from None
    except (OSError, HTTPError) as error:
        cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        words = getattr(cause, "server_message", None) or str(cause or error).split("\n\n")[-1]
        said = " ".join(words.split()) or type(error).__name__
        if status in (401, 403, 404):
            raise ValueError(f"there is no folder {name!r}, and the Hub has none that may be read: {said}") from None
        if isinstance(error, LocalEntryNotFoundError) and status is None and not isinstance(cause, HTTPError):
            raise ValueError(
                f"there is no folder {name!r}, and the Hub's cache on this machine does not have it while the Hub is "
                "out of reach or HF_HUB_OFFLINE is set"
            ) from None
        raise OSError(f"{name!r} cannot be fetched from the Hub: {said}") from None
    except Exception as error:  # what is no Hub's answer, such as a page of a proxy, makes huggingface_hub raise any
        raise OSError(
            f"{name!r} cannot be fetched: what {constants.ENDPOINT} answers is no Hub's ({type(error).__name__}: "
            f"{error}); look at HF_ENDPOINT and the proxy"
        ) from None
