"""Model folders, from this machine or the Hub: find the folder that a name means, and check it before it is read.

A model is named by its folder, by the folder of its run, or by its name on the Hub. Anybody may have written a model
folder: code in it is never run, and pickles are never loaded.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flipscale.io.errors import UserError
from flipscale.io.hub_requests import NO_HUB, guard_requests, http_failure
from flipscale.io.paths import check_plain, quoted

# Files of a model folder that must each be one JSON object, if they exist.
_OBJECTS = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "processor_config.json", "preprocessor_config.json"),
]
# Files that loaders read: the configurations, the tokenizer and the processor, and with them the weights.
TEXTS = [
    *("*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.jinja"),
]
LOADED = [*TEXTS, "model*.safetensors", "model.safetensors.index*.json"]
# Parts of a config.json that must each be an object, if they exist.
_SECTIONS = ("vision_config", "text_config", "decoder_config", "answer_config")
# Fields that name versions, places and storage, on which no embedding depends.
_BOOKKEEPING = ("_name_or_path", "name_or_path", "transformers_version", "auto_map", "dtype", "torch_dtype")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def local_folder(name: str) -> Path | None:
    """Return the model folder on this machine: the folder `name`, or its `model/` (of a run or a race).

    Return None if there is none and `name` may be a name on the Hub. Otherwise raise UserError.
    """
    path = Path(name)
    if path.is_dir():
        if (path / "config.json").exists():
            return path
        _refuse_adapter(name, path)
        if (path / "model").is_dir():
            return path / "model"
        if not (path / "recipe.yaml").exists():
            return path
        raise UserError(
            f"the run {name!r} has no model yet, because a run writes it at its end; wait, or export the newest "
            f"checkpoint: flipscale export {quoted(name)}"
        )
    if path.exists():
        raise UserError(f"{name!r} is a file; name the folder of a model, or of a run")
    if "://" in name:
        raise UserError(f"{name!r} is a URL; name a model on the Hub as ORG/NAME, or a folder of this machine")
    if is_path(name):
        raise UserError(f"there is no folder {name!r}; name the folder of a model or of a run, or ORG/NAME on the Hub")
    return None


def is_path(name: str) -> bool:
    """Return whether `name` can only be a path, not a Hub name `NAME` or `ORG/NAME`.

    It begins as a path does, has more parts, or its first part is a folder here.
    """
    first, slash, rest = name.partition("/")
    return (
        first in ("", ".", "..")
        or first.startswith("~")
        or (bool(slash) and (not rest or "/" in rest or Path(first).is_dir()))
    )


def fetch_folder(name: str, files: Sequence[str] = LOADED) -> Path:
    """Return the folder of a model: the `local_folder`, or the Hub cache's folder after a download of `files`. Raise
    UserError if there is no such model that may be read, or, offline, in the cache; OSError without the Hub."""
    if (folder := local_folder(name)) is not None:
        return folder
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    guard_requests()
    ignored = [] if any("/" in file for file in files) else ["*/*"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=[*ignored, "*.bf16*"]))
        _refuse_adapter(name, folder)
        return folder
    except HFValidationError:
        raise UserError(f"there is no folder {name!r}, and it is not a name on the Hub; use ORG/NAME") from None
    except (OSError, HTTPError) as error:
        status, reason = http_failure(error)
        if status in (401, 403, 404):
            raise UserError(f"there is no folder {name!r}, and the Hub has none that may be read: {reason}") from None
        if isinstance(error, LocalEntryNotFoundError) and not isinstance(error.__cause__, HTTPError):
            raise UserError(
                f"there is no folder {name!r}, and the Hub's cache on this machine does not have it; the Hub is out of "
                "reach, or HF_HUB_OFFLINE is set"
            ) from None
        raise OSError(f"{name!r} cannot be fetched from the Hub: {reason}") from None
    except NO_HUB as error:
        raise OSError(
            f"{name!r} cannot be fetched: {constants.ENDPOINT} is not a Hugging Face Hub ({type(error).__name__}: "
            f"{error}); look at HF_ENDPOINT and the proxy"
        ) from None


def _refuse_adapter(name: str, folder: Path) -> None:
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        raise UserError(
            f"{name!r} is an adapter, changes of the model {base!r:.200}, and no whole model; name the run that "
            "trained it, or the folder that `flipscale export RUN --out DIR` writes"
        )


def check_folder(folder: Path) -> list[Path]:
    """Return the weight files of a complete model folder. Raise UserError if a file is missing, damaged, cut short or
    outside of the folder, or the weights are only a pickle."""
    if not (folder / "config.json").is_file():
        is_open_clip = (folder / "open_clip_config.json").is_file()
        remedy = f"name it open_clip:local-dir:{folder}" if is_open_clip else "download or export it again"
        raise UserError(f"{folder} has no config.json and is not a model folder; {remedy}")
    check_texts(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = [folder / name for name in _listed(index)]
    elif pickles := sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES):
        raise UserError(
            f"{folder} has its weights as a pickle ({', '.join(pickles)}), which can run code when it is read and is "
            f"never loaded; ask its authors for {single.name}"
        )
    else:
        raise UserError(f"{folder} has no {single.name} and no index of it; download or export it again")
    for file in files:
        if not file.is_file():
            raise UserError(f"{folder} lacks {file.name}, which {index.name} lists; download or export it again")
        read_shapes(file)
    return files


def check_texts(folder: Path) -> None:
    """Raise UserError if a file that loaders read is not a file, a link out of the folder, or no JSON object.

    Weights are not read here.
    """
    # Snapshots in the Hub's cache link to files in the folder `blobs`.
    home = folder.resolve()
    places = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
    for file in sorted(folder.iterdir()):
        if file.is_dir() or not any(fnmatchcase(file.name, pattern) for pattern in LOADED):
            continue
        real = file.resolve()
        if not any(real.is_relative_to(place) for place in places):
            raise UserError(f"{file} is a link to {real}, outside of the folder; put the file itself there")
        if not real.is_file():
            raise UserError(f"{file} is not a file; download or export the model again")
        if file.name in _OBJECTS:
            read_object(file)


def read_object(file: Path, remedy: str = "download or export it again") -> dict[str, Any]:
    """Return the JSON object in a file. Raise UserError with the remedy if the file is missing, a pipe or damaged. The
    sections of a config.json must be objects."""
    check_plain(file)
    try:
        value = json.loads(file.read_bytes(), object_pairs_hook=_checked_object)
        if not isinstance(value, dict):
            raise ValueError(f"it is not a JSON object but {value!r:.40}")
    except FileNotFoundError:
        raise UserError(f"{file.parent} has no {file.name}; {remedy}") from None
    except RecursionError:
        raise UserError(f"{file} is damaged: it is nested too deep; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}; {remedy}") from None
    for name in _SECTIONS if file.name == "config.json" else ():
        if not isinstance(value.get(name), dict | None):
            raise UserError(f"{file}: {name} is {value[name]!r:.40}; expected an object with fields")
    return value


def pixel_fields(folder: Path) -> dict[str, Any]:
    """Return what a folder's image processor says: `image_mean`, `image_std`, and `squashes` of the family `towers`."""
    for file in ("preprocessor_config.json", "processor_config.json"):
        content = read_object(folder / file) if (folder / file).is_file() else {}
        # A processor_config.json may describe the tokenizer only.
        content = content.get("image_processor", content if file.startswith("pre") else {})
        if content and isinstance(content, dict):
            pixels: dict[str, Any] = {name: content[name] for name in ("image_mean", "image_std") if name in content}
            if content.get("do_normalize") is False:
                pixels = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
            return {**pixels, "squashes": not content.get("do_center_crop", False)}
    return {}


def _checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object from its pairs. Duplicate keys are refused, because other readers may take the other value."""
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"it has {key!r:.80} twice")
    return dict(pairs)


def texts_digest(folder: Path) -> str:
    """Return a digest of the files next to the weights: configurations, tokenizer, processor and templates, also of
    copied towers. JSON files count by their values. Other files, such as a card, do not count."""
    parts = []
    for file in sorted({file for at in ("", "*_model/") for pattern in TEXTS for file in folder.glob(at + pattern)}):
        content = file.read_bytes() if file.is_file() else b""
        with suppress(ValueError, RecursionError):
            values = json.loads(content, object_hook=lambda one: {k: one[k] for k in one if k not in _BOOKKEEPING})
            content = json.dumps(values, sort_keys=True).encode()
        parts.append([str(file.relative_to(folder)), hashlib.sha256(content).hexdigest()])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_shapes(file: Path) -> dict[str, list[int]]:
    """Return the shape of each weight in a safetensors file of full length, or raise UserError."""
    try:
        with safe_open(file, "np") as weights:
            return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{file} is cut short or damaged ({error}); download or export it again") from None


def open_weight_file(folder: Path) -> dict[str, Any]:
    """Return the open file of each weight of a complete model folder. It reads one tensor at a time."""
    files = [safe_open(file, "pt") for file in check_folder(folder)]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def _listed(index: Path) -> list[str]:
    """Return the file names that an index lists; all are in its folder."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} is damaged: it has no weight_map; download or export it again")
    for tensor, name in names.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{index} has {tensor!r:.80} in {name!r:.80}, which is not a safetensors file of the folder; download "
                "or export it again"
            )
    return sorted(set(names.values()))
