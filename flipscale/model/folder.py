"""Check that a model folder is complete and safe before its weights are read."""

import json
import os
from pathlib import Path


def check_folder(folder: Path, variant: str | None = None) -> None:
    """Check that a folder has a configuration and all its weights as safetensors, each file of its full length.

    Args:
        variant: the variant of the weights, e.g. bf16.

    Raises:
        ValueError: a file is missing or cut short, or the weights are there as a pickle only.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json and is no model folder; download or export it again")
    suffix = f".{variant}" if variant else ""
    single, index = folder / f"model{suffix}.safetensors", folder / f"model.safetensors.index{suffix}.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        _refuse_without_safetensors(folder, single.name)
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"{folder} is half a model: {file.name}, which {index.name} lists, is missing; get it again"
            )
        if file.stat().st_size != expected_bytes(file):
            raise ValueError(f"{file} is cut short or damaged: {_describe_bytes(file)}; download or export it again")


def _refuse_without_safetensors(folder: Path, wanted: str) -> None:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if pickles:
        raise ValueError(
            f"{folder} has its weights as a pickle ({', '.join(pickles)}), which can run code when it is read and is "
            f"never loaded; have them saved as {wanted} by those who made them"
        )
    raise ValueError(f"{folder} has no {wanted} and no index of it; download or export it again")


def expected_bytes(file: Path) -> int | None:
    """Return the size that the header of a safetensors file promises; None if the header itself cannot be read."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > os.path.getsize(file):
            return None
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return None
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0)


def _describe_bytes(file: Path) -> str:
    expected = expected_bytes(file)
    told = "its header cannot be read" if expected is None else f"its header promises {expected:,} bytes"
    return f"{told}, it has {file.stat().st_size:,}"


__all__ = ["check_folder"]
