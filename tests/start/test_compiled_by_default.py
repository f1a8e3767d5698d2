"""Blocks are compiled on GPUs, unless a recipe says otherwise, an engine cannot, or the node has no compiler."""

import pytest
import torch

from flipscale.engines import device
from flipscale.engines.launch import Launch
from flipscale.start import setup
from flipscale.start.complete_recipe import parse_recipe

CPU, GPU = torch.device("cpu"), torch.device("cuda", 3)


def compiled(
    monkeypatch: pytest.MonkeyPatch, *flags: str, engine: str = "ddp", works: bool = True
) -> tuple[bool, bool]:
    """Whether blocks are compiled on a CPU and on a GPU."""
    monkeypatch.setattr(setup, "can_compile", lambda place: works)
    recipe, launch = parse_recipe(["--data.shards=none", *flags]), Launch(engine, 8, "bf16")
    return setup.compiles(recipe, launch, CPU), setup.compiles(recipe, launch, GPU)


def test_gpus_compile_and_cpus_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled(monkeypatch) == (False, True)
    assert compiled(monkeypatch, engine="fsdp2") == (False, True)
    assert compiled(monkeypatch, engine="zero3") == (False, False)
    assert compiled(monkeypatch, works=False) == (False, False)
    assert compiled(monkeypatch, "--model.compile=true", works=False) == (True, True)
    assert compiled(monkeypatch, "--model.compile=false") == (False, False)
    assert compiled(monkeypatch, "--model.family=clip") == (False, True)


def test_a_node_without_a_compiler_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(torch, "compile", fail)
    device.can_compile.cache_clear()
    try:
        for rank in ("0", "1"):
            monkeypatch.setenv("LOCAL_RANK", rank)
            assert not device.can_compile(CPU)
            assert not device.can_compile(CPU)
            device.can_compile.cache_clear()
    finally:
        device.can_compile.cache_clear()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "Failed to find C compiler. Please specify one" in line
    assert "model.compile" in line
