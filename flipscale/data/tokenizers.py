"""Fast transformers tokenizers for captions: one trained on them, and the original FLIP's WordPiece."""

import io
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def train_sentencepiece(captions: Iterable[str], out_dir: Path, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A unigram tokenizer trained on `captions`, saved to `out_dir` (`tokenizer.json` and `sentencepiece.model`)."""
    import sentencepiece

    out_dir.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path = out_dir / "sentencepiece.model"
    path.write_bytes(model.getvalue())
    tokenizer = sentencepiece_tokenizer(path, max_length)
    tokenizer.save_pretrained(out_dir)
    return tokenizer


def sentencepiece_tokenizer(model_path: Path, max_length: int) -> PreTrainedTokenizerFast:
    """The fast tokenizer that gives a SentencePiece unigram model's ids, nothing added at either end."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(Path(model_path).read_bytes())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    backend = Tokenizer(models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback))
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(normalizer.precompiled_charsmap),
            normalizers.Strip(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )
