"""Check that a model folder is complete and safe before it is read. What is in it may be anybody's."""

import json
import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

# The files of a model folder that are one JSON object; those that are there must be it.
_OBJECTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "processor_config.json",
    "preprocessor_config.json",
)
# What is read of a folder: the model, its tokenizer and its processor.
READ = (
    "*config.json",
    "model*.safetensors",
    "model.safetensors.index*.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# The largest tokenizers have 35 MB, other texts 3 MB, headers of a thousand tensors 200 kB.
_MOST_BYTES = {"tokenizer.json": 100 << 20}
_MOST_TEXT_BYTES, _MOST_HEADER_BYTES = 20 << 20, 8 << 20
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

# What is said of a tensor in the header of a safetensors file: `dtype`, `shape` and `data_offsets`.
Header = dict[str, dict[str, Any]]


def check_folder(folder: Path, variant: str | None = None) -> list[Path]:
    """Return the files of the weights of a folder that is complete: a configuration, and all weights as safetensors of
    their full length.

    Args:
        variant: the variant of the weights, e.g. bf16.

    Raises:
        ValueError: a file is missing, damaged, cut short or outside of the folder, or the weights are there as a pickle
            only.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json and is no model folder; download or export it again")
    check_texts(folder)
    suffix = f".{variant}" if variant else ""
    single, index = folder / f"model{suffix}.safetensors", folder / f"model.safetensors.index{suffix}.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = [folder / name for name in _listed(index)]
    else:
        _refuse_without_safetensors(folder, single.name)
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"{folder} is half a model: {file.name}, which {index.name} lists, is missing; get it again"
            )
        read_header(file)
    return files


def check_texts(folder: Path) -> None:
    """Check what a folder holds beside its weights.

    Raises:
        ValueError: a file that would be read is none, is a link out of the folder or too long, or is no JSON object
            though it must be one.
    """
    # The cache of the Hub's client has links to the files beside its snapshots.
    home = folder.resolve()
    places = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
    for file in sorted(folder.iterdir()):
        if file.is_dir() or not any(fnmatchcase(file.name, pattern) for pattern in READ):
            continue
        real = file.resolve()
        if not any(real.is_relative_to(place) for place in places):
            raise ValueError(f"{file} is a link to {real}, outside of the folder; put the file itself there")
        if not real.is_file():
            raise ValueError(f"{file} is no file; download or export the model again")
        most, size = _MOST_BYTES.get(file.name, _MOST_TEXT_BYTES), real.stat().st_size
        if file.suffix != ".safetensors" and size > most:
            raise ValueError(f"{file} has {size:,} bytes, more than the {most:,} that it may have; is it another file?")
    for name in _OBJECTS:
        if (folder / name).exists():
            read_object(folder / name)


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        ValueError: it holds something else.
    """
    try:
        return _object(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; download or export it again") from None


def read_header(file: Path) -> Header:
    """Return the header of a safetensors file of its full length: what it says of each tensor, by name.

    Raises:
        ValueError: the file is cut short, or the header is none.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        content = stream.read(length) if length <= min(size, _MOST_HEADER_BYTES) else b""
    try:
        header = _object(content)
        header.pop("__metadata__", None)
        ends = [_end(name, entry) for name, entry in header.items()]
    except ValueError as error:
        raise ValueError(
            f"{file} is cut short or damaged: its header cannot be read, it has {size:,}; download or export it again "
            f"({error})"
        ) from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ValueError(
            f"{file} is cut short or damaged: its header promises {expected:,} bytes, it has {size:,}; download or "
            "export it again"
        )
    return header


def _end(name: str, entry: Any) -> int:
    """Return where a tensor ends, in bytes after the header.

    Raises:
        ValueError: the header says of it what cannot be.
    """
    try:
        (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
        good = 0 <= begin <= end and all(type(length) is int and length >= 0 for length in shape)
        good = good and math.prod(shape) * _BYTES.get(dtype, 0) in (0, end - begin)
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"{name!r:.80} is {entry!r:.80}")
    return end


def _listed(index: Path) -> list[str]:
    """Return the names of the files that an index lists, which are in its folder."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} is damaged: it has no weight_map; download or export it again")
    for tensor, name in names.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} has {tensor!r:.80} in {name!r:.80}, which is no safetensors file of the folder; download or "
                "export it again"
            )
    return sorted(set(names.values()))


def _object(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"it is no JSON, {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"it is no JSON object but {found!r:.40}")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object whose keys occur once: of two, other readers may take the other."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it has {key!r:.80} twice")
        found[key] = value
    return found


def _refuse_without_safetensors(folder: Path, wanted: str) -> None:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise ValueError(
            f"{folder} has its weights as a pickle ({', '.join(pickles)}), which can run code when it is read and is "
            f"never loaded; have them saved as {wanted} by those who made them"
        )
    raise ValueError(f"{folder} has no {wanted} and no index of it; download or export it again")


__all__ = ["check_folder"]
