"""Zero-shot classification and retrieval of a model folder or Hub name."""

import argparse
import json

from accelerate import Accelerator

from flipscale.engines.attention import best_attention
from flipscale.engines.launch import start_accelerator
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.open_clip import PREFIX, open_clip_embedder
from flipscale.evaluation.suite import run_suite
from flipscale.evaluation.templates import TEMPLATES
from flipscale.hub.loading import load_flip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `flipscale evaluate` takes."""
    parser.add_argument(
        "model",
        help="a model folder, such as runs/demo/model, or a Hub name; or one of open_clip's, open_clip:NAME,PRETRAINED",
    )
    parser.add_argument("--zero_shot", metavar="DIR", help="classification shards (KEY.cls) with classnames.txt")
    parser.add_argument("--retrieval", metavar="DIR", help="image-caption shards (KEY.txt)")
    parser.add_argument("--templates", choices=sorted(TEMPLATES), help="CLIP's prompts in place of the folder's own")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--json", action="store_true", help="one JSON line instead of a table")


def run(args: argparse.Namespace) -> None:
    """Prints the metrics asked for.

    Raises:
        ValueError: nothing to evaluate, or a model that cannot be loaded.
    """
    if not (args.zero_shot or args.retrieval):
        raise ValueError("nothing to evaluate; give --zero_shot DIR, --retrieval DIR or both")
    accelerator = start_accelerator([], ".")
    metrics = run_suite(
        _embedder(args.model, accelerator, args.batch_size), args.zero_shot, args.retrieval, args.templates
    )
    if accelerator.is_main_process:
        if args.json:
            print(json.dumps(metrics))
        else:
            print("\n".join(f"{name:<32}{value:8.2f} %" for name, value in metrics.items()))
    accelerator.end_training()


def _embedder(name: str, accelerator: Accelerator, batch_size: int) -> Embedder:
    if name.startswith(PREFIX):
        return open_clip_embedder(name.removeprefix(PREFIX), accelerator, batch_size)
    model, tokenizer = load_flip(name)
    model.set_attn_implementation(best_attention(accelerator.device))
    return Embedder(model.to(accelerator.device), tokenizer, accelerator, batch_size)
