"""Measure our training step and open_clip's in turn, masked and unmasked, in bf16 and fp32.

    python benchmarks/step.py --size b16 --batch_size 32

With `--compile`, the blocks of both are compiled, each by itself. On GPUs, `gpu_step.py` measures more.
"""

import gc
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.gpu_step import MASK_RATIOS
from benchmarks.open_clip_step import open_clip_step
from benchmarks.step_times import DTYPES, Figures, StepSetting, flip_step, matmul_peak, step_figures, time_in_turn
from flipscale.engines.device import keep_freed_memory
from flipscale.io.command_line import parse_command
from flipscale.io.options import Count, Pairs, Threads
from flipscale.model import FlipConfig


def compare_steps(setting: StepSetting) -> Iterator[Figures]:
    """Yield our figures with `open_clip_images_per_s` and `ratio` for each precision and mask ratio."""
    for dtype in ("bf16", "fp32"):
        peak = matmul_peak(setting.device, dtype)
        for mask_ratio in MASK_RATIOS:
            case = replace(setting, dtype=dtype, mask_ratio=mask_ratio)
            bf16 = dtype == "bf16"
            way = "blocks" if case.compile else None
            theirs = open_clip_step(case.config, None, case.batch_size, mask_ratio, case.device, bf16, way)
            steps = {"flipscale": flip_step(case), "open_clip": theirs}
            times = time_in_turn(steps, case.num_steps, case.device)
            # Free the models, because the next pair needs their memory.
            del steps, theirs
            gc.collect()
            ours, peer = step_figures(case, times["flipscale"], peak), step_figures(case, times["open_clip"], peak)
            yield {
                **ours,
                "open_clip_images_per_s": peer["images_per_s"],
                "open_clip_median_s": peer["median_s"],
                "open_clip_share_of_matmul_peak": peer["share_of_matmul_peak"],
                "ratio": times["open_clip"].median_s / times["flipscale"].median_s,
            }


@dataclass(frozen=True, kw_only=True)
class CompareSteps:
    """Measure the training step beside open_clip's.

    Args:
        size: Model size.
        batch_size: Pairs in a step.
        compile: Compile the blocks.
        steps: Timed steps, after two untimed steps.
        threads: CPU threads. Default: all.
        json: Print JSON lines instead of a table.
    """

    size: Literal["b16", "l16", "l14", "h14", "g14"] = "b16"
    batch_size: Pairs = 32
    compile: bool = False
    steps: Count = 5
    threads: Threads | None = None
    json: bool = False

    def setting(self) -> StepSetting:
        """Return the setting of the step, on a GPU if possible. Set the number of CPU threads."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            keep_freed_memory()
        config, dtype = FlipConfig.from_size(self.size), next(iter(DTYPES))
        return StepSetting(config, self.size, 0.0, self.batch_size, dtype, self.compile, device, self.steps)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a JSON line or a table row for each case, as soon as it is measured."""
    args = parse_command(CompareSteps, arguments)
    setting = args.setting()
    if not args.json:
        print(f"{setting.size}, batch {setting.batch_size}, {setting.device.type}, {torch.get_num_threads()} threads")
        print("| dtype | mask | flipscale, images/s | open_clip, images/s | ratio | of matmul peak | CPU share |")
        print("|---|---|---|---|---|---|---|")
    for row in compare_steps(setting):
        line = (
            "| {dtype} | {mask_ratio:.0%} | {images_per_s:.1f} | {open_clip_images_per_s:.1f} | {ratio:.2f} | "
            "{share_of_matmul_peak:.0%} and {open_clip_share_of_matmul_peak:.0%} | {cpu_share:.2f} |"
        )
        print(json.dumps(row) if args.json else line.format(**row), flush=True)


if __name__ == "__main__":
    main()
