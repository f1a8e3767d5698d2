"""Measure the speed and memory of a training step on this machine, or check a node of GPUs."""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flipscale.io.atomic import write_text
from flipscale.io.errors import UserError
from flipscale.io.options import Count, Pairs, ShareBelowOne, Threads

if TYPE_CHECKING:
    from flipscale.planning.bench_step import StepSetting


@dataclass(frozen=True, kw_only=True)
class BenchStep:
    """Measure a training step: images/s, memory, and the fraction of the device's matmul peak.

    Args:
        size: Model size.
        batch_size: Pairs in a step.
        mask_ratio: Share of patches removed.
        dtype: Precision of products.
        compile: Compile the blocks, as a recipe's model.compile does.
        steps: Timed steps, after two untimed steps.
        threads: CPU threads. Default: all.
        json: Print JSON lines instead of text.
    """

    size: Literal["b16", "l16", "l14", "h14", "g14"] = "b16"
    batch_size: Pairs = 32
    mask_ratio: ShareBelowOne = 0.75
    dtype: Literal["bf16", "fp32"] = "bf16"
    compile: bool = False
    steps: Count = 10
    threads: Threads | None = None
    json: bool = False

    def run(self) -> None:
        """Print the figures of a training step, as a JSON line or one figure a line."""
        from flipscale.planning.bench_step import measure_step

        figures = {"code": "flipscale", **measure_step(self.setting())}
        print(json.dumps(figures) if self.json else as_text(figures))

    def setting(self) -> "StepSetting":
        """Return the setting of the step, on a GPU if possible. Set the number of CPU threads."""
        import torch

        from flipscale.engines.device import keep_freed_memory
        from flipscale.model import FlipConfig
        from flipscale.planning.bench_step import StepSetting

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            keep_freed_memory()
        config = FlipConfig.from_size(self.size)
        return StepSetting(
            config, self.size, self.mask_ratio, self.batch_size, self.dtype, self.compile, device, self.steps
        )


@dataclass(frozen=True, kw_only=True)
class BenchGpu:
    """Check the GPUs of this node and measure the training step on them, on made-up data. Under srun, torchrun or
    `accelerate launch`, every node does so; then all check the network together.

    Args:
        recipes: Recipes whose first stage is measured: files, or names of the package.
        batch_size: Pairs of a GPU.
        shards: Shards for the loader. Default: made-up pictures of 500 x 400.
        output: File of all figures.
        json: Print the figures as JSON instead of the report.
    """

    recipes: list[str] = field(default_factory=lambda: ["l16_laion400m", "h14_laion2b"])
    batch_size: Pairs = 256
    shards: str | None = None
    output: Path = Path("gpu.json")
    json: bool = False

    def run(self) -> None:
        """Run all checks and write their figures. A node's first process does so for all, and the first node prints."""
        from flipscale.checks.bench import as_json, check_nodes, report, run_checks
        from flipscale.checks.node import Bench
        from flipscale.checks.nodes import meet
        from flipscale.engines.launch import whole_number
        from flipscale.runs.complete_recipe import parse_recipe

        if any(whole_number(os.environ, name, 0) for name in ("LOCAL_RANK", "SLURM_LOCALID")):
            return
        import torch

        num_gpus = whole_number(os.environ, "LOCAL_WORLD_SIZE", torch.cuda.device_count())
        if not 0 < num_gpus <= torch.cuda.device_count():
            raise UserError(
                f"torch {torch.__version__} sees {torch.cuda.device_count()} GPUs, and bench gpu needs "
                f"{max(num_gpus, 1)}. Fix: see what `nvidia-smi` prints, and install torch for CUDA"
            )
        for recipe in self.recipes:
            parse_recipe(["--config", recipe])  # refuses an unknown recipe before all checks
        nodes = meet(os.environ)
        if len(set(counts := nodes.gather(num_gpus))) > 1:
            raise UserError(f"{', '.join(nodes.hosts)} have {counts} GPUs; expected equal numbers. Fix: leave one out")
        several = len(nodes.hosts) > 1
        place = self.output.resolve().parent if several else None  # which all nodes see
        shared = Path(nodes.gather("" if nodes.index else tempfile.mkdtemp(prefix="flipscale-bench-", dir=place))[0])
        (own := shared / f"node-{nodes.index}").mkdir()
        benches = [Bench(num_gpus, own, self.recipes, self.batch_size, self.shards)]

        def announce(line: str) -> None:
            if nodes.index == 0:
                print(line, file=sys.stderr, flush=True)

        run_checks(benches[0], announce)
        if several:
            benches.append(check_nodes(benches[0], nodes, shared, announce))
        if nodes.index:
            return
        if any(one.status == "FAILED" for bench in benches for one in bench.findings):
            print(f"the output of all processes is in {shared}", file=sys.stderr)
        else:
            shutil.rmtree(shared)
        text = json.dumps(as_json(benches[0]) | ({"all_nodes": as_json(benches[1])} if several else {}))
        print(text if self.json else "\n".join(map(report, reversed(benches))))
        write_text(self.output, f"{text}\n")


COMMANDS = {"step": BenchStep, "gpu": BenchGpu}


def as_text(figures: dict[str, str | int | float | bool]) -> str:
    """Return figures as text, one a line."""
    width = max(24, *(len(name) + 2 for name in figures))
    return "\n".join(f"{name:<{width}}{_readable(value)}" for name, value in figures.items())


def _readable(value: str | int | float | bool) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1e6 else f"{value:.3e}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
