"""Free text in a search page: the browser's tokens, embeddings and ranking equal Python's."""

import base64
import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOURS, SHAPES, draw
from pages.browser import check_accessible, check_offline, look
from PIL import Image
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerBase
from transformers.models.auto import AutoTokenizer

from flipscale import cli
from flipscale.data.captions import tokenise
from flipscale.data.tokenizers import train_sentencepiece
from flipscale.evaluation.embedding import Embedder, text_embeds
from flipscale.hub.export import build_processor
from flipscale.model import FlipConfig, FlipModel, FlipProcessor
from flipscale.pages.page import rendered
from flipscale.pages.search_page import text_tower

TOWER = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
TRICKY = (
    *("red disc", "RED  Disc!", "  a (red), disc.  ", "unknown words entirely", "qqq zzz", "日本語 テスト ｶﾞ"),
    *("한글 각", "Über-straße", "É E\u0301 e\u0301 ﬁne", "ΑΣ ς ΐ", "İstanbul \u0131", "ﷺ ½ ①", "\uff41\uff42 Ⅻ"),
    *("नमस्ते क्षि", "👩\u200d👩\u200d👧 🏳️\u200d🌈", "<pad>red<unk> disc</s>", "\uff1c\uff55nk\uff1e", "▁a ▁▁b"),
    *("<pad>", "<s> </s>", "<unk><pad>"),
    *(" \u00a0 x\u200by\ufeffz \u0085 q", "a\tb\nc", "\u200b", "...", "constructor toString", "red " * 50),
    "reddiscbargreyringcross" * 9,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """A tokenizer as `flipscale prepare tokenizer` writes it, from few captions, so that it lacks many letters."""
    captions = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES] + ["Übergröße 12, don't"]
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(captions * 2, folder, vocab_size=200, max_length=8, begin_and_end=True)
    return AutoTokenizer.from_pretrained(folder)


def model_of(tokenizer: PreTrainedTokenizerBase, **text: object) -> FlipModel:
    """A model with random weights."""
    torch.manual_seed(0)
    vision = {**TOWER, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 8, "num_hidden_layers": 2}
    config = FlipConfig(vision_config=vision, text_config={**TOWER, **sizes, **text}, projection_dim=24)
    model = FlipModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def embedder(model: FlipModel, tokenizer: PreTrainedTokenizerBase) -> Embedder:
    return Embedder(model, tokenizer, None, name="mine")


def test_cut_embeddings(tokenizer: PreTrainedTokenizerBase) -> None:
    ours = embedder(model_of(tokenizer), tokenizer)
    whole, cut = (text_tower(one)["weights"].pop("projection.weight") for one in (ours, replace(ours, dims=5)))
    assert base64.b64decode(cut) == base64.b64decode(whole)[: 4 * 5 * TOWER["hidden_size"]]


def test_a_page_computes_no_projection_of_two_layers(tokenizer: PreTrainedTokenizerBase) -> None:
    reason = text_tower(embedder(model_of(tokenizer, projection_hidden_size=40), tokenizer))
    assert "projection of texts has two layers" in str(reason)


def test_a_page_computes_no_other_text_tower(tokenizer: PreTrainedTokenizerBase) -> None:
    clip = CLIPModel(CLIPConfig(text_config=TOWER, vision_config=TOWER))
    for one in (embedder(clip, tokenizer), replace(embedder(model_of(tokenizer), tokenizer), tokenizer=None)):
        assert text_tower(one) == "a page computes only the text tower of a FlipModel with a tokenizer"


def in_browser(tower: object, texts: Sequence[str], folder: Path) -> list[tuple[list[int], list[float]]]:
    """Return the tokens and the embedding of each text, as a page computes them."""
    empty: dict[str, object] = {name: {} for name in ("searches", "shown", "maps", "asked", "names", "number")}
    numbers = {"num_pictures": 1, "num_damaged": 0, "top": 8, "dim": 4}
    page = folder / "page.html"
    page.write_text(rendered("search.html", **empty, **numbers, model="m", place="p", embeds="", tower=tower))
    encoded = base64.b64encode(json.dumps(texts).encode()).decode()
    script = f"""
        const results = JSON.parse(atob("{encoded}")).map(text => [tokens(text), [...embed(text) ?? []]]);
        document.body.append(Object.assign(document.createElement("pre"), {{textContent: JSON.stringify(results)}}));
    """
    (results,) = re.findall(r"<pre>(.*?)</pre>", look(page, folder, script=script).dom)
    return json.loads(unescape(results))


@pytest.mark.parametrize(
    "text",
    [
        {"attend_to_padding": False, "pooling": "mean", "hidden_act": "relu"},
        {"attend_to_padding": True, "pooling": "first", "hidden_act": "gelu_pytorch_tanh"},
        {"attend_to_padding": False, "pooling": "mean", "num_hidden_layers": 0},
    ],
)
def test_tokens_and_embeddings_are_python_s(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, text: dict) -> None:
    rng = random.Random(0)
    ranges = ((0x20, 0x250), (0x250, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x1FFFF))
    texts = [*TRICKY]
    for _ in range(200):
        texts.append("".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 9))))
        texts.append("".join(rng.choice("aeinrsdgü É\u0301") for _ in range(rng.randrange(1, 30))))
    model = model_of(tokenizer, **text)
    known = 0
    results = in_browser(text_tower(embedder(model, tokenizer)), texts, tmp_path)
    for asked, (ids, embedding) in zip(texts, results, strict=True):
        tokens = tokenise(tokenizer, [asked], 8)
        expected = tokens["input_ids"][tokens["attention_mask"].bool()].tolist()
        assert ids == expected, asked
        if set(expected) <= {*tokenizer.all_special_ids}:
            assert embedding == []
            continue
        known += 1
        with torch.no_grad():
            features = model.get_text_features(tokens["input_ids"]).pooler_output[0]
        np.testing.assert_allclose(embedding, features / features.norm(), atol=1e-5, err_msg=repr(asked))
    assert known > 300


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Sixteen pictures, with names longer than a column."""
    folder, rng = tmp_path / "mine", np.random.default_rng(3)
    folder.mkdir()
    for colour in COLOURS:
        for shape in SHAPES:
            Image.fromarray(draw(colour, shape, rng)).save(folder / f"a_{colour}_and-{shape}.drawn_by_someone.png")
    return folder


@pytest.mark.long
def test_any_words_find_what_python_finds(
    model_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "search.html"
    cli.main(["search", str(model_folder), str(pictures), "grey bar", "--top", "5", "--out", str(page)])
    assert "its box finds any words among these pictures" in capsys.readouterr().out
    with np.load(page.with_suffix(".npz")) as file:
        embeds = file["embeds"]
    model, processor = FlipModel.from_pretrained(model_folder).eval(), FlipProcessor.from_pretrained(model_folder)
    names = sorted(path.name for path in pictures.iterdir())
    rankings = set()
    for width, words in ((1000, "red disc"), (400, "A Blue cross!")):
        script = f"input.value = '{words}'; input.dispatchEvent(new Event('input'));"
        opened = look(page, tmp_path, width, script=script)
        check_offline(opened)
        check_accessible(opened)
        assert opened.facts["shown"] == 0, "queries of the page are hidden while other words are searched"
        (found,) = re.findall(r'<section id="nearest"[^>]*>(.*?)</section>', opened.dom, re.DOTALL)
        assert f">{words}</h2>" in found
        cosines = embeds @ text_embeds(model, processor, [words])[0]
        best = np.argsort(-cosines, kind="stable")[:5]
        assert re.findall(r'<figure title="(.*?)"', found) == [names[row] for row in best]
        assert re.findall(r"<strong>(.*?)</strong>", found) == [f"{cosines[row]:.2f}" for row in best]
        rankings.add(tuple(best))
    assert len(rankings) == 2

    cleared = look(page, tmp_path, script="input.value = ' '; form.requestSubmit();")
    assert cleared.facts["shown"] == 1
    for words in ("\\u10e7", "<pad>"):
        script = f"for (const words of ['red', '{words}']) {{ input.value = words; form.requestSubmit(); }}"
        unknown = look(page, tmp_path, script=script)
        assert re.search(r'<p id="said"[^>]*>The model knows no part of these words\.</p>', unknown.dom)
        assert re.search(r'<section id="nearest"[^>]* hidden', unknown.dom)
        assert unknown.facts["shown"] == 0
    similar = look(page, tmp_path, script="document.querySelector('.search button').click();")
    first = np.argsort(-embeds @ text_embeds(model, processor, ["grey bar"])[0], kind="stable")[0]
    near = np.argsort(-embeds @ embeds[first], kind="stable")[:6]
    (found,) = re.findall(r'<section id="nearest"[^>]*>(.*?)</section>', similar.dom, re.DOTALL)
    assert re.findall(r'<figure title="(.*?)"', found) == [names[row] for row in near]


@pytest.fixture
def model_folder(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """The folder of a model with random weights, whose text tower a page computes."""
    model = model_of(tokenizer, attend_to_padding=False, pooling="mean")
    model.save_pretrained(tmp_path / "model")
    build_processor(model.config, tokenizer).save_pretrained(tmp_path / "model")
    return tmp_path / "model"
