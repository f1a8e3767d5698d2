"""The bytes of a launch file of accelerate's, and of the DeepSpeed file next to it."""

from contextlib import suppress
from pathlib import Path

import flipscale
from flipscale.engines.launch import read_launch_file

_FILES = Path(flipscale.__file__).parents[1] / "ds_configs"
_DEEPSPEED = (
    b"distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {deepspeed_config_file: settings.json}\n"
)


def seeds() -> list[bytes]:
    """The files that flipscale ships."""
    return [file.read_bytes() for file in sorted(_FILES.iterdir())]


def attack(data: bytes, folder: Path) -> None:
    """Read the bytes as a launch file, and as DeepSpeed's settings."""
    (folder / "launch.yaml").write_bytes(data)
    (folder / "zero.yaml").write_bytes(_DEEPSPEED.replace(b"settings.json", str(folder / "settings.json").encode()))
    (folder / "settings.json").write_bytes(data)
    for name in ("launch.yaml", "zero.yaml"):
        with suppress(ValueError):
            read_launch_file(folder / name)
