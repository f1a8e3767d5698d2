"""Several captions in a row of the text tower: the same embeddings, losses and weights, in fewer rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOWER, losses

from flipscale.data.captions import MAX_ROW_COUNTS, pack_captions
from flipscale.engines.first_weights import compile_blocks
from flipscale.model import FlipConfig, FlipModel
from flipscale.model.families import config_class
from flipscale.objectives.build_objective import build_config
from flipscale.pretrain import pretrain
from flipscale.start.complete_recipe import parse_recipe

END, WIDTH = 3, 20
VISION = {**TOWER, "image_size": 16, "patch_size": 8, "projection_dim": 24}
TEXT = {**TOWER, "vocab_size": 60, "max_position_embeddings": WIDTH, "projection_dim": 24}


def captions(count: int, least: int = 2, most: int = WIDTH, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return captions of many lengths, padded. Each ends with a token, which one of them also has inside."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(least, most + 1, (count,), generator=generator)
    lengths[0] = most
    mask = torch.arange(WIDTH) < lengths[:, None]
    ids = torch.randint(4, 60, (count, WIDTH), generator=generator) * mask
    ids[torch.arange(count), lengths - 1] = END
    ids[0, 1] = END
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.mark.parametrize(("count", "least", "most"), [(1, 1, 1), (64, 2, 20), (500, 1, 9)])
def test_every_caption_is_there_once(count: int, least: int, most: int) -> None:
    tokens = captions(count, least, most) if most > 1 else {"input_ids": torch.tensor([[END]]), "attention_mask": None}
    if most == 1:
        tokens["attention_mask"] = torch.ones(1, 1)
    packed = pack_captions(tokens)
    ids, positions = packed["input_ids"].flatten(), packed["position_ids"].flatten()
    starts = packed["caption_ends"] - positions[packed["caption_ends"]]
    used = torch.zeros_like(ids)
    for start, row, mask in zip(starts.tolist(), tokens["input_ids"], tokens["attention_mask"], strict=True):
        length = int(mask.sum())
        assert torch.equal(ids[start : start + length], row[:length])
        assert torch.equal(positions[start : start + length], torch.arange(length))
        assert start // tokens["input_ids"].shape[1] == (start + length - 1) // tokens["input_ids"].shape[1]
        used[start : start + length] += 1
    assert used.max() == 1
    assert not positions[used == 0].any()
    assert len(packed["input_ids"]) <= count


def test_rows_are_few_and_of_few_numbers() -> None:
    """Under a tenth of the rows is padding, and a batch has one of at most 64 numbers of rows."""
    shapes, filled = set(), []
    for seed in range(60):
        lengths = torch.randint(8, 65, (256,), generator=torch.Generator().manual_seed(seed)) // (1 + seed % 5)
        mask = torch.arange(64) < lengths.clamp(min=1)[:, None]
        rows = len(pack_captions({"input_ids": mask.long(), "attention_mask": mask})["input_ids"])
        shapes.add(rows)
        filled.append(int(mask.sum()) / (64 * rows))
    assert len(shapes) <= MAX_ROW_COUNTS
    assert all(rows % 4 == 0 for rows in shapes)
    assert min(filled) > 0.8
    assert sum(filled) / len(filled) > 0.9


def models() -> dict[str, Any]:
    """Return a model of each kind that takes packed captions."""
    torch.manual_seed(0)
    clip = config_class("clip").from_size("s16", VISION, {**TEXT, "eos_token_id": END, "bos_token_id": None})
    oldest = config_class("clip").from_size("s16", VISION, {**TEXT, "eos_token_id": 2, "bos_token_id": None})
    built = {"clip": clip.trained_class(clip), "clip, largest id": oldest.trained_class(oldest)}
    for pooling in ("first", "mean"):
        text = {**TEXT, "pooling": pooling, "attend_to_padding": False}
        built[f"flip, {pooling}"] = FlipModel(FlipConfig(vision_config=VISION, text_config=text))
    return built


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", list(models()))
def test_embeddings_and_gradients_are_those_of_padded_captions(name: str, attention: str) -> None:
    model, tokens = models()[name].double(), captions(40)
    if name == "clip, largest id":
        tokens["input_ids"][tokens["input_ids"] == END] = 59
    model.set_attn_implementation(attention)
    patches, aim = torch.rand(40, 4, 192, dtype=torch.float64), torch.randn(40, 24, dtype=torch.float64)
    found = {}
    for kind, columns in (("padded", tokens), ("packed", pack_captions(tokens))):
        model.zero_grad()
        embeds = model(patches=patches, return_logits=False, **columns).text_embeds
        (embeds * aim).sum().backward()
        found[kind] = embeds.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert torch.allclose(found["packed"][0], found["padded"][0], atol=1e-6)
    for key, gradient in found["padded"][1].items():
        assert torch.allclose(found["packed"][1][key], gradient, atol=1e-5), key


@pytest.mark.long
def test_a_compiled_tower_has_one_graph_for_all_numbers_of_rows_after_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs: list[int] = []
    compile_ = torch.nn.Module.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_(self, backend=backend, **options))
    torch._dynamo.reset()
    model = models()["clip"]
    compile_blocks(model, packs_captions=True)
    rows = set()
    for seed in range(30):
        packed = pack_captions(captions(64, most=6 + seed % 10, seed=seed))
        rows.add(len(packed["input_ids"]))
        model(patches=torch.rand(64, 4, 192), return_logits=False, **packed)
    assert len(rows) > 3
    assert len(graphs) == 3, "one of the image tower, and two of the text tower"
    torch._dynamo.reset()


CLIP = {"family": "clip", "text_config": {**TOWER, "max_position_embeddings": 12}}


@pytest.fixture
def run(
    recipe: dict, caption_tokenizer: Path, tmp_path: Path, write_recipe: Callable[..., Path]
) -> Callable[..., Path]:
    """Train a recipe of family `clip`, and return its run directory."""

    def trained(name: str, *flags: str) -> Path:
        data = {**recipe["data"], "tokenizer": str(caption_tokenizer)}
        file = write_recipe(tmp_path / name, model=CLIP, data=data)
        return pretrain(parse_recipe(["--config", str(file), *flags]))

    return trained


@pytest.mark.long
def test_a_run_learns_the_same(run: Callable[..., Path]) -> None:
    padded = run("padded")
    for name, flags in (("packed", []), ("micro", ["--data.micro_batch_size", "4"])):
        packed = run(name, "--data.pack_captions", "true", *flags)
        assert losses(packed)[0] == pytest.approx(losses(padded)[0], abs=1e-6)
        # Sums of another order round differently, and each step passes on the difference and adds its own.
        assert losses(packed) == pytest.approx(losses(padded), abs=1e-6 * len(losses(padded)))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.family", "siglip"], "data.pack_captions is true.*'siglip'"),
        (["--model.family", "flip"], "data.pack_captions is true.*'flip'.*attend_to_padding to false"),
    ],
)
def test_what_would_not_be_equal_is_refused(
    recipe: dict, tmp_path: Path, write_recipe: Callable[..., Path], flags: list[str], expected: str
) -> None:
    file = write_recipe(tmp_path / "run", model={"text_config": CLIP["text_config"]})
    with pytest.raises(ValueError, match=expected):
        build_config(parse_recipe(["--config", str(file), "--data.pack_captions", "true", *flags]))
