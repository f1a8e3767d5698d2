"""The bytes of one file of a checkpoint: its state, index, recipe, digests, or the header of its part."""

import json
from pathlib import Path

import torch

from flipscale.engines.checkpoint import CheckpointReader, contents, require_valid
from flipscale.io.digests import CorruptFile, digest_of, digests_to_json

PART = "part-00000.safetensors"
STATE = {
    "step": 4, "samples_seen": 64, "optimizer_steps": 4, "trained_seconds": 1.5, "data_samples": 96,
    "data_fingerprint": 7, "num_processes": 1,
}  # fmt: skip
SHAPES = {"scale": [], "weight": [2, 3]}
TENSORS = {"weight.scale": 1, "weight.weight": 6, "exp_avg.weight": 6}


def _files() -> dict[str, bytes]:
    header: dict[str, object] = {}
    position = 0
    for name, size in TENSORS.items():
        header[name] = {"dtype": "F32", "shape": [size], "data_offsets": [position, position + 4 * size]}
        position += 4 * size
    text = json.dumps(header).encode()
    bounds = {"scale": [0, 1], "weight": [0, 6]}
    return {
        "state.json": json.dumps(STATE).encode(),
        "index.json": json.dumps({"shapes": SHAPES, "bounds": bounds}).encode(),
        "recipe.yaml": b"seed: 0\ndata: {global_batch_size: 16}\nstages: [{name: masked, samples: 96}]\n",
        PART: len(text).to_bytes(8, "little") + text + bytes(position),
    }


FILES = _files()
NAMES = [*FILES, "digests.json"]


def seeds() -> list[bytes]:
    """Each file after its number; the digests are those of the other files."""
    digests = digests_to_json({name: digest_of(content) for name, content in FILES.items()})
    return [bytes([number]) + content for number, content in enumerate([*FILES.values(), digests.encode()])]


def attack(data: bytes, folder: Path) -> None:
    """Look whether a checkpoint with this file in place of its own is whole, and read all of it if it is."""
    checkpoint = folder / "checkpoints/step-00000004"
    checkpoint.mkdir(parents=True)
    for name, content in {**FILES, NAMES[(data or b"\0")[0] % len(NAMES)]: data[1:]}.items():
        (checkpoint / name).write_bytes(content)
    try:
        found = contents(checkpoint)
        require_valid(checkpoint)
    except (CorruptFile, ValueError, OSError):
        return
    assert found.state["step"] == 4
    reader = CheckpointReader(checkpoint)
    for name, shape in reader.shapes.items():
        assert reader.tensor("weight", name).shape == torch.Size(shape)
