"""Words and scores of captions against COCO's own tools (pycocoevalcap), which come with clip-benchmark."""

import random

import numpy as np
import pytest

from flipscale.evaluation.intervals import mean_estimate
from flipscale.evaluation.kinds.caption_metrics import bleu_4, caption_words, cider, rouge_l

# Captions, and their words as PTBTokenizer 3.4.1 has them, but for the punctuation that COCO's tools leave out.
WORDS = {
    "A man's dog, isn't it?": "a man 's dog is n't it",
    'He says "Yes"... twice!!!': "he says yes twice !!!",
    "Two men can't, won't and cannot stop.": "two men ca n't wo n't and can not stop",
    "I'm gonna wanna gimme; y'all 'tis they've": "i 'm gon na wan na gim me y' all 't is they 've",
    "a two-year-old boy's t-shirt -- red/blue": "a two-year-old boy 's t-shirt red/blue",
    "a clock (large) [old] at 10:30 a.m.": "a clock -lrb- large -rrb- -lsb- old -rsb- at 10:30 a.m.",
    "Mr. Smith vs. Dr. Who etc. in St. Louis": "mr. smith vs. dr. who etc. in st. louis",
    "1,000 people, 3.14 miles & 20% off #1": "1,000 people 3.14 miles & 20 % off # 1",
    "the letter P. in the U.S.": "the letter p. in the u.s.",
    "a grey colour centre": "a grey colour centre",
    "boys' toys of the '90s, rock 'n' roll": "boys toys of the '90s rock 'n' roll",
    "“smart” \u2018quotes\u2019 — a dash": "smart quotes a dash",
    "café naïve 日本 \U0001f600 emoji": "café naïve 日本 emoji",
    "5'10\" tall, $5 and ½ a pizza": "5 10 tall $ 5 and 1/2 a pizza",
    "1/2-eaten pizza w/ cheese and/or ham": "1/2-eaten pizza w / cheese and/or ham",
    "see http://a.b/c?d=e or me@a.org": "see http://a.b/c?d=e or me@a.org",
    "  spaces \t and tabs ": "spaces and tabs",
    "...": "",
}


@pytest.mark.parametrize("caption", WORDS)
def test_words(caption: str) -> None:
    assert caption_words(caption) == WORDS[caption].split()


def made_up(images: int) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Captions of words of Zipf's law, with one to five references each; some are empty, some equal a reference."""
    draw = random.Random(0)

    def words(most: int) -> list[str]:
        return [f"w{int(draw.paretovariate(1.0)) % 50}" for _ in range(draw.randint(0, most))]

    references = [[words(15) for _ in range(draw.randint(1, 5))] for _ in range(images)]
    candidates = [draw.choice([words(12), draw.choice(some), draw.choice(some)[:-1]]) for some in references]
    return candidates, references


@pytest.mark.parametrize("images", [1, 2, 60])
def test_scores_are_those_of_coco_s_tools(images: int) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates, references = made_up(images)
    theirs = {number: [" ".join(words) for words in some] for number, some in enumerate(references)}
    made = {number: [" ".join(words)] for number, words in enumerate(candidates)}
    expected = Bleu(4).compute_score(theirs, made, verbose=0)[0][3]
    assert bleu_4(candidates, references).value == pytest.approx(expected, rel=1e-12)
    for ours, tool in ((cider, Cider()), (rouge_l, Rouge())):
        mean, scores = tool.compute_score(theirs, made)
        assert np.allclose(ours(candidates, references), scores, rtol=1e-12, atol=1e-15)
        assert mean_estimate(ours(candidates, references)).value == pytest.approx(mean, rel=1e-12)


def test_intervals_hold_the_value() -> None:
    candidates, references = made_up(60)
    for found in (bleu_4(candidates, references), mean_estimate(cider(candidates, references))):
        assert 0 <= found.low < found.value < found.high
    assert mean_estimate(np.array([2.0])) == (2.0, 2.0, 2.0)
