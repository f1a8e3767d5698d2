"""Compiled blocks for GPUs, and the package's calls of CUDA, checked without a GPU."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated.inductor import without_accelerator

import flipscale
from flipscale.process import slow_steps

with_cuda = pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch with CUDA, but no GPU: `make cuda`")
ATTENTION = "_scaled_dot_product_flash_attention"


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("size", "mask_ratio", "capability", "tokens", "recomputes"),
    [
        ("b16", 0.75, 90, 50, False),
        ("b16", 0.75, 90, 50, True),
        pytest.param("b16", 0.5, 90, 99, False, marks=with_cuda),
        pytest.param("b16", 0.0, 90, 197, False, marks=with_cuda),
        pytest.param("l16", 0.75, 90, 50, False, marks=with_cuda),
        pytest.param("l16", 0.5, 90, 99, False, marks=with_cuda),
        pytest.param("l16", 0.0, 90, 197, False, marks=with_cuda),
        pytest.param("h14", 0.75, 90, 65, False, marks=with_cuda),
        *(pytest.param("l16", 0.5, capability, 99, False, marks=with_cuda) for capability in (80, 100)),
        # As h14_laion2b trains: its masked stage keeps activations, its unmasked one recomputes them.
        *(("h14", 0.5, capability, 129, False) for capability in (80, 90, 100)),
        *(("h14", 0.0, capability, 257, True) for capability in (80, 90, 100)),
    ],
)
def test_compiled_blocks_are_assembled(
    size: str,
    mask_ratio: float,
    capability: int,
    tokens: int,
    recomputes: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [sys.executable, "-m", "simulated.inductor", size, str(mask_ratio), str(capability)]
    command += ["recompute"] * recomputes
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    path = os.pathsep.join([str(Path(flipscale.__file__).parents[1]), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, **caches, **without_accelerator(tmp_path)}
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    graphs: list[dict[str, Any]] = json.loads(made.stdout.splitlines()[-1])
    # The text tower's block and the image tower's, each in one piece.
    assert [graph["backward"] for graph in graphs] == [False, True] * 2
    assert [graph["tokens"][:2] for graph in graphs[::2]] == [[256, 32], [256, tokens]]
    for graph in graphs:
        programs = graph.pop("programs")
        registers = max(program["registers"] for program in programs)
        with capsys.disabled():
            print(f"\n{size} {mask_ratio} sm_{capability} {graph}: {len(programs)} programs, {registers} registers")
        # Attention and matrix products are all that Inductor leaves to torch. The backward graph recomputes.
        attention = "graphsafe_run_with_rng_state" if recomputes else ATTENTION
        again = recomputes and graph["backward"]
        backward = [f"{ATTENTION}_backward"] * graph["backward"]
        assert graph["others"] == sorted([*backward, *[attention] * (again or not graph["backward"])])
        assert graph["products"] <= (12 if graph["backward"] else 6) + 6 * again
        assert not [program for program in programs if program["stack"]]


def calls_of_cuda() -> Iterator[tuple[str, ast.Call]]:
    """Yield the package's calls of what is only in a torch with CUDA, by their dotted names."""
    for file in sorted(Path(flipscale.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and re.match(r"torch\.(cuda|backends\.cuda)\.", ast.unparse(node.func)):
                yield f"{file.name}:{node.lineno}", node


def test_cuda_has_every_call_with_these_arguments() -> None:
    calls = list(calls_of_cuda())
    assert len(calls) > 30
    for place, call in calls:
        called = eval(ast.unparse(call.func), {"torch": torch})
        named = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
        try:
            inspect.signature(called).bind(*call.args, **named)
        except TypeError as error:
            pytest.fail(f"{place}: {ast.unparse(call)}: {error}")


@with_cuda
def test_the_recorders_of_collectives_and_the_question_for_contexts_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("fr", "nccl"):
        assert "version" in json.loads(getattr(torch._C._distributed_c10d, f"_dump_{backend}_trace_json")())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert slow_steps.recorded_collectives() == []
    assert callable(torch._C._cuda_hasPrimaryContext)
    assert {"uuid", "total_memory"} <= set(dir(torch._C._CudaDeviceProperties))
