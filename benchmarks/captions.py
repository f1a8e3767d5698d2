"""Measure a training step of family `clip` with packed and with padded captions in turn, at equal losses.

    python benchmarks/captions.py --tokens 64 --image_size 224 --mask_ratio 0.9

Captions have 8 to 64 tokens, each length as often. The time of packing them is part of the packed step. Times are CPU
seconds of this process, which other programs disturb less. With `--shards`, it only counts the tokens of real captions:

    python benchmarks/captions.py --shards data/demo/train --tokenizer data/demo/tokenizer --tokens 32 --batch_size 512
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.step_times import timed, training_step
from flipscale.data.captions import pack_captions, tokenise_captions
from flipscale.data.sources.opening import open_shards
from flipscale.data.tokenizers import load_tokenizer
from flipscale.engines.device import best_attention
from flipscale.model.families import config_class
from flipscale.model.patches import keep_lowest, num_kept
from flipscale.objectives.contrastive import contrastive_loss
from flipscale.preparation.inspection import read_captions

SHORTEST, LONGEST = 8, 64
END = 3
VOCABULARY = 49_408


def captions(count: int, tokens: int) -> dict[str, torch.Tensor]:
    """Return random captions padded to `tokens`."""
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count, 1))
    mask = torch.arange(tokens) < lengths
    ids = torch.randint(END + 1, VOCABULARY, (count, tokens)) * mask
    return {"input_ids": ids.scatter(1, lengths - 1, END), "attention_mask": mask.long()}


def images(vision: Any, count: int, mask_ratio: float) -> dict[str, torch.Tensor]:
    """Return random images in the loader's format."""
    side, kept = vision.patches_along(), num_kept(vision.num_patches, mask_ratio)
    patches = torch.randint(0, 256, (count, kept, 3 * vision.patch_size**2), dtype=torch.uint8)
    return {"patches": patches, "patch_index": keep_lowest(torch.rand(count, side, side), kept)[:, 0]}


def compare(
    config: Any, batch_size: int = 64, mask_ratio: float = 0.75, num_steps: int = 5, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Return the medians of both steps, their ratio, the rows of a packed batch, and the difference of the losses."""
    torch.manual_seed(0)
    model = config.trained_class(config).train()
    model.set_attn_implementation(best_attention(torch.device("cpu"), dtype))
    tokens = captions(batch_size, config.text_config.max_position_embeddings)
    batch = images(config.vision_config, batch_size, mask_ratio)

    def loss_of(columns: Callable[[], dict[str, torch.Tensor]]) -> Callable[[], torch.Tensor]:
        def loss() -> torch.Tensor:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                output = model(**batch, **columns(), return_logits=False)
            return contrastive_loss(output.image_embeds, output.text_embeds, output.logit_scale)

        return loss

    losses = {"padded": loss_of(lambda: tokens), "packed": loss_of(lambda: pack_captions(tokens))}
    with torch.no_grad():
        padded, packed = (loss().item() for loss in losses.values())
    steps = {name: training_step(model, loss) for name, loss in losses.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-1, num_steps):
        for name, step in steps.items():
            _, cpu = timed(step, torch.device("cpu"))
            if turn >= 0:
                seconds[name].append(cpu)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        **{f"{name}_s": seconds for name, seconds in medians.items()},
        "ratio": medians["padded"] / medians["packed"],
        "rows": len(pack_captions(tokens)["input_ids"]),
        "batch_size": batch_size,
        "loss_difference": abs(packed - padded),
    }


def count(shards: str, tokenizer_name: str, tokens: int, batch_size: int) -> dict[str, float]:
    """Return what the text tower computes for captions of a source, padded to `tokens` and packed by batches."""
    tokenizer = load_tokenizer(tokenizer_name, tokens)
    found = read_captions(open_shards(shards))
    words = padded = packed = 0
    for batch in np.array_split(np.random.default_rng(0).permutation(found), max(len(found) // batch_size, 1)):
        columns = tokenise_captions(tokenizer, batch.tolist(), tokens)
        words += int(columns["attention_mask"].sum())
        padded += columns["input_ids"].numel()
        packed += pack_captions(columns)["input_ids"].numel()
    in_each = {"tokens": words, "padded": padded, "packed": packed}
    return {"captions": len(found), **{name: number / len(found) for name, number in in_each.items()}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a JSON object with the figures of `compare`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="s16", help="The model, as model.size of family clip.")
    parser.add_argument("--image_size", type=int, default=224, help="Pixels along each side.")
    parser.add_argument("--tokens", type=int, default=77, help="Tokens of a padded caption; to time them, at least 64.")
    parser.add_argument("--shards", help="Count the captions of these shards, and time nothing.")
    parser.add_argument("--tokenizer", default="bert", help="Their tokenizer, as data.tokenizer.")
    parser.add_argument("--mask_ratio", type=float, default=0.75, help="Share of the patches that is removed.")
    parser.add_argument("--batch_size", type=int, default=64, help="Pairs of a step.")
    parser.add_argument("--num_steps", type=int, default=5, help="Timed steps of each kind.")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="Precision of the products.")
    args = parser.parse_args(arguments)
    if args.shards:
        print(json.dumps(count(args.shards, args.tokenizer, args.tokens, args.batch_size)))
        return
    text = {"max_position_embeddings": args.tokens, "vocab_size": VOCABULARY, "eos_token_id": END, "bos_token_id": None}
    config = config_class("clip").from_size(args.size, {"image_size": args.image_size}, text)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    print(json.dumps(compare(config, args.batch_size, args.mask_ratio, args.num_steps, dtype)))


if __name__ == "__main__":
    main()
