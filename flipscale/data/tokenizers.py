"""Fast tokenizers for captions: one trained on the captions, and the original FLIP's WordPiece."""

import io
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flipscale.io.errors import UserError, first_line
from flipscale.io.hub_requests import guard_requests
from flipscale.io.model_folder import check_texts, is_path
from flipscale.io.paths import quoted
from flipscale.model.configuration_flip import FlipDecoderConfig, FlipTextConfig

_NORMALIZATION = "nmt_nfkc_cf"  # SentencePiece's NFKC with case folding
_MAX_PIECE_LENGTH = 24  # characters, the word mark included
_MAX_SEEDS = 1_000_000  # SentencePiece's own default
# Files with a vocabulary, and entries besides special tokens that transformers makes up without them, such as "▁".
_VOCABULARIES = ("tokenizer.json", "tokenizer.*.json", "vocab*", "*.model")
_MOST_MADE_UP = 1

# Classes of characters, in the syntax of the tokenizers library.
# The original splits at these, besides spaces: ASCII signs, punctuation, and every single Chinese character.
_DELIMITERS = (
    r"!-/:-@\[-`{-~\p{P}"
    r"\x{3400}-\x{4DBF}\x{4E00}-\x{9FFF}\x{F900}-\x{FAFF}\x{20000}-\x{2A6DF}"
    r"\x{2A700}-\x{2B73F}\x{2B740}-\x{2B81F}\x{2B820}-\x{2CEAF}\x{2F800}-\x{2FA1F}"
)
# Unicode's Default_Ignorable_Code_Point: soft hyphen, zero-width space and joiner, variation selectors, ...
_IGNORABLE = (
    r"\x{AD}\x{34F}\x{61C}\x{115F}\x{1160}\x{17B4}\x{17B5}\x{180B}-\x{180F}\x{200B}-\x{200F}\x{202A}-\x{202E}"
    r"\x{2060}-\x{206F}\x{3164}\x{FE00}-\x{FE0F}\x{FEFF}\x{FFA0}\x{FFF0}-\x{FFF8}\x{1BCA0}-\x{1BCA3}"
    r"\x{1D173}-\x{1D17A}\x{E0000}-\x{E0FFF}"
)
_MARK = "\x01"  # control characters have been removed before it is used
_NO_WORD = "\ue000"  # private use: in no vocabulary, so it becomes [UNK]


def model_tokenizer(name: str, text: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer `name` for a model, see `load_tokenizer`, after `check_tokenizer`.

    Args:
        text: configuration of the text tower, or of the decoder in its place. CLIP's pools at the end of the caption,
            so its tokenizer gets begin and end tokens if it adds none.
    """
    tokenizer = with_lower_case(load_tokenizer(name, text.max_position_embeddings), text)
    if not isinstance(text, FlipTextConfig | FlipDecoderConfig):
        tokenizer.padding_side = "right"
    has_ends = None not in (tokenizer.bos_token, tokenizer.eos_token)
    if text.model_type == "clip_text_model" and has_ends and tokenizer("a").input_ids[-1] != tokenizer.eos_token_id:
        tokenizer.add_bos_token = tokenizer.add_eos_token = True
    check_tokenizer(tokenizer, text)
    return tokenizer


def with_lower_case(tokenizer: PreTrainedTokenizerBase, text: Any) -> PreTrainedTokenizerBase:
    """Return SigLIP 2's tokenizer with the lower case of its training, and any other tokenizer as it is.

    `text` configures the text tower. The fixed-size models of SigLIP 2 are SiglipModels and name Gemma's class, which
    keeps upper case (transformers issue 43054). The result is of a general class, because Gemma's would drop the change
    when it is loaded.
    """
    if text.model_type != "siglip_text_model" or not type(tokenizer).__name__.startswith("Gemma"):
        return tokenizer
    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), backend.normalizer])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **tokenizer.special_tokens_map,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        model_input_names=tokenizer.model_input_names,
    )


def load_tokenizer(name: str, max_tokens: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a recipe: a folder, a name on the Hub, or `bert` for the original's WordPiece. It cuts
    captions after `max_tokens`."""
    try:
        if name == "bert":
            return bert_tokenizer("google-bert/bert-base-uncased", max_tokens)
        if Path(name).is_dir():
            check_texts(Path(name))
        elif is_path(name):
            raise UserError(f"there is no such folder; `flipscale prepare tokenizer SHARDS {quoted(name)}` writes one")
        else:
            guard_requests()
        tokenizer = read_tokenizer(name)
    except Exception as error:  # the tokenizers library raises any
        raise UserError(f"data.tokenizer {name!r} cannot be loaded ({first_line(error)})") from error
    tokenizer.model_max_length = max_tokens
    return tokenizer


def read_tokenizer(name: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Return transformers' tokenizer of a folder or Hub name, without code of the model. Raise UserError if it has no
    tokenizer files, and what the tokenizers library raises for damaged files."""
    from transformers import AutoTokenizer  # here, because the import takes a while

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    except ValueError:
        if any(next(Path(name).glob(pattern), None) for pattern in _VOCABULARIES) or not Path(name).is_dir():
            raise
        raise UserError(f"{name} has no tokenizer files; copy its {_VOCABULARIES[0]} there") from None
    check_words(tokenizer)
    return tokenizer


def check_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if a tokenizer knows no words: without files, transformers makes one of special tokens only."""
    words = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys() - {*tokenizer.all_special_tokens}
    if len(words) <= _MOST_MADE_UP:
        names = ", ".join(dict.fromkeys([_VOCABULARIES[0], *tokenizer.vocab_files_names.values()]))
        raise UserError(
            f"{tokenizer.name_or_path} has no tokenizer files, or none with words; copy those of its training there, "
            f"such as {names}"
        )


def train_sentencepiece(
    captions: Iterable[str], out_dir: Path, vocab_size: int, max_length: int, begin_and_end: bool = False
) -> PreTrainedTokenizerFast:
    """Train a unigram tokenizer on `captions` and save it to `out_dir` with its `sentencepiece.model`.

    The result is the same each time. Captions are folded to lower case, <pad> is 0 and <unk> is 1. Every word that
    occurs at least twice is a piece, as far as `vocab_size` allows. Rarer words are made of smaller pieces.

    Args:
        vocab_size: limit of the number of pieces; few captions yield fewer.
        max_length: tokens after which a caption is cut; the tokenizer stores it.
        begin_and_end: whether to reserve tokens 2 and 3 for begin and end of captions. The tokenizer does not add them.
    """
    captions = list(captions)
    if not captions:
        raise UserError("captions is empty; a tokenizer needs some text to be trained on")
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
                bos_id=2 if begin_and_end else -1,
                eos_id=3 if begin_and_end else -1,
                num_threads=1,  # with several threads, sums would depend on their order
                minloglevel=2,
            )
        except RuntimeError as error:
            # SentencePiece names the size that the characters need, unless there is no room at all.
            needed = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
            reason = f"their characters alone need {needed[1]}" if needed else "there is no room for their characters"
            words = f"{vocab_size=} from {len(captions)} captions: {reason}"
            raise UserError(f"no tokenizer of {words}; use more") from error
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model.getvalue())
    proto.trainer_spec.ClearField("seed_sentencepieces_file")  # a temporary path, different every time
    (out_dir / "sentencepiece.model").write_bytes(proto.SerializeToString(deterministic=True))
    tokenizer = _sentencepiece_tokenizer(proto, max_length, begin_and_end)
    tokenizer.save_pretrained(out_dir)
    return tokenizer


def _seed_pieces(captions: list[str]) -> str:
    """Return the initial pieces of the training, one `PIECE<tab>SCORE` a line: all parts of words that occur twice.

    The trainer's own list counts each distinct word once, so it lacks every word that is not part of a longer one. On
    captions of a few words, it lacks two words in three.
    """
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


def _sentencepiece_tokenizer(proto: Any, max_length: int, begin_and_end: bool) -> PreTrainedTokenizerFast:
    """Return the fast tokenizer with the ids of a unigram model. It adds no special tokens to a text."""
    normalizer = proto.normalizer_spec
    backend = Tokenizer(models.Unigram([(piece.piece, piece.score) for piece in proto.pieces], unk_id=1))
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(normalizer.precompiled_charsmap),
            normalizers.Strip(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    special = {"bos_token": "<s>", "eos_token": "</s>"} if begin_and_end else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **special,
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def bert_tokenizer(name_or_vocab_file: str | Path, max_length: int = 32) -> PreTrainedTokenizerFast:
    """Return the original FLIP's WordPiece tokenizer. It adds no special tokens and pads with 0.

    It folds case and compatibility forms (NFKC_Casefold), drops accents and turns control characters into spaces. It
    treats "[CLS]" in a caption as plain text, and turns a word of more than 100 bytes into [UNK]. tensorflow-text's
    BertTokenizer does all this, but transformers' BertTokenizer does not. The caller asks for padding and truncation.

    Compared with tensorflow-text 2.21, it is equal on 14,000 captions of many scripts and on very long words. It
    differs on 27 of 20,000 strings of random characters, and folds 257 of 1.1 million code points differently, nearly
    all newer than the tables of the tokenizers library.

    Args:
        name_or_vocab_file: a vocabulary (one piece a line, [PAD] first), a folder with a `vocab.txt`, or a model on the
            Hub with a `vocab.txt`, such as google-bert/bert-base-uncased.
        max_length: tokens after which a caption is cut; the tokenizer stores it.
    """
    path = _vocab_file(name_or_vocab_file)
    pieces = path.read_text(encoding="utf-8").split("\n")
    vocab = {piece: index for index, piece in enumerate(pieces[:-1] if pieces[-1] == "" else pieces)}
    if vocab.get("[PAD]") != 0 or "[UNK]" not in vocab:
        raise UserError(
            f"{path} is not a WordPiece vocabulary: its first line is {pieces[0]!r:.40} and [UNK] is "
            f"{'' if '[UNK]' in vocab else 'not '}in it; it must have one piece a line, [PAD] first, and [UNK]"
        )
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = _bert_normalizer()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" +"), "removed"),
            pre_tokenizers.Split(Regex(f"[{_DELIMITERS}]"), "isolated"),
        ]
    )
    backend.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        split_special_tokens=True,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def _vocab_file(name_or_vocab_file: str | Path) -> Path:
    """Return the file of a vocabulary. The Hub is asked only if its cache here does not have one, because every process
    of a job calls this, and a published vocabulary stays as it is."""
    path = Path(name_or_vocab_file)
    if path.is_dir():
        path = path / "vocab.txt"
    if path.is_file():
        return path
    if path.suffix == ".txt" or is_path(str(name_or_vocab_file)):
        raise UserError(f"there is no vocabulary at {name_or_vocab_file}; name a vocab.txt, its folder, or ORG/NAME")
    guard_requests()
    cached = try_to_load_from_cache(str(name_or_vocab_file), "vocab.txt")
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(hf_hub_download(str(name_or_vocab_file), "vocab.txt"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"no vocabulary {str(name_or_vocab_file)!r}: no such file, and not from the Hub ({first_line(error)}); "
            "name a vocab.txt, or a model that has one such as google-bert/bert-base-uncased"
        ) from error


def _bert_normalizer() -> normalizers.Normalizer:
    """Return the steps of tensorflow-text, built from those of the tokenizers library."""
    word = f"[^ {_DELIMITERS}]"
    return normalizers.Sequence(
        [
            # NFKC_Casefold. It removes invisible characters and differs from NFKC + lower case in three letters.
            normalizers.Replace(Regex(f"[{_IGNORABLE}]"), ""),
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.NFD(),
            normalizers.Replace("ß", "ss"),
            normalizers.Replace("ς", "\u03c3"),  # a final sigma
            normalizers.Replace("\u0345", "\u03b9"),  # the iota below a Greek vowel
            normalizers.Replace(Regex(r"\p{Mn}"), ""),  # StripAccents would also take the spacing marks of Hindi
            normalizers.Replace(Regex(r"[\p{Cc}\p{Cf}]"), " "),
            # For words of more than 100 bytes. Each character gets a mark for every byte beyond its first, so that a
            # count of characters counts bytes. Then the marks are removed.
            *(
                normalizers.Replace(Regex(f"(?=[[\\x{{{first}}}-\\x{{10FFFF}}]&&{word}])"), _MARK)
                for first in ("80", "800", "10000")
            ),
            normalizers.Replace(Regex(f"{word}{{101,}}"), _NO_WORD),
            normalizers.Replace(_MARK, ""),
        ]
    )


def piece_rows(own: PreTrainedTokenizerBase, start: PreTrainedTokenizerBase) -> dict[int, int]:
    """Return the id in the vocabulary `start` of each piece of `own` that is there too, by its id in `own`. Special
    tokens of equal roles, such as padding, are one piece."""
    ids = start.get_vocab()
    rows = {index: ids[piece] for piece, index in own.get_vocab().items() if piece in ids}
    for role in ("pad", "unk", "bos", "eos", "cls", "sep", "mask"):
        index, there = (getattr(tokenizer, f"{role}_token_id") for tokenizer in (own, start))
        if index is not None and there is not None:
            rows.setdefault(index, there)
    return rows


def num_entries(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of embeddings that a tokenizer needs; its ids may have gaps."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def begin_and_end(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return `bos_token_id` and `eos_token_id` for generated captions: the tokenizer's, else BERT's [CLS] and [SEP]."""
    vocabulary = tokenizer.get_vocab()
    for begin, end in (
        (tokenizer.bos_token_id, tokenizer.eos_token_id),
        (tokenizer.cls_token_id, tokenizer.sep_token_id),
        (vocabulary.get("[CLS]"), vocabulary.get("[SEP]")),
    ):
        if begin is not None and end is not None:
            return {"bos_token_id": int(begin), "eos_token_id": int(end)}
    raise UserError(
        "the tokenizer has no tokens for the begin and the end of a caption, which a model that writes captions needs; "
        "use one that has, such as `flipscale prepare tokenizer SHARDS DIR --begin_and_end` writes"
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, text: Any) -> None:
    entries = num_entries(tokenizer)
    if entries > text.vocab_size:
        raise UserError(
            f"the tokenizer has {entries} entries, the model's vocab_size is {text.vocab_size}; use the "
            "tokenizer that the model was trained with"
        )
    if text.model_type == "clip_text_model":
        last = tokenizer("a").input_ids[-1:]
        # transformers takes an `eos_token_id` of 2, OpenAI's old configuration, to mean the largest id.
        ends = [entries - 1] if text.eos_token_id == 2 else [text.eos_token_id]
        if last != ends:
            raise UserError(
                f"the tokenizer ends a caption with id {last}, and CLIP's text tower pools at eos_token_id {ends}; use "
                "a CLIP's tokenizer, or one that `flipscale prepare tokenizer SHARDS DIR --begin_and_end` writes"
            )
    if not isinstance(text, FlipTextConfig | FlipDecoderConfig):
        if tokenizer.pad_token_id is None:
            raise UserError("the tokenizer has no padding token, so captions cannot have one length; set its pad_token")
        if text.model_type in ("clip_text_model", "siglip_text_model"):
            return
    if tokenizer.pad_token_id != text.pad_token_id:
        raise UserError(
            f"the tokenizer pads with id {tokenizer.pad_token_id}, the model with pad_token_id {text.pad_token_id}; "
            "use the tokenizer that the model was trained with"
        )


def check_begin_and_end(tokenizer: PreTrainedTokenizerBase, decoder: FlipDecoderConfig) -> None:
    """Raise unless a decoder begins and ends captions by the tokenizer's own tokens."""
    for name, token in begin_and_end(tokenizer).items():
        if getattr(decoder, name) != token:
            raise UserError(
                f"the tokenizer has {name} {token}, the decoder {getattr(decoder, name)}; set "
                f"model.decoder_config.{name} to the tokenizer's"
            )
