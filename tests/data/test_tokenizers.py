"""Tokenizers: the original's WordPiece id for id, and SentencePiece's own ids from the fast form."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flipscale.data.tokenizers import begin_and_end, bert_tokenizer, load_tokenizer, piece_rows, train_sentencepiece

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizer"
CAPTIONS = [
    *("grinning face", "grinning face with big eyes", "red heart", "flag: Côte d'Ivoire", "person: red hair"),
    *("1st place medal", "Japanese “bargain” button", "eight-thirty", "cat face", "red apple", "medal"),
] * 2


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int = 32) -> list[list[int]]:
    """Ids cut and padded to `length`, as the trainer asks for them."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=length)["input_ids"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """The WordPiece tokenizer, saved and loaded again the way a user of a released model does."""
    folder = tmp_path_factory.mktemp("bert")
    vocab = folder / "vocab.txt"
    vocab.write_bytes(gzip.decompress((FIXTURES / "bert_base_uncased_vocab.txt.gz").read_bytes()))
    bert_tokenizer(vocab).save_pretrained(folder / "saved")
    return AutoTokenizer.from_pretrained(folder / "saved")


def test_bert_gives_the_originals_ids_on_difficult_strings(bert: PreTrainedTokenizerBase) -> None:
    """44 strings of many scripts, signs, controls, special tokens typed out, and very long words."""
    cases = json.loads((FIXTURES / "original_cases.json").read_text())
    assert len(cases) == 44
    got = encode(bert, [case["text"] for case in cases])
    for case, ids in zip(cases, got, strict=True):
        assert ids == case["ids"] + [0] * (32 - len(case["ids"])), case["text"]


def test_bert_gives_the_originals_ids_on_the_zero_shot_prompts(bert: PreTrainedTokenizerBase) -> None:
    """All 7,000 ImageNet prompts."""
    stored = np.load(FIXTURES / "original_prompts.npz")
    texts = stored["texts"].tobytes().decode().split("\n")
    got = np.array(encode(bert, texts, stored["ids"].shape[1]))
    assert got.shape == (7000, stored["ids"].shape[1])
    np.testing.assert_array_equal(got, stored["ids"])


def test_bert_refuses_what_is_no_vocabulary(tmp_path: Path) -> None:
    """A folder without vocab.txt, and a file that is something else."""
    with pytest.raises(ValueError, match="there is no vocabulary at"):
        bert_tokenizer(tmp_path)
    other = tmp_path / "words.txt"
    other.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="not a WordPiece vocabulary: its first line is 'one'"):
        bert_tokenizer(other)


def test_sentencepiece_ids_equal_the_models_own(tmp_path: Path) -> None:
    """The fast tokenizer, saved and loaded, against the sentencepiece library on the captions and on odd strings."""
    train_sentencepiece(CAPTIONS, tmp_path, vocab_size=400, max_length=16)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    model = sentencepiece.SentencePieceProcessor(str(tmp_path / "sentencepiece.model"))
    odd = ["", "  two  spaces ", "GRINNING Face", "½ cat", "face\tcat", "unseen Ω 字", "red-heart", "ﬁre"]
    for text in CAPTIONS + odd:
        assert fast(text)["input_ids"] == model.encode(text), text
    assert fast.pad_token_id == 0
    assert fast.unk_token_id == 1
    assert fast.model_max_length == 16
    assert encode(fast, ["red heart"], 8)[0][2:] == [0] * 6


def test_sentencepiece_keeps_common_words_whole_each_time(tmp_path: Path) -> None:
    """A word that occurs twice is one piece, upper case folded. Training twice gives the same bytes."""
    for run in ("one", "two"):
        fast = train_sentencepiece(CAPTIONS, tmp_path / run, vocab_size=400, max_length=16)
        assert fast.tokenize("Grinning face") == ["▁grinning", "▁face"]
        assert fast.tokenize("1st place medal") == ["▁1st", "▁place", "▁medal"]
    for name in ("sentencepiece.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_sentencepiece_refuses_no_text_and_too_few_pieces(tmp_path: Path) -> None:
    """Both messages say what to change."""
    with pytest.raises(ValueError, match="captions is empty"):
        train_sentencepiece([], tmp_path, 400, 16)
    with pytest.raises(ValueError, match="no tokenizer of vocab_size=5 from 22 captions"):
        train_sentencepiece(CAPTIONS, tmp_path, 5, 16)


@pytest.mark.parametrize("name", ["./none", "data/mine/none", "/none"])
def test_a_path_never_becomes_a_name_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)
    monkeypatch.setattr("flipscale.data.tokenizers.hf_hub_download", None)
    missing = f"data.tokenizer '{name}' cannot be loaded .there is no such folder; `flipscale prepare tokenizer SHARDS "
    with pytest.raises(ValueError, match=missing):
        load_tokenizer(name, 8)
    for vocabulary in (name, "vocab.txt"):
        with pytest.raises(ValueError, match=f"there is no vocabulary at {vocabulary}; name a vocab.txt, its folder"):
            bert_tokenizer(vocabulary)


def test_sentencepiece_may_have_tokens_that_begin_and_end_captions(tmp_path: Path) -> None:
    bare = train_sentencepiece(CAPTIONS, tmp_path / "bare", vocab_size=400, max_length=16)
    train_sentencepiece(CAPTIONS, tmp_path / "ends", vocab_size=400, max_length=16, begin_and_end=True)
    ends = AutoTokenizer.from_pretrained(tmp_path / "ends")
    assert begin_and_end(ends) == {"bos_token_id": 2, "eos_token_id": 3}
    assert (ends.pad_token_id, ends.unk_token_id) == (0, 1)
    for ids, own in zip(encode(bare, CAPTIONS), encode(ends, CAPTIONS), strict=True):
        assert bare.convert_ids_to_tokens(ids) == ends.convert_ids_to_tokens(own)
    assert ends.decode([2, *ends("red heart")["input_ids"], 3, 0], skip_special_tokens=True) == "red heart"
    with pytest.raises(ValueError, match=r"the tokenizer has no tokens for the begin .* DIR --begin_and_end` writes"):
        begin_and_end(bare)


def test_rows_of_one_vocabulary_in_two_formats(tmp_path: Path) -> None:
    """Special tokens may have other names."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "##ly", "disc"]
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    one, other = bert_tokenizer(tmp_path), BertTokenizer.from_pretrained(tmp_path)
    assert piece_rows(one, other) == piece_rows(other, one) == {index: index for index in range(len(pieces))}
    words = Tokenizer(models.WordLevel({"<pad>": 0, "disc": 5, "blue": 7}, unk_token="<pad>"))
    third = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    assert piece_rows(third, one) == {0: 0, 5: 7}
