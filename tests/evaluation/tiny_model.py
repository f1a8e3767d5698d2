"""Small FLIP models with random weights, for images of 32 pixels and the captions of `write_shards`: two towers, and an
image tower with a decoder; and what they are computed to in several processes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import processes
import torch
from accelerate import Accelerator
from conftest import COLOURS, SHAPES, TOWER, TOWERS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flipscale.data.decode import decode_processed
from flipscale.data.samples import SampleNumbers
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import Embedder
from flipscale.model import FlipConfig, FlipForConditionalGeneration, FlipModel
from flipscale.process.watchdog import close_process_group

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "a", "the", *COLOURS, *SHAPES]
CAPTION_LENGTH = 6


def tiny_embedder(tokenizer_dir: str | Path, batch_size: int, projection_dim: int = 16) -> Embedder:
    """Return the embedder of the model; its weights are the same every time."""
    torch.manual_seed(0)
    config = FlipConfig(**TOWERS, projection_dim=projection_dim)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return Embedder(FlipModel(config).eval(), tokenizer, Accelerator(cpu=True), batch_size=batch_size)


def pixels_of(embedder: Embedder, shards: str | Path, size: int = 32) -> torch.Tensor:
    """All images as the model's processor has them, fp32 `(images, 3, size, size)`."""
    source, vision = TarSource(str(shards)), embedder.model.config.vision_config
    images = [decode_processed(source.read(*where).image, size) for where in SampleNumbers(source)]
    pixels = torch.from_numpy(np.stack(images).astype(np.float32)) / 255
    return ((pixels - torch.tensor(vision.image_mean)) / torch.tensor(vision.image_std)).permute(0, 3, 1, 2)


def tiny_writer(accelerator: Accelerator, batch_size: int = 16) -> Embedder:
    """An embedder of a captioner with random weights, drawn so that its captions differ."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    config = FlipConfig(
        vision_config=TOWERS["vision_config"],
        decoder_config={
            **{name: TOWER[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")},
            **{"num_hidden_layers": 2, "vocab_size": len(WORDS), "max_position_embeddings": CAPTION_LENGTH},
            **{"bos_token_id": 2, "eos_token_id": 3},
        },
    )
    model = FlipForConditionalGeneration(config).eval()
    torch.manual_seed(11)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.4)
    return Embedder(model, tokenizer, accelerator, batch_size=batch_size, name="writer")


def in_processes(world: int, folder: Path, job: Callable[..., Any], *arguments: object) -> Any:
    """Return the result of a job in `world` processes, which must be equal in all of them, as JSON has it."""
    environments = processes.rank_environments(world) if world > 1 else [{}]
    running = [processes.start(_write, job, str(folder / f"{world}"), arguments, environment=e) for e in environments]
    assert processes.exit_codes(running) == [0] * world
    first, *others = (json.loads(Path(folder, f"{world}-{rank}").read_text()) for rank in range(world))
    assert all(other == first for other in others)
    return first


def _write(job: Callable[..., Any], file: str, arguments: tuple[Any, ...]) -> None:
    results = job(*arguments)
    Path(f"{file}-{os.environ.get('RANK', 0)}").write_text(json.dumps(results))
    close_process_group()
