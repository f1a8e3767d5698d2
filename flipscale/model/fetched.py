"""The folder of a model, fetched from the Hub if it is not on this machine: never its code, and no pickle unasked."""

from pathlib import Path

from .folder import READ

# Without this, a request to a silent server waits for ever.
SILENT_SECONDS = 60.0


def fetched_folder(name: str, more: tuple[str, ...] = ()) -> Path:
    """Return the folder of a model: `name` itself, or where the Hub's cache has the model of that name.

    Args:
        more: patterns of further files to fetch.

    Raises:
        ValueError: there is no such folder, nor a model that may be read, or the cache has none while offline.
        OSError: the Hub cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    refuse_silence()
    try:
        found = snapshot_download(name, allow_patterns=[*READ, *more], ignore_patterns=["*/*", "*.bf16*"])
        return Path(found)
    except HFValidationError:
        raise ValueError(f"there is no folder {name!r}, and it is no name on the Hub; use ORG/NAME") from None
    except (OSError, HTTPError) as error:
        cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        said = " ".join(str(error).split("\n\n")[-1].split()) or type(error).__name__
        if status in (401, 403, 404):
            raise ValueError(f"there is no folder {name!r}, and the Hub has none that may be read: {said}") from None
        if isinstance(error, LocalEntryNotFoundError) and status is None and not isinstance(cause, HTTPError):
            raise ValueError(
                f"there is no folder {name!r}, and the Hub's cache on this machine does not have it while the Hub is "
                "out of reach or HF_HUB_OFFLINE is set"
            ) from None
        raise OSError(f"{name!r} cannot be fetched from the Hub: {said}") from None


def refuse_silence() -> None:
    """Have requests to the Hub fail after `SILENT_SECONDS` without an answer."""
    from huggingface_hub import get_session

    get_session().timeout = SILENT_SECONDS
