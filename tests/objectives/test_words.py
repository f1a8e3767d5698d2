"""The word head: the words of captions as labels of images, the rare ones with more weight; nothing is exported."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import cut, metrics
from objectives import test_reconstruction
from safetensors.torch import load_file
from transformers import AutoTokenizer

from flipscale.cli import main
from flipscale.data.captions import tokenise_captions, word_weights
from flipscale.data.pairs import InputShape
from flipscale.data.recipe import DataRecipe, MaskRecipe
from flipscale.data.sources.opening import open_source
from flipscale.engines.checkpoint import CheckpointReader
from flipscale.model import FlipModel
from flipscale.objectives.contrastive import Contrastive
from flipscale.objectives.recipe import LossRecipe, build_objective
from flipscale.objectives.words import WithWords, WordsFlipModel, word_losses

RARITY = torch.tensor([0.0, 3.0, 1.0, 2.0, 0.5, 0.0, *[1.5] * 10])

RUNS = ("whole", "cut")


def batch() -> dict[str, torch.Tensor]:
    """Six images, half of each masked, and captions of up to eight tokens, some twice."""
    inputs = {name: value for name, value in test_reconstruction.batch().items() if name != "masked_patches"}
    mask = torch.arange(8) < torch.arange(3, 9)[:, None]
    inputs["word_weights"] = word_weights({"input_ids": inputs["input_ids"], "attention_mask": mask}, RARITY)
    return inputs


@pytest.mark.parametrize("views", [1, 2])
def test_the_loss_is_the_cross_entropy_with_the_caption_s_words(views: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[2, 3, 3, 7, 0, 0], [1, 5, 0, 0, 0, 0], [5, 5, 0, 0, 0, 0]])
    weights = word_weights({"input_ids": ids, "attention_mask": ids > 0}, RARITY)
    logits = torch.randn(3 * views, 16, generator=generator)
    # By hand: a word counts once, token 5 has no rarity, and the third caption no word.
    target = torch.zeros(3, 16)
    target[0, [2, 3, 7]] = torch.tensor([1.0, 2.0, 1.5]) / 4.5
    target[1, 1] = 1.0
    expected = -(target.repeat_interleave(views, 0) * logits.log_softmax(1)).sum(1)
    assert torch.allclose(word_losses(logits, ids, weights), expected, atol=1e-6)


def test_rarity_is_counted_over_captions(shards: Path, tokenizer_dir: Path) -> None:
    """Of 96 captions, `a red disc` and the like: `a` is in all of them and weighs nothing."""
    recipe = DataRecipe(shards=str(shards), global_batch_size=8)
    source, tokenizer = open_source(recipe), AutoTokenizer.from_pretrained(tokenizer_dir)
    dataset = WithWords(other=Contrastive(), weight=1.0).dataset(
        source, tokenizer, recipe, InputShape(32, 8, 8), 0, 0.5
    )
    captions = [source.read_captions(shard, n)[0].decode() for shard, n in all_places(source.shard_sizes)]
    for word in ("a", "red", "disc", "grey"):
        found = dataset.word_rarity[tokenizer.convert_tokens_to_ids(word)].item()
        assert found == pytest.approx(math.log(97 / (1 + sum(word in text.split() for text in captions)))), word
    assert not dataset.word_rarity[tokenizer.all_special_ids].any()
    columns = dataset.__getitems__(list(range(12)))
    expected = word_weights(tokenise_captions(tokenizer, captions_of(columns, tokenizer), 8), dataset.word_rarity)
    assert torch.equal(columns["word_weights"], expected)
    assert torch.allclose(columns["word_weights"].sum(1), torch.ones(12))


def all_places(sizes: list[int]) -> list[tuple[int, int]]:
    return [(shard, number) for shard, size in enumerate(sizes) for number in range(size)]


def captions_of(columns: dict[str, torch.Tensor], tokenizer: AutoTokenizer) -> list[str]:
    return tokenizer.batch_decode(columns["input_ids"], skip_special_tokens=True)


def test_the_head_learns_words_and_trains_the_image_tower_alone() -> None:
    model, inputs = test_reconstruction.build(WordsFlipModel), batch()
    plain = test_reconstruction.build(FlipModel)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    first = model(**inputs, return_logits=False).second_losses.mean()
    assert first.item() == pytest.approx(math.log(16), abs=0.3)
    first.backward()
    for name, parameter in model.named_parameters():
        trained = name.startswith(("vision_model.", "word_head."))
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trained, name
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**inputs, return_logits=False).second_losses.mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < first.item() - 0.7


def test_a_run_leaves_nothing_in_the_export(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    stages = [{"name": "masked", "samples": 96, "mask_ratio": 0.5, "base_lr": 0.012}, {"name": "whole", "samples": 32}]
    main(["pretrain", "--config", str(write_recipe(tmp_path, stages=stages, loss={"word_weight": 0.5}))])
    records = [record for record in metrics(tmp_path) if "loss" in record]
    assert all({"word_loss", "word_grad_norm", "contrastive_grad_norm"} <= record.keys() for record in records)
    assert records[-1]["word_loss"] < records[0]["word_loss"] - 0.05
    exported = load_file(tmp_path / "model/model.safetensors")
    saved = CheckpointReader(tmp_path / "checkpoints/step-00000008")
    assert "word_head.weight" in saved.shapes
    assert {name for name in saved.shapes if not name.startswith("word_head.")} == exported.keys()
    assert '"FlipModel"' in (tmp_path / "model/config.json").read_text()


def test_a_resumed_run_ends_with_the_same_bits(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """The words are counted again at each start. The cut is in a stage that had begun."""
    stages = [{"name": "masked", "samples": 96, "mask_ratio": 0.5, "base_lr": 0.012}, {"name": "whole", "samples": 32}]
    changes = {"stages": stages, "loss": {"word_weight": 0.5}, "save": {"every_samples": 16, "total_limit": 8}}
    main(["pretrain", "--config", str(write_recipe(tmp_path / "whole", **changes))])
    cut(tmp_path / "whole", tmp_path / "cut", 4)
    main(["pretrain", "--config", str(write_recipe(tmp_path / "cut", **changes))])
    whole, again = (load_file(tmp_path / name / "checkpoints/step-00000008/part-00000.safetensors") for name in RUNS)
    assert any("word_head" in name for name in whole)
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    steps = [[(r["word_loss"], r["grad_norm"]) for r in metrics(tmp_path / name) if "loss" in r] for name in RUNS]
    assert len(steps[0]) == 8
    assert steps[0] == steps[1]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"kind": "captioning"}, "loss.kind is captioning and loss.word_weight is 2"),
        ({"reconstruction_weight": 1.0}, "loss.reconstruction_weight is 1.0 and loss.word_weight is 2"),
        ({"caption_weight": 1.0}, "loss.word_weight is 2.0 and loss.caption_weight is 1"),
        ({"captions_per_image": 2}, "loss.word_weight is 2.0 and loss.captions_per_image is 2"),
    ],
)
def test_refusals(loss: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_objective(LossRecipe(word_weight=2.0, **loss), MaskRecipe())


def test_a_text_mask_and_other_families_are_refused(write_recipe: Callable[..., Path], tmp_path: Path, refused) -> None:
    stages = [{"name": "masked", "samples": 96, "mask_ratio": 0.5, "text_mask_ratio": 0.5, "base_lr": 0.012}]
    file = write_recipe(tmp_path / "run", stages=stages, loss={"word_weight": 1.0})
    assert "text_mask_ratio of a stage is 0.5; expected 0" in refused("pretrain", "--config", file)
    assert "loss.word_weight is 1.0 and" in refused("pretrain", "--config", file, "--model.family", "siglip")
