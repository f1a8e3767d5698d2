"""Fast transformers tokenizers for captions: one trained on them, and the original FLIP's WordPiece."""

import io
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_NORMALIZATION = "nmt_nfkc_cf"  # SentencePiece's NFKC with case folding
_MAX_PIECE_LENGTH = 24  # characters, the word mark included
_MAX_SEEDS = 1_000_000  # SentencePiece's own default


def train_sentencepiece(
    captions: Iterable[str], out_dir: Path, vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """A unigram tokenizer trained on `captions`, saved to `out_dir` with its `sentencepiece.model`; the same each time.

    Captions are folded to lower case, <pad> is 0 and <unk> is 1. A vocabulary of the common words: a word that occurs
    at least twice is a piece of its own as long as `vocab_size` allows, and rarer ones are made of smaller pieces.

    Args:
        captions: the training text.
        out_dir: where to save; made if need be.
        vocab_size: the largest number of pieces; fewer where the captions do not give as many.
        max_length: tokens after which a caption is cut, remembered by the tokenizer.

    Raises:
        ValueError: no captions, or a vocabulary too small for their characters.
    """
    import sentencepiece

    captions = list(captions)
    if not captions:
        raise ValueError("captions is empty; a tokenizer needs some text to be trained on")
    out_dir.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as directory:
        seeds = Path(directory) / "seeds.tsv"
        seeds.write_text(_seed_pieces(captions), encoding="utf-8")
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(captions),
                model_writer=model,
                model_type="unigram",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                seed_sentencepieces_file=str(seeds),
                max_sentencepiece_length=_MAX_PIECE_LENGTH,
                split_by_number=False,
                character_coverage=1.0,
                normalization_rule_name=_NORMALIZATION,
                pad_id=0,
                unk_id=1,
                bos_id=-1,
                eos_id=-1,
                num_threads=1,  # the sums of several threads would depend on their order
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"no tokenizer of vocab_size {vocab_size} from {len(captions)} captions: {reason}"
            ) from error
    path = out_dir / "sentencepiece.model"
    path.write_bytes(model.getvalue())
    tokenizer = sentencepiece_tokenizer(path, max_length)
    tokenizer.save_pretrained(out_dir)
    return tokenizer


def _seed_pieces(captions: list[str]) -> str:
    """The pieces that training starts from, one `PIECE<tab>SCORE` a line: every part, seen twice, of every word.

    The trainer's own list leaves out any word that is no part of a longer one, because it looks at each distinct word
    once; on captions of a few words, that is two words in three.
    """
    import sentencepiece

    normalizer = sentencepiece.SentencePieceNormalizer(rule_name=_NORMALIZATION)
    words: Counter[str] = Counter()
    for caption in captions:
        words.update("▁" + word for word in str(normalizer.normalize(caption)).split("▁") if word)
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 2, min(len(word), start + _MAX_PIECE_LENGTH) + 1):
                counts[word[start:end]] += count
    seen_twice = sorted((-count * len(piece), piece) for piece, count in counts.items() if count > 1)
    return "".join(f"{piece}\t{-score}\n" for score, piece in seen_twice[:_MAX_SEEDS])


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
