"""Composition: the counts of the papers' code and of CLIP_benchmark on the same made-up cosines."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from clip_benchmark.metrics import image_caption_selection
from evaluation.made_up_sets import write_overlap, write_set
from evaluation.test_kinds import Drawn, drawn, evaluated, image_rows, text_row

from flipscale.evaluation.decontaminated import with_clean_tasks
from flipscale.evaluation.intervals import clustered_share, wilson
from flipscale.evaluation.results import Result
from flipscale.evaluation.suite import build_tasks, check_decodable, run_tasks

KIND = "image_caption_selection"
SUBSETS = ["add_att", "replace obj", "swap_att"]
unit = torch.nn.functional.normalize


def choices(number: int) -> list[str]:
    """Caption of an image, then one to three wrong ones."""
    return [f"a fox {number} and a hen", *(f"a hen {number} and {n} foxes" for n in range(1 + number % 3))]


def pair(number: int) -> list[str]:
    first = number - number % 2
    two = [f"some grass {first} covering a mug", f"a mug {3 * first} covering some grass"]
    return two[:: -1 if number % 2 else 1]


def write(folder: Path, captions: Callable[[int], list[str]], count: int = 60, subsets: bool = False) -> Path:
    def files(number: int, label: int) -> dict[str, bytes]:
        # The last ten images are in no subset.
        own = {"cls": b"%d" % (number % 7 % 3)} if subsets and number < count - 10 else {}
        return {"txt": "\n".join(captions(number)).encode(), **own}

    write_set(folder, 2, count // 2, files)
    if subsets:
        (folder / "classnames.txt").write_text("\n".join(SUBSETS))
    return folder


def cosines(number: int, captions: list[str]) -> np.ndarray:
    """Cosines of an image with texts: `(texts,)`."""
    return (
        unit(torch.stack([text_row(text) for text in captions])) @ unit(image_rows(torch.tensor([number])))[0]
    ).numpy()


class Theirs(torch.nn.Module):
    """The same vectors for CLIP_benchmark, whose images are their numbers."""

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return image_rows(images[:, 0, 0, 0].long())

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens


def theirs(images: list[list[int]], captions: list[list[str]]) -> dict[str, float]:
    """CLIP_benchmark's figures of instances of one or two images."""
    pixels = [torch.tensor(own, dtype=torch.float32).reshape(1, -1, 1, 1, 1).expand(-1, -1, 3, 2, 2) for own in images]
    batches = [(own, [texts]) for own, texts in zip(pixels, captions, strict=True)]
    tokens = lambda texts: torch.stack([text_row(text) for text in texts])  # noqa: E731
    found = image_caption_selection.evaluate(Theirs(), batches, tokens, "cpu", amp=False)
    return {name: 100 * value for name, value in found.items()}


def test_subsets_and_their_macro_mean(tmp_path: Path) -> None:
    found = evaluated(write(tmp_path / "set", choices, subsets=True), kind=KIND)
    scores = [cosines(number, choices(number)) for number in range(60)]
    # SugarCrepe's main_eval.py: a hit is a right caption above the wrong one.
    hits = np.array([all(score[0] > other for other in score[1:]) for score in scores])
    # ARO's VG_Relation.evaluate_scores: the right caption is the last option.
    assert hits.tolist() == [int(np.argmax([*score[1:], score[0]]) == len(score) - 1) for score in scores]
    subset = np.arange(60) % 7 % 3
    subset[50:] = -1
    own = [100 * hits[subset == number].mean() for number in range(3)]
    names = ["accuracy_add_att", "accuracy_replace_obj", "accuracy_swap_att"]
    assert [found[name].value for name in names] == pytest.approx(own)
    assert [found[name].shown for name in names] == [f"accuracy, {name}" for name in SUBSETS]
    assert found["macro_accuracy"].value == pytest.approx(np.mean(own))
    assert [name for name, result in found.items() if result.headline] == ["macro_accuracy"]
    assert (found["accuracy"].value, found["accuracy"].n) == (pytest.approx(100 * hits.mean()), 60)
    chances = 100 / np.array([len(score) for score in scores])
    assert found["accuracy"].chance == pytest.approx(chances.mean())
    assert found["accuracy"].chance < found["accuracy"].value + 30
    low, high = wilson(hits[subset == 0].sum(), int((subset == 0).sum()))
    assert (found[names[0]].low, found[names[0]].high) == pytest.approx((100 * low, 100 * high))
    widths = [(found[name].high - found[name].low) / 2 for name in names]
    macro = found["macro_accuracy"]
    assert (macro.high - macro.low) / 2 == pytest.approx(np.sqrt(np.square(widths).sum()) / 3)
    assert 10 < hits.sum() < 50


def test_clip_benchmark_counts_the_same(tmp_path: Path) -> None:
    found = evaluated(write(tmp_path / "one", choices), kind=KIND)
    assert list(found) == ["accuracy"]
    assert found["accuracy"].headline
    expected = theirs([[number] for number in range(60)], [choices(number) for number in range(60)])
    assert found["accuracy"].value == pytest.approx(expected["text_acc"])
    found = evaluated(write(tmp_path / "two", pair), kind=KIND, pairs=True)
    expected = theirs(
        [[number, number + 1] for number in range(0, 60, 2)], [pair(number) for number in range(0, 60, 2)]
    )
    values = {name: result.value for name, result in found.items()}
    assert values == pytest.approx(
        {"text_score": expected["text_acc"], "image_score": expected["image_acc"], "group_score": expected["acc"]}
    )
    assert {result.n for result in found.values()} == {30}
    assert [result.chance for result in found.values()] == pytest.approx([25, 25, 100 / 6])
    assert 0 < found["group_score"].value < min(values["text_score"], values["image_score"])


def test_equal_texts_and_equal_cosines(tmp_path: Path) -> None:
    """ARO's orders: a shuffle of few words may give the caption again, and argmax takes the first. An order-blind model
    has equal cosines of different texts, which are no hit, as in SugarCrepe's and Winoground's code."""
    folder = write(tmp_path / "same", lambda number: ["a fox", "a fox", "a fox"], 4)
    (same,) = run_tasks(drawn(), build_tasks([{"kind": KIND, "data": str(folder)}]))
    assert (same.value, same.chance) == (100, 100)

    def blind(number: int) -> list[str]:
        return [f"{number} fox", f"{number} fox "]

    @dataclass(frozen=True)
    class Blind(Drawn):
        def tokens(self, texts: list[str]) -> torch.Tensor:
            return super().tokens([text.strip() for text in texts])

    tasks = build_tasks([{"kind": KIND, "data": str(write(tmp_path / "blind", blind, 4))}])
    (result,) = run_tasks(Blind(None, None, Accelerator(cpu=True), batch_size=4), tasks)
    assert (result.value, result.chance) == (0, 50)


@dataclass(frozen=True)
class Repeated(Drawn):
    """Of every three images, all are one picture."""

    def image_features(self, **columns: torch.Tensor) -> torch.Tensor:
        return image_rows(columns["row"] // 3)


def test_queries_of_one_picture_are_a_cluster(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", choices)
    tasks = build_tasks([{"kind": KIND, "data": str(folder)}])
    (result,) = run_tasks(Repeated(None, None, Accelerator(cpu=True), batch_size=6), tasks)
    hits = np.array([cosines(number // 3, choices(number)).argmax() == 0 for number in range(60)])
    expected = clustered_share(hits.reshape(20, 3).sum(axis=1), np.full(20, 3))
    assert (result.value, result.low, result.high) == pytest.approx([100 * part for part in expected])
    assert not result.outcomes, "a comparison in pairs would treat them as independent"


def test_pairs_that_are_left_without_the_training_images(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", pair)
    write_overlap(tmp_path, folder / "test", [("0.tar", 3), ("1.tar", 0), ("1.tar", 1)])
    tasks = with_clean_tasks(build_tasks([{"kind": KIND, "data": str(folder), "pairs": True}]), tmp_path)
    results = run_tasks(Drawn(None, None, Accelerator(cpu=True), batch_size=4), tasks)
    by_name: dict[str, Result] = {result.name: result for result in results}
    assert (by_name[f"{KIND}/text_score"].n, by_name[f"{KIND}_clean/text_score"].n) == (30, 28)
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(by_name[f"{KIND}/text_score"].outcomes), np.uint8))[:30]
    left = np.delete(bits, [1, 15])
    assert by_name[f"{KIND}_clean/text_score"].value == pytest.approx(100 * left.mean())


def test_sets_that_cannot_be(tmp_path: Path) -> None:
    alone = write(tmp_path / "alone", lambda number: ["a fox", "a hen"][: 2 - number % 2], 4)
    with pytest.raises(ValueError, match=r"0.tar#1 has only the caption 'a fox'; list a wrong caption .* KEY.txt"):
        evaluated(alone, kind=KIND)
    (task,) = build_tasks([{"kind": KIND, "data": str(alone)}])
    with pytest.raises(ValueError, match=r"#\d+ has only the caption 'a fox'"):
        check_decodable([task], 32, 0, 1)
    unpaired = write(tmp_path / "unpaired", lambda number: pair(number if number != 8 else 40), 12)
    with pytest.raises(ValueError, match=r"images 8 and 9 have .*grass 40.*grass 8.* with `pairs`, both"):
        evaluated(unpaired, kind=KIND, pairs=True)
    with pytest.raises(ValueError, match=r"images 0 and 1 have"):
        evaluated(write(tmp_path / "three", choices, 4), kind=KIND, pairs=True)
    named = write(tmp_path / "named", choices, 20, subsets=True)
    (named / "classnames.txt").write_text("add_att\nswap_att\n")
    with pytest.raises(ValueError, match=r"has class 2; 2 are listed"):
        evaluated(named, kind=KIND)
    (named / "classnames.txt").write_text("C\nC++\nrust\n")
    with pytest.raises(ValueError, match=r"has 'C' and 'C\+\+', both accuracy_c"):
        build_tasks([{"kind": KIND, "data": str(named)}])[0].check()
