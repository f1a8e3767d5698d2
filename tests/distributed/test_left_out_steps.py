"""A step that is left out on the device leaves no trace under any engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from distributed.crowd import Crowd


@pytest.fixture(scope="module")
def crowd() -> Iterator[Crowd]:
    made = Crowd(2)
    yield made
    made.end()


CLIPPED = {"max_grad_norm": 0.1}
MUON = {"name": "muon"}


@pytest.mark.parametrize(
    ("engine", "optimizer"),
    [*((engine, CLIPPED) for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3")), ("ddp", MUON), ("fsdp2", MUON)],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_steps_left_out_leave_no_trace(
    crowd: Crowd, recipe: dict, tmp_path: Path, engine: str, optimizer: dict
) -> None:
    file = tmp_path / "recipe.yaml"
    changes = {"optim": {"ema_decay": 0.5, **optimizer}, "output_dir": str(tmp_path / "run")}
    file.write_text(yaml.safe_dump({**recipe, **changes}))
    assert crowd.run("leave_out", engine, file) == ["done"] * 2
