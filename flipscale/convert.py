"""Convert models from and for other programs: `flipscale convert flip SRC DST --size l16`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `flipscale convert`."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    flip = kinds.add_parser("flip", help="a checkpoint of the original JAX FLIP to a model folder")
    flip.add_argument("src", help="the checkpoint_N folder, a folder or a zip that holds it")
    flip.add_argument("dst", help="the model folder to write")
    flip.add_argument("--size", help="b16, l16 or h14, which tells the attention heads; refused if the shapes differ")
    flip.add_argument("--image_heads", type=int, help="attention heads of the image tower, in place of --size")
    flip.add_argument("--text_heads", type=int, help="attention heads of the text tower, in place of --size")
    flip.add_argument(
        "--tokenizer",
        help="source of the original's tokenizer: a BERT vocab.txt, a folder that has one, or a model on the Hub that "
        "has one; with --size it is google-bert/bert-base-uncased unless named",
    )
    flip.set_defaults(convert=_from_flip)
    open_clip = kinds.add_parser("open_clip", help="a model folder to one that open_clip loads, with equal embeddings")
    open_clip.add_argument("src", help="a model folder, such as runs/demo/model, or a Hub name")
    open_clip.add_argument("dst", help="the folder to write, for open_clip.create_model('local-dir:DST')")
    open_clip.set_defaults(convert=_to_open_clip)
    onnx = kinds.add_parser("onnx", help="a model folder to ONNX, one file a tower, checked with onnxruntime")
    onnx.add_argument("src", help="a model folder, such as runs/demo/model, or a Hub name")
    onnx.add_argument("dst", help="the folder to write")
    onnx.set_defaults(convert=_to_onnx)


def run(args: argparse.Namespace) -> None:
    """Convert a model and print what was written."""
    args.convert(args)


def _from_flip(args: argparse.Namespace) -> None:
    from flipscale.data.tokenizers import bert_tokenizer
    from flipscale.hub.convert_flip import convert_flip_checkpoint

    # Loaded first, so that an unreadable vocabulary is reported before minutes of conversion.
    tokenizer = bert_tokenizer(args.tokenizer) if args.tokenizer else None
    model = convert_flip_checkpoint(args.src, args.dst, args.size, args.image_heads, args.text_heads, tokenizer)
    vision, text = model.config.vision_config, model.config.text_config
    has_processor = (Path(args.dst) / "processor_config.json").is_file()
    print(
        f"{args.dst}: {model.num_parameters() / 1e6:.1f} M parameters, {vision.image_size} px in patches of "
        f"{vision.patch_size}, captions of {text.max_position_embeddings} ids, "
        f"{'with' if has_processor else 'without (see --tokenizer)'} a processor"
    )


def _to_open_clip(args: argparse.Namespace) -> None:
    from flipscale.hub.convert_open_clip import convert_to_open_clip

    model = convert_to_open_clip(args.src, args.dst)
    print(
        f"{args.dst}: {model.num_parameters() / 1e6:.1f} M parameters; open_clip.create_model_and_transforms"
        f"('local-dir:{args.dst}') and get_tokenizer of the same name load it"
    )


def _to_onnx(args: argparse.Namespace) -> None:
    from flipscale.hub.convert_onnx import convert_to_onnx

    for name, difference in convert_to_onnx(args.src, args.dst).items():
        print(f"{args.dst}/{name}_model.onnx: embeddings within {difference:.1g} of the model's")
