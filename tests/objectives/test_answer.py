"""The loss of answers to questions, and its runs."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import COLOURS, SHAPES, TOWERS, changed_recipe, check_start, cut, draw, metrics, trained, write_tar
from distributed.crowd import Crowds
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForVisualQuestionAnswering

from flipscale.cli import main
from flipscale.data.pairs import InputShape
from flipscale.data.sources.tar import TarSource
from flipscale.data.tokenizers import load_tokenizer
from flipscale.engines.first_weights import build_weights, fresh_weights
from flipscale.model import FlipConfig
from flipscale.model.modeling_flip_vqa import answer_losses
from flipscale.objectives.answer import Answer
from flipscale.recipe.data import DataRecipe
from flipscale.start.complete_recipe import parse_recipe

Write = Callable[..., Path]
ANSWERS = [*COLOURS, *SHAPES]
FUSION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
CONFIG = FlipConfig(**changed_recipe(TOWERS, {"text_config": {"attend_to_padding": False}}), answer_config=FUSION)
OBJECTIVE = Answer(num_answers=5)


def build(**fusion: Any) -> Any:
    config = OBJECTIVE.model_config(FlipConfig(**{**CONFIG.to_dict(), "answer_config": {**FUSION, **fusion}}))
    return build_weights(config, lambda _: None, fresh_weights(0), lambda _: None, OBJECTIVE.model_class)


def batch(size: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 12, (size, 8), generator=generator) * (torch.arange(8) < torch.arange(1, size + 1)[:, None])
    return {
        "patches": torch.randint(0, 256, (size, 16, 192), generator=generator, dtype=torch.uint8),
        "input_ids": ids.int(),
        "attention_mask": ids > 0,
        "labels": torch.rand(size, 5, generator=generator),
    }


def test_the_loss_is_the_sum_of_binary_cross_entropies() -> None:
    logits, labels = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 5, dtype=torch.float64)
    share = 1 / (1 + (-logits).exp())
    expected = -(labels * share.log() + (1 - labels) * (1 - share).log()).sum(dim=1)
    assert torch.allclose(answer_losses(logits, labels).double(), expected, rtol=1e-5)


@pytest.mark.parametrize("sees_image", [True, False])
def test_every_parameter_has_a_gradient(sees_image: bool) -> None:
    model = build(sees_image=sees_image)
    output = model(**batch())
    rest = [*OBJECTIVE.loss_inputs(output), *OBJECTIVE.parameters(output).values()]
    (OBJECTIVE.per_sample_loss(output) + 0.0 * torch.stack([value.sum() for value in rest]).sum()).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == ([] if sees_image else ["fusion.embed_image.weight", "fusion.embed_image.bias"])
    of_tower = model.vision_model.embeddings.patch_embedding.weight.grad.abs().max()
    assert of_tower > 1e-6 if sees_image else of_tower == 0


def test_padding_of_a_question_changes_nothing() -> None:
    model, inputs = build().eval(), batch()
    short = {**inputs, "input_ids": inputs["input_ids"][:, :6], "attention_mask": inputs["attention_mask"][:, :6]}
    assert torch.allclose(model(**inputs).logits, model(**short).logits, atol=1e-6)


def npy(*votes: int) -> bytes:
    stored = io.BytesIO()
    np.save(stored, np.array(votes, np.int16))
    return stored.getvalue()


def write_questions(folder: Path, count: int, answers: Callable[[int, str], dict[str, bytes]]) -> Path:
    """Write pictures with questions about the colour and the shape in turn."""
    rng, samples = np.random.default_rng(0), []
    for number in range(count):
        colour, shape = str(rng.choice([*COLOURS])), str(rng.choice(SHAPES))
        image = cv2.imencode(".png", cv2.cvtColor(draw(colour, shape, rng), cv2.COLOR_RGB2BGR))[1].tobytes()
        question, answer = (b"the red", shape) if number % 2 else (b"a disc", colour)
        samples.append({"png": image, "txt": question, **answers(number, answer)})
    write_tar(folder / "0.tar", samples)
    (folder / "classnames.txt").write_text("".join(f"{answer}\n" for answer in ANSWERS), encoding="utf-8")
    return folder


def label(number: int, answer: str) -> dict[str, bytes]:
    return {"cls": str(ANSWERS.index(answer)).encode()}


def read(folder: Path, tokenizer_dir: Path, count: int) -> dict[str, Any]:
    tokenizer, data = load_tokenizer(str(tokenizer_dir), 8), DataRecipe(crop_scale=(1.0, 1.0), num_workers=0)
    shape, source = InputShape.of(CONFIG), TarSource(str(folder))
    return Answer(num_answers=8).dataset(source, tokenizer, data, shape, 0, 0.0).__getitems__(list(range(count)))


def test_labels_are_the_scores_of_the_votes(tmp_path: Path, tokenizer_dir: Path) -> None:
    several = {"npy": npy(1, 2, 3, 4, 9, 0, 0, 0, 5)}
    found = read(write_questions(tmp_path / "votes", 4, lambda *_: several), tokenizer_dir, 4)["labels"]
    assert torch.equal(found, torch.tensor([[0.3, 0.6, 0.9, 1, 1, 0, 0, 0]]).expand(4, 8))
    found = read(write_questions(tmp_path / "one", 4, lambda *_: {"cls": b"2"}), tokenizer_dir, 4)["labels"]
    assert torch.equal(found, torch.eye(8)[2].expand(4, 8))


def test_a_question_without_an_answer_is_replaced_and_counted(tmp_path: Path, tokenizer_dir: Path) -> None:
    bad = ({}, {"npy": npy(1, 2)}, {"npy": b"no array"})
    answers = lambda number, answer: bad[number] if number < len(bad) else label(number, answer)  # noqa: E731
    found = read(write_questions(tmp_path / "set", 8, answers), tokenizer_dir, 8)
    assert found["labels"].sum(dim=1).tolist() == [1.0] * 8
    assert sorted(fault.cause for fault in found["faults"]) == ["missing_label", "wrong_votes", "wrong_votes"]


def test_an_answer_outside_of_the_list_is_an_error(tmp_path: Path, tokenizer_dir: Path) -> None:
    folder = write_questions(tmp_path / "set", 4, lambda *_: {"cls": b"8"})
    with pytest.raises(ValueError, match=r"has answer 8, .*loss.options.num_answers"):
        read(folder, tokenizer_dir, 4)


@pytest.fixture
def write(write_recipe: Write, tokenizer_dir: Path) -> Write:
    """Writes the recipe of a model that answers questions."""

    def write(run_dir: Path, folder: Path, **changes: Any) -> Path:
        sections = {
            "model": {"answer_config": FUSION},
            "data": {"shards": str(folder), "global_batch_size": 16, "crop_scale": [1.0, 1.0]},
            "loss": {"kind": "answer", "options": {"num_answers": len(ANSWERS)}},
            "stages": [{"name": "answering", "samples": 4800, "base_lr": 0.05, "warmup_samples": 64}],
            "eval": {"tasks": [{"kind": "vqa", "data": str(folder)}], "num_workers": 0},
        }
        return write_recipe(run_dir, **{**sections, **changes})

    return write


@pytest.mark.long
def test_a_run_learns_to_answer(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, run_dir = write_questions(tmp_path / "set", 64, label), tmp_path / "run"
    trained(write(run_dir, folder))
    # Without the image, a quarter of the answers would be right.
    assert [record["vqa/accuracy"] for record in metrics(run_dir) if "vqa/accuracy" in record][-1] > 50
    model = AutoModelForVisualQuestionAnswering.from_pretrained(run_dir / "model").eval()
    assert list(model.config.id2label.values()) == ANSWERS
    main(["evaluate", str(run_dir), "--task", f"{{kind: vqa, data: {folder}}}", "--json"])
    card = (run_dir / "model/README.md").read_text()
    assert "pipeline_tag: visual-question-answering" in card
    monkeypatch.chdir(run_dir)
    Image.new("RGB", (48, 40), (200, 30, 30)).save("image.png")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    capsys.readouterr()
    exec(code.replace(", trust_remote_code=True", ""), {})
    assert capsys.readouterr().out.strip() in ANSWERS


@pytest.mark.parametrize("engine", ["ddp", *(pytest.param(e, marks=pytest.mark.long) for e in ("fsdp2", "zero3"))])
def test_two_processes_with_micro_batches(tmp_path: Path, write: Write, crowds: Crowds, engine: str) -> None:
    """They learn the same as one process, with and without mask, and a stopped run resumes bit for bit."""
    stages = [
        {"name": "masked", "samples": 48, "mask_ratio": 0.75, "base_lr": 0.05, "warmup_samples": 16},
        {"name": "unmasked", "samples": 48},
    ]
    changes = {"stages": stages, "save": {"every_samples": 32, "total_limit": 20}}
    folder, runs = write_questions(tmp_path / "set", 64, label), [tmp_path / name for name in ("one", "many", "cut")]
    parts = {"shards": str(folder), "global_batch_size": 16, "crop_scale": [1.0, 1.0], "micro_batch_size": 4}
    assert crowds(1).run("train", "ddp", write(runs[0], folder, **changes)) == ["done"]
    assert crowds(2).run("train", engine, write(runs[1], folder, **changes, data=parts)) == ["done"] * 2
    cut(runs[1], runs[2], 2)
    assert crowds(2).run("train", engine, write(runs[2], folder, **changes, data=parts)) == ["done"] * 2
    one, many, resumed = ([record["loss"] for record in metrics(run_dir) if "loss" in record] for run_dir in runs)
    assert len(one) == 6
    assert one == pytest.approx(many, abs=1e-5)
    assert one[-1] < one[0] - 0.5, "nothing was learned"
    assert resumed == many
    last = [metrics(run_dir)[-1]["vqa/accuracy"] for run_dir in runs]
    assert last == [last[0]] * 3
    ends = [load_file(run_dir / "model/model.safetensors") for run_dir in runs[1:]]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_contradicting_recipes_are_refused(tmp_path: Path, write: Write) -> None:
    folder = write_questions(tmp_path / "set", 16, label)
    for changes, message in (
        ({"loss": {"kind": "answer", "options": {"num_answers": 9}}}, "names 8 classes, loss.options says 9"),
        ({"loss": {"kind": "infonce"}, "model": {}}, "vqa.* has no list of answers"),
        ({"eval": {"tasks": [{"kind": "captioning", "data": str(folder)}]}}, "captioning.* has no decoder"),
    ):
        with pytest.raises(ValueError, match=message):
            check_start(parse_recipe(["--config", str(write(tmp_path / "run", folder, **changes))]))
