"""A model folder from a checkpoint of another program: `flipscale convert flip SRC DST --size l16`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `flipscale convert`."""
    parser.add_argument("kind", choices=["flip"], help="what SRC is: flip, a checkpoint of the original JAX FLIP")
    parser.add_argument("src", help="the checkpoint_N folder, a folder or a zip that holds it")
    parser.add_argument("dst", help="the model folder to write")
    parser.add_argument("--size", help="b16, l16 or h14, which tells the attention heads; refused if the shapes differ")
    parser.add_argument("--image_heads", type=int, help="attention heads of the image tower, in place of --size")
    parser.add_argument("--text_heads", type=int, help="attention heads of the text tower, in place of --size")
    parser.add_argument(
        "--tokenizer",
        help="source of the original's tokenizer: a BERT vocab.txt, a folder that has one, or a model on the Hub "
        "that has one; with --size it is google-bert/bert-base-uncased unless named",
    )


def run(args: argparse.Namespace) -> None:
    """Converts and prints what was written."""
    from flipscale.data.tokenizers import bert_tokenizer
    from flipscale.hub.convert_flip import convert_flip_checkpoint

    # Made first: a vocabulary that cannot be read is told before minutes of conversion.
    tokenizer = bert_tokenizer(args.tokenizer) if args.tokenizer else None
    model = convert_flip_checkpoint(args.src, args.dst, args.size, args.image_heads, args.text_heads, tokenizer)
    vision, text = model.config.vision_config, model.config.text_config
    print(
        f"{args.dst}: {model.num_parameters() / 1e6:.1f} M parameters, {vision.image_size} px in patches of "
        f"{vision.patch_size}, captions of {text.max_position_embeddings} ids, "
        f"{'with' if (Path(args.dst) / 'processor_config.json').is_file() else 'without (see --tokenizer)'} a processor"
    )
