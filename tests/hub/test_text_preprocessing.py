"""Text is prepared as the weights were trained on it, in training, evaluation, search and exported folders alike."""

import io
import json
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import TOWER
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    GemmaTokenizer,
    PreTrainedTokenizerBase,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from flipscale.data.tokenizers import model_tokenizer
from flipscale.evaluation.foreign_models import transformers_embedder
from flipscale.hub.export import build_processor
from flipscale.hub.loading import load_with_tokenizer, open_embedder

TEXTS = ["A Red, disc!", "a red disc", "The BLUE  ring.", "a.b"]
LETTERS = string.ascii_letters + string.punctuation


def clip_tokenizer(folder: Path) -> None:
    """OpenAI's kind: byte pairs of lower-case text, of single letters here."""
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]).save_pretrained(folder)


def siglip_tokenizer(folder: Path) -> None:
    """SigLIP's kind: SentencePiece of lower-case text without punctuation."""
    import sentencepiece

    model = io.BytesIO()
    names = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "normalization_rule_name": "identity"}
    words = ["a red disc", "the blue ring", "a green cross and a grey bar", LETTERS] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_writer=model,
        vocab_size=150,
        hard_vocab_limit=False,
        minloglevel=2,
        **names,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "do_lower_case": True}
    about = {"tokenizer_class": "SiglipTokenizer", "model_input_names": ["input_ids"], **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def siglip2_tokenizer(folder: Path) -> None:
    """SigLIP 2's kind: Gemma's class, which keeps upper case, though the weights saw none."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *LETTERS, "▁"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    GemmaTokenizer(vocab, [], add_bos_token=False, add_eos_token=True, padding_side="right").save_pretrained(folder)


TOKENIZERS = {"clip": clip_tokenizer, "siglip": siglip_tokenizer, "siglip2": siglip2_tokenizer}


def plain(kind: str, text: str) -> str:
    """Return a text as the original's code gives it to its tokenizer."""
    lower = text.lower()
    return "".join(letter for letter in lower if letter not in string.punctuation) if kind == "siglip" else lower


def weights(kind: str, folder: Path) -> None:
    """Write a tiny model with its image processor."""
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": 260, "max_position_embeddings": 24, "bos_token_id": None, "eos_token_id": None}
    vision = {**TOWER, "image_size": 16, "patch_size": 8}
    if kind == "clip":
        text["eos_token_id"] = 2 * len(LETTERS) + 1
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
        CLIPImageProcessorPil(size={"shortest_edge": 16}).save_pretrained(folder)
    else:
        SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
        SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)


def ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    return tokenizer(texts, padding="max_length", max_length=24, truncation=True, return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_is_prepared_as_the_original_s(kind: str, tmp_path: Path) -> None:
    folder, out = tmp_path / kind, tmp_path / "exported"
    folder.mkdir()
    TOKENIZERS[kind](folder)
    weights(kind, folder)
    model, evaluation = load_with_tokenizer(str(folder))
    training = model_tokenizer(str(folder), model.config.text_config)
    build_processor(model.config, training).save_pretrained(out)
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    foreign = transformers_embedder(str(folder), Accelerator(cpu=True))
    expected = ids(training, [plain(kind, text) for text in TEXTS])
    loaders: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
        "training": lambda: training,
        "evaluation": lambda: evaluation,
        "exported": lambda: AutoTokenizer.from_pretrained(out),
        "trained on": lambda: model_tokenizer(str(out), model.config.text_config),
        "transformers": lambda: foreign.tokenizer.tokenizer,
    }
    for name, loaded in loaders.items():
        assert torch.equal(ids(loaded(), TEXTS), expected), name
    kept = [not torch.equal(*ids(training, ["red disc", text])) for text in ("red disc!", "red, disc")]
    assert kept == [kind != "siglip"] * 2
    # What a search and an evaluation embed.
    embedder = open_embedder(str(folder), Accelerator(cpu=True))
    with torch.no_grad():
        own = model.get_text_features(expected).pooler_output
    for one in (embedder, foreign):
        assert torch.allclose(one.texts(TEXTS), torch.nn.functional.normalize(own, dim=1), atol=1e-5)
