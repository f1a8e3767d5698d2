"""Check a node of GPUs, or several, and measure the training step on them."""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from flipscale.io.atomic import write_text
from flipscale.io.command_line import OTHERS
from flipscale.io.errors import UserError
from flipscale.io.options import Pairs


@dataclass(frozen=True, kw_only=True)
class BenchGpu:
    """Check the GPUs of this node and measure the training step on them, on made-up data. Under srun,
    torchrun or `accelerate launch`, every node does so; then all check the network together.

    All other options are those of `flipscale pretrain`, and change the recipes.

    Args:
        config: Recipes whose first stage is measured: files, or names of the package. Default: l16_laion400m and
            h14_laion2b.
        batch_size: Pairs of a GPU.
        shards: Shards for the loader. Default: made-up pictures of 500 x 400.
        quick: Check only, with ten steps of one start; without the trainer's loader.
        output: File of all figures. report.md is written next to it.
        fields: A recipe's flags.
    """

    config: list[str] = field(default_factory=list)
    batch_size: Pairs = 256
    shards: str | None = None
    quick: bool = False
    output: Path = Path("gpu.json")
    fields: list[str] = field(default_factory=list, metadata=OTHERS)

    def run(self) -> None:
        """Run all checks of the recipes with changed `fields`, and write the figures. A node's first process does so
        for all, and the first node prints."""
        from flipscale.checks.node import Bench
        from flipscale.checks.nodes import meet
        from flipscale.checks.report import PROFILE, as_json, check_nodes, findings_block, run_checks, write_report
        from flipscale.process.world import whole_number
        from flipscale.recipe.recipe import to_yaml
        from flipscale.start.complete_recipe import parse_recipe

        if any(whole_number(os.environ, name, 0) for name in ("LOCAL_RANK", "SLURM_LOCALID")):
            return
        import torch

        num_gpus = whole_number(os.environ, "LOCAL_WORLD_SIZE", torch.cuda.device_count())
        if not 0 < num_gpus <= torch.cuda.device_count():
            raise UserError(
                f"torch {torch.__version__} sees {torch.cuda.device_count()} GPUs, and bench gpu needs "
                f"{max(num_gpus, 1)}. Fix: see what `nvidia-smi` prints, and install torch for CUDA"
            )
        recipes = self.config or ["l16_laion400m", "h14_laion2b"]
        trained = self.config or ["b16_laion400m", "l16_laion400m"]
        names = [Path(name).stem for name in self.config]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"config has {twice[0]} twice; rows are named by the file. Fix: rename one")
        # Refuses an unknown recipe or field before all checks.
        texts = {name: to_yaml(parse_recipe(["--config", name, *self.fields])) for name in (*recipes, *trained)}
        nodes = meet(os.environ)
        if len(set(counts := nodes.gather(num_gpus))) > 1:
            raise UserError(f"{', '.join(nodes.hosts)} have {counts} GPUs; expected equal numbers. Fix: leave one out")
        several = len(nodes.hosts) > 1
        place = self.output.resolve().parent if several else None  # which all nodes see
        shared = Path(nodes.gather("" if nodes.index else tempfile.mkdtemp(prefix="flipscale-bench-", dir=place))[0])
        (own := shared / f"node-{nodes.index}").mkdir()
        if self.fields:
            for name, text in texts.items():
                write_text(own / f"{Path(name).stem}.yaml", text)
            recipes, trained = ([f"{own / Path(name).stem}.yaml" for name in one] for one in (recipes, trained))
        extent = (1, 10) if self.quick else (3, 50)
        benches = [Bench(num_gpus, own, recipes, self.batch_size, () if self.quick else trained, self.shards, *extent)]

        def announce(line: str) -> None:
            if nodes.index:
                return
            print(line, file=sys.stderr, flush=True)
            figures = as_json(benches[0])
            if len(benches) > 1:
                figures["all_nodes"] = as_json(benches[1])
            write_text(self.output, f"{json.dumps(figures)}\n")  # a job may end at any check
            write_report(benches, self.output.with_name("report.md"))

        run_checks(benches[0], announce)
        if several:
            check_nodes(benches, nodes, shared, announce)
        if nodes.index:
            return
        print("\n".join([*map(findings_block, reversed(benches)), PROFILE]))
        if any(one.status == "FAILED" for bench in benches for one in bench.findings):
            print(f"the output of all processes is in {shared}", file=sys.stderr)
        else:
            shutil.rmtree(shared)


COMMANDS = {"gpu": BenchGpu}
