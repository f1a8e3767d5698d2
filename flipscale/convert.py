"""Convert models from and for other programs: `flipscale convert flip SRC DST --size l16`."""

import argparse
from pathlib import Path

from flipscale.io.options import Count, number, output_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `flipscale convert`."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)

    def add(kind: str, summary: str) -> argparse.ArgumentParser:
        return kinds.add_parser(kind, help=summary, description=summary)

    flip = add("flip", "Convert a checkpoint of the original JAX FLIP to a model folder.")
    flip.add_argument("src", help="The folder checkpoint_N, or a folder or zip file that contains it.")
    flip.add_argument("dst", type=output_folder, help="The model folder to write.")
    flip.add_argument("--size", help="Model size: b16, l16 or h14. The number of attention heads follows from it.")
    flip.add_argument("--image_heads", type=number(Count), help="Attention heads of the image tower, without --size.")
    flip.add_argument("--text_heads", type=number(Count), help="Attention heads of the text tower, without --size.")
    flip.add_argument(
        "--tokenizer",
        help="The original's vocabulary: a BERT vocab.txt, or a folder or Hub name with this file. Default with "
        "--size: google-bert/bert-base-uncased.",
    )
    flip.set_defaults(convert=_from_flip)
    open_clip = add("open_clip", "Convert a model of the family flip or clip for open_clip, with equal embeddings.")
    open_clip.add_argument("src", help="A run, such as runs/l16, a model folder, or a Hub name.")
    open_clip.add_argument(
        "dst", type=output_folder, help="The folder to write; open_clip.create_model('local-dir:DST') loads it."
    )
    open_clip.set_defaults(convert=_to_open_clip)
    transformers = add("transformers", "Convert a model of open_clip to one of transformers: CLIPModel or SiglipModel.")
    transformers.add_argument(
        "src",
        help="A model: open_clip:NAME,PRETRAINED, open_clip:hf-hub:ORG/NAME or local-dir:FOLDER. A checkpoint is its "
        "configuration and its file: open_clip:CONFIG.json,FILE.pt.",
    )
    transformers.add_argument("dst", type=output_folder, help="The folder to write; model.init_from takes it.")
    transformers.set_defaults(convert=_to_transformers)
    onnx = add("onnx", "Write one ONNX file per tower, and check in onnxruntime that outputs equal the model's.")
    onnx.add_argument("src", help="A run, such as runs/l16, a model folder, or a Hub name.")
    onnx.add_argument("dst", type=output_folder, help="The folder to write.")
    onnx.set_defaults(convert=_to_onnx)


def run(args: argparse.Namespace) -> None:
    """Convert a model and print a summary."""
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


def _to_transformers(args: argparse.Namespace) -> None:
    from flipscale.hub.convert_transformers import convert_from_open_clip

    for part, difference in convert_from_open_clip(args.src.removeprefix("open_clip:"), args.dst).items():
        print(f"{args.dst}: embeddings of {part} within {difference:.1g} of open_clip's")


def _to_onnx(args: argparse.Namespace) -> None:
    from flipscale.hub.convert_onnx import convert_to_onnx

    for file, difference in convert_to_onnx(args.src, args.dst).items():
        print(f"{args.dst}/{file}: embeddings within {difference:.1g} of the model's")
