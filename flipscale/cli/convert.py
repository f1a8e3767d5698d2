"""Convert models from and for other programs: `flipscale convert flip SRC DST --size l16`."""

from dataclasses import KW_ONLY, dataclass

from flipscale.io.command_line import OutputFolder
from flipscale.io.options import Count


@dataclass(frozen=True)
class FromFlip:
    """Convert a checkpoint of the original JAX FLIP to a model folder.

    Args:
        src: The folder checkpoint_N, or a folder or zip file that contains it.
        dst: The model folder to write.
        size: Model size: b16, l16 or h14. The number of attention heads follows from it.
        image_heads: Attention heads of the image tower, without --size.
        text_heads: Attention heads of the text tower, without --size.
        tokenizer: The original's vocabulary: a BERT vocab.txt, or a folder or Hub name with this file. Default with
            --size: google-bert/bert-base-uncased.
    """

    src: str
    dst: OutputFolder
    _: KW_ONLY
    size: str | None = None
    image_heads: Count | None = None
    text_heads: Count | None = None
    tokenizer: str | None = None

    def run(self) -> None:
        from flipscale.data.tokenizers import bert_tokenizer
        from flipscale.hub.convert_flip import convert_flip_checkpoint

        # Loaded first, so that an unreadable vocabulary is reported before minutes of conversion.
        tokenizer = bert_tokenizer(self.tokenizer) if self.tokenizer else None
        model = convert_flip_checkpoint(self.src, self.dst, self.size, self.image_heads, self.text_heads, tokenizer)
        vision, text = model.config.vision_config, model.config.text_config
        has_processor = (self.dst / "processor_config.json").is_file()
        print(
            f"{self.dst}: {model.num_parameters() / 1e6:.1f} M parameters, {vision.image_size} px in patches of "
            f"{vision.patch_size}, captions of {text.max_position_embeddings} ids, "
            f"{'with' if has_processor else 'without (see --tokenizer)'} a processor"
        )


@dataclass(frozen=True)
class ToOpenClip:
    """Convert a model of the family flip or clip for open_clip, with equal embeddings.

    Args:
        src: A run, such as runs/l16, a model folder, or a Hub name.
        dst: The folder to write; open_clip.create_model('local-dir:DST') loads it.
    """

    src: str
    dst: OutputFolder

    def run(self) -> None:
        from flipscale.hub.convert_open_clip import convert_to_open_clip

        model = convert_to_open_clip(self.src, self.dst)
        print(
            f"{self.dst}: {model.num_parameters() / 1e6:.1f} M parameters; open_clip.create_model_and_transforms"
            f"({f'local-dir:{self.dst}'!r}) and get_tokenizer of the same name load it"
        )


@dataclass(frozen=True)
class ToTransformers:
    """Convert a model of open_clip to one of transformers: CLIPModel or SiglipModel.

    Args:
        src: A model: open_clip:NAME,PRETRAINED, open_clip:hf-hub:ORG/NAME or local-dir:FOLDER. A checkpoint is its
            configuration and its file: open_clip:CONFIG.json,FILE.pt.
        dst: The folder to write; model.init_from takes it.
    """

    src: str
    dst: OutputFolder

    def run(self) -> None:
        from flipscale.hub.convert_transformers import convert_from_open_clip

        for part, difference in convert_from_open_clip(self.src.removeprefix("open_clip:"), self.dst).items():
            print(f"{self.dst}: embeddings of {part} within {difference:.1g} of open_clip's")


@dataclass(frozen=True)
class ToOnnx:
    """Write one ONNX file per tower, and check in onnxruntime that outputs equal the model's.

    Args:
        src: A run, such as runs/l16, a model folder, or a Hub name.
        dst: The folder to write.
    """

    src: str
    dst: OutputFolder

    def run(self) -> None:
        from flipscale.hub.convert_onnx import convert_to_onnx

        for file, difference in convert_to_onnx(self.src, self.dst).items():
            print(f"{self.dst}/{file}: embeddings within {difference:.1g} of the model's")


COMMANDS = {"flip": FromFlip, "open_clip": ToOpenClip, "transformers": ToTransformers, "onnx": ToOnnx}
