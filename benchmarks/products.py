"""Train with products or kernels that the trainer does not have, and compare speed and losses with its own.

    accelerate launch --config_file ds_configs/ddp.yaml benchmarks/products.py train bf16 --output_dir runs/bf16 \\
        --config b16_laion400m
    accelerate launch --config_file ds_configs/ddp.yaml benchmarks/products.py train fp8 --output_dir runs/fp8 \\
        --config b16_laion400m
    python benchmarks/products.py compare runs/bf16 runs/fp8

`fp8` takes the products of the blocks' linear layers in fp8, by torchao. GPUs before sm_89 and CPUs round to fp8, and
multiply in bf16. `max-autotune-no-cudagraphs` is torch.compile's mode of this name.
"""

import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

sys.path.insert(0, str(Path(__file__).parents[1]))
from flipscale import pretrain
from flipscale.engines import first_weights
from flipscale.io.errors import UserError
from flipscale.io.json_lines import read_metrics
from flipscale.process.console import report_user_errors

_compile_blocks = first_weights.compile_blocks
_SHOWN = 10


def compile_in_fp8(model: nn.Module, packs_captions: bool = False) -> None:
    """Compile the blocks, with the products of their linear layers in fp8 where both sizes divide by 16."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # fp8 products came with sm_89.
    emulates = not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9)
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            convert_to_float8_training(
                block,
                module_filter_fn=lambda layer, _: layer.in_features % 16 == layer.out_features % 16 == 0,
                config=Float8LinearConfig(emulate=emulates),
            )
    _compile_blocks(model, packs_captions)


def compile_tuned(model: nn.Module, packs_captions: bool = False) -> None:
    """Compile the blocks in the mode `max-autotune-no-cudagraphs`."""
    for name, value in torch._inductor.list_mode_options("max-autotune-no-cudagraphs").items():
        setattr(torch._inductor.config, name, value)
    _compile_blocks(model, packs_captions)


WAYS = {"bf16": _compile_blocks, "fp8": compile_in_fp8, "max-autotune-no-cudagraphs": compile_tuned}
USAGE = f"{__doc__}\nways: {', '.join(WAYS)}"


@contextmanager
def compiling(way: str) -> Iterator[None]:
    """Let the trainer compile its blocks in another way."""
    with patch.object(first_weights, "compile_blocks", WAYS[way]):
        yield


def compare(folders: Sequence[Path]) -> Iterator[str]:
    """Yield a table of runs: pairs per second, ten losses at equal numbers of samples, and their largest distance from
    the losses of the first run, which are all compared."""
    runs = {folder: [record for record in read_metrics(folder) if "loss" in record] for folder in folders}
    losses = {
        folder: {record["samples_seen"]: record["loss"] for record in records} for folder, records in runs.items()
    }
    common = sorted(set.intersection(*map(set, losses.values())))
    if not common:
        raise UserError(f"{', '.join(map(str, folders))} have no loss of equal samples. Fix: train them by one recipe")
    shown = common[:: -(len(common) // _SHOWN or 1)][_SHOWN - 1 :: -1]
    yield f"| run | pairs/s | largest distance | {' | '.join(f'{samples:,}' for samples in shown)} |"
    yield "|---" + "|---:" * (2 + len(shown)) + "|"
    base = losses[folders[0]]
    for folder, own in losses.items():
        rates = [record["images_per_s"] for record in runs[folder] if "images_per_s" in record]
        apart = max(abs(own[samples] - base[samples]) for samples in common)
        cells = [f"{own[samples]:.4f}" for samples in shown]
        yield f"| {folder.name} | {statistics.median(rates):,.0f} | {apart:.4f} | {' | '.join(cells)} |"


def main(arguments: Sequence[str]) -> None:
    match arguments:
        case "train", way, *others if way in WAYS:
            with compiling(way):
                pretrain.main(["--model.compile=true", *others])
        case "compare", *folders if folders:
            with report_user_errors():
                print(*compare([Path(folder) for folder in folders]), sep="\n")
        case ["--help"]:
            print(USAGE)
            sys.exit()
        case _:
            sys.exit(USAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
