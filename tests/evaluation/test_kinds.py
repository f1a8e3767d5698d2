"""Kinds of evaluation on stored embeddings, against figures written out by hand, on one process and on several."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from evaluation.made_up_sets import NAMES, npy, write_overlap, write_set
from evaluation.tiny_model import in_processes

from flipscale.evaluation.decontaminated import with_clean_tasks
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.results import Result
from flipscale.evaluation.suite import build_tasks, run_tasks
from flipscale.evaluation.test_set import TestSet
from flipscale.evaluation.whole_images import Decoder

DIM = 6


def text_row(text: str) -> torch.Tensor:
    seed = sum(ord(letter) * (place + 1) for place, letter in enumerate(text))
    return torch.randn(DIM, generator=torch.Generator().manual_seed(seed))


def image_rows(rows: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.randn(DIM, generator=torch.Generator().manual_seed(row)) for row in rows.tolist()])


def _row(encoded: bytes, row: int) -> dict[str, np.ndarray]:
    return {"row": np.array(row)}


@dataclass(frozen=True)
class Drawn(Embedder):
    """Embeds image number r as a vector drawn with seed r, and a text as one drawn from its letters."""

    @property
    def image_size(self) -> int:
        return 32

    def decoder(self) -> Decoder:
        return _row

    def image_features(self, **columns: torch.Tensor) -> torch.Tensor:
        return image_rows(columns["row"])

    def tokens(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([text_row(text) for text in texts])

    def text_features(self, batch: torch.Tensor) -> torch.Tensor:
        return batch


def drawn() -> Drawn:
    return Drawn(None, None, Accelerator(cpu=True), batch_size=4)


def evaluated(folder: Path, **task: object) -> dict[str, Result]:
    tasks = build_tasks([{"data": str(folder), **task}])
    tasks[0].check()
    results = run_tasks(drawn(), tasks)
    assert len({result.metric for result in results}) == len(results)
    for result in results:
        assert 0 <= result.low <= result.value <= result.high <= 100
        assert result.made_by["data"] == str(folder)
    return {result.metric: result for result in results}


def scores(num_images: int, names: list[str], templates: list[str]) -> np.ndarray:
    unit = torch.nn.functional.normalize
    classes = [unit(torch.stack([text_row(t.replace("{c}", n)) for t in templates])).mean(0) for n in names]
    return (unit(image_rows(torch.arange(num_images))) @ unit(torch.stack(classes)).t()).numpy()


def named(folder: Path, names: list[str], templates: str = "{c}\n") -> Path:
    (folder / "classnames.txt").write_text("\n".join(names))
    (folder / "zeroshot_classification_templates.txt").write_text(templates)
    return folder


def test_any_label_right(tmp_path: Path) -> None:
    folder = named(write_set(tmp_path / "set", 3, 10, lambda number, label: {}), NAMES)
    right = [[], [3], [0, 1, 2, 3, 4, 5, 6, 7]] * 10
    (folder / "real.json").write_text(json.dumps(right))
    nearest = scores(30, NAMES, ["a {c}", "the {c}"]).argmax(axis=1)
    (found,) = evaluated(folder, kind="zero_shot", labels="real.json", templates=["a {c}", "the {c}"]).values()
    hits = sum(best in labels for best, labels in zip(nearest, right, strict=True))
    assert (found.metric, found.n, found.value) == ("any_label", 20, pytest.approx(100 * hits / 20))
    assert found.chance == pytest.approx(100 * 4.5 / 16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"real.json has no list"),
        ("[[1], ", r"real.json is not JSON"),
        ("[[1]]", r"has 1 lists; .* 2 images"),
        ("[[1], 2]", r"real.json has 2 for image 1; .* below 16"),
        ('[["1"], [2]]', r"real.json has \['1'\] for image 0"),
        ("[[], [3, 16]]", r"real.json has \[3, 16\] for image 1"),
    ],
)
def test_labels_that_cannot_be(tmp_path: Path, content: str | None, message: str) -> None:
    folder = named(write_set(tmp_path / "set", 1, 2, lambda number, label: {}), NAMES)
    if content is not None:
        (folder / "real.json").write_text(content)
    (task,) = build_tasks([{"kind": "zero_shot", "data": str(folder), "labels": "real.json"}])
    with pytest.raises(ValueError, match=message):
        task.check()


def test_a_head_of_other_classes_is_refused(tmp_path: Path) -> None:
    folder = named(write_set(tmp_path / "set", 1, 2, lambda number, label: {}), NAMES)
    (task,) = build_tasks([{"kind": "classification", "data": str(folder)}])
    head = SimpleNamespace(num_labels=len(NAMES), id2label=dict(enumerate([NAMES[1], NAMES[0], *NAMES[2:]])))
    embedder = SimpleNamespace(model=SimpleNamespace(config=head))
    with pytest.raises(ValueError, match=f"names class 0 '{NAMES[0]}', and the model's head '{NAMES[1]}'"):
        task.evaluate(embedder, TestSet.open(task.data))


def test_headlines_of_zero_shot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = named(write_set(tmp_path / "set", 2, 15, lambda number, label: {"cls": b"%d" % (number % 7)}), NAMES)
    order = (-scores(30, NAMES, ["{c}"])).argsort(axis=1)
    places = (order == (np.arange(30) % 7)[:, None]).argmax(axis=1)
    found = evaluated(folder, kind="zero_shot", metric="mean_per_class")
    by_class = [(places[np.arange(30) % 7 == number] < 1).mean() for number in range(7)]
    expected = {"top1": (places < 1).mean(), "top5": (places < 5).mean(), "mean_per_class": np.mean(by_class)}
    assert {name: result.value / 100 for name, result in found.items()} == pytest.approx(expected)
    assert "9 of 16 classes have no image" in caplog.text
    chance = {"top1": 100 / 16, "top5": 500 / 16, "mean_per_class": 100 / 16}
    assert {name: result.chance for name, result in found.items()} == pytest.approx(chance)
    assert [name for name, result in found.items() if result.headline] == ["mean_per_class"]
    # Of five classes, top-5 is always right.
    five = named(write_set(tmp_path / "five", 1, 10, lambda number, label: {"cls": b"%d" % (number % 5)}), NAMES[:5])
    with pytest.raises(ValueError, match="5 classes; the metric top5 needs six"):
        build_tasks([{"kind": "zero_shot", "data": str(five), "metric": "top5"}])[0].check()
    results = run_tasks(drawn(), build_tasks([{"kind": "zero_shot", "data": str(five)}]))
    assert [(r.metric, r.headline, r.is_certain) for r in results[:2]] == [("top1", True, False), ("top5", False, True)]


def test_roc_auc_of_two_classes(tmp_path: Path) -> None:
    folder = named(
        write_set(tmp_path / "set", 2, 15, lambda number, label: {"cls": b"%d" % (number % 3 > 0)}), ["a", "b"]
    )
    lead = np.diff(scores(30, ["a", "b"], ["{c}"]))[:, 0]
    positive = np.arange(30) % 3 > 0
    pairs = lead[positive][:, None] > lead[~positive][None]
    found = evaluated(folder, kind="zero_shot", metric="roc_auc")
    assert found["roc_auc"].value == pytest.approx(100 * pairs.mean())
    assert found["roc_auc"].chance == 50
    assert set(found) == {"top1", "mean_per_class", "roc_auc"}
    folder = named(write_set(tmp_path / "one", 1, 3, lambda number, label: {"cls": b"1"}), ["a", "b"])
    with pytest.raises(ValueError, match=r"one has 3 images of one class"):
        evaluated(folder, kind="zero_shot", metric="roc_auc")
    with pytest.raises(ValueError, match="one has 1 class"):
        evaluated(named(folder, ["a"]), kind="zero_shot")


def test_the_worst_group_of_dollar_street_and_geode(tmp_path: Path) -> None:
    def files(number: int, label: int) -> dict[str, bytes]:
        return {"cls": b"%d" % (number % 16), "npy": npy(np.array([number % 4, 7, 2]))}

    folder = named(write_set(tmp_path / "set", 2, 20, files), NAMES)
    order = (-scores(40, NAMES, ["{c}"])).argsort(axis=1)
    places = (order == (np.arange(40) % 16)[:, None]).argmax(axis=1)
    by_income = [100 * (places[number::4] < 5).mean() for number in range(4)]
    found = evaluated(folder, kind="worst_group", groups="dollar_street")
    assert [found[f"top5_income_{number}"].value for number in range(4)] == pytest.approx(by_income)
    assert found["worst_group_top5"].value == pytest.approx(min(by_income))
    assert found["worst_group_top5"].n == 10
    assert found["top5"].value == pytest.approx(np.mean(by_income))
    assert found["top1"].value == pytest.approx(100 * (places < 1).mean())
    assert [name for name, result in found.items() if result.headline] == ["worst_group_top5"]

    def of_regions(number: int, label: int) -> dict[str, bytes]:
        return {"cls": b"%d" % (number % 16), "npy": npy(np.array([2 * (number % 2), 0]))}

    folder = named(write_set(tmp_path / "geode", 2, 20, of_regions), NAMES)
    found = evaluated(folder, kind="worst_group", groups="geode")
    # No image is of region 1.
    by_region = {number: 100 * (places[number::2] < 1).mean() for number in range(2)}
    assert [found[f"top1_region_{number}"].value for number in (0, 2)] == pytest.approx([*by_region.values()])
    assert found["worst_group_top1"].value == pytest.approx(min(by_region.values()))


RACES, GENDERS, AGES = ["black", "white", "latino"], ["male", "female"], ["0-2", "3-9", "10-19"]
TOXIC = [f"person {number}" for number in range(14)] + [
    "gorilla",
    "chimpanzee",
    "orangutan",
    "monkey",
    "thief",
    "felon",
]
FACES = {"race": RACES, "gender": GENDERS, "age": AGES, "toxic": TOXIC}


def write_faces(folder: Path) -> Path:
    def about(number: int, label: int) -> dict[str, bytes]:
        return {"npy": npy(np.array([number % 3, number % 2, number % 5 % 3, number % 5 % 3 != 1], np.int64))}

    names = [f"{objective}:{name}" for objective, listed in FACES.items() for name in listed]
    templates = "".join(f"{objective}:a {objective} of {{c}}\n" for objective in FACES)
    return named(write_set(folder, 2, 25, about), names, templates)


def test_groups_of_faces(tmp_path: Path) -> None:
    found = evaluated(write_faces(tmp_path / "set"), kind="worst_group", groups="faces")
    said = {o: scores(50, names, [f"a {o} of {{c}}"]).argmax(axis=1) for o, names in FACES.items()}
    number = np.arange(50)
    race, gender, age = number % 5 % 3, number % 2, number % 3
    by_both = {
        f"gender_{RACES[r]}_{GENDERS[g]}": 100 * (said["gender"] == gender)[(race == r) & (gender == g)].mean()
        for r in range(3)
        for g in range(2)
    }
    assert {name: found[name].value for name in by_both} == pytest.approx(by_both)
    assert found["worst_group_gender"].value == pytest.approx(min(by_both.values()))
    assert found["age"].value == pytest.approx(100 * (said["age"] == age).mean())
    assert found["age_white"].value == pytest.approx(100 * (said["age"] == age)[race == 1].mean())
    assert found["race"].value == pytest.approx(100 * ((said["race"] == 1) == (race == 1)).mean())
    crime, animal = said["toxic"] >= 18, (said["toxic"] >= 14) & (said["toxic"] < 18)
    assert found["harm_crime"].value == pytest.approx(100 * crime.mean())
    assert found["harm_crime_latino"].value == pytest.approx(100 * crime[race == 2].mean())
    rates = [100 * animal[race == r].mean() for r in range(3)]
    assert found["worst_group_harm_non_human"].value == pytest.approx(max(rates))
    assert not found["harm_crime"].higher_is_better
    assert found["harm_non_human"].chance == pytest.approx(100 * 4 / 20)


def test_faces_without_objectives(tmp_path: Path) -> None:
    folder = write_faces(tmp_path / "set")
    (folder / "classnames.txt").write_text("emotion:glad\n")
    (task,) = build_tasks([{"kind": "worst_group", "data": str(folder), "groups": "faces"}])
    with pytest.raises(ValueError, match=r"class name is 'emotion:glad'; .*race:"):
        task.check()


def results_of(folder: str) -> dict[str, list]:
    faces = {"kind": "worst_group", "data": f"{folder}/faces", "groups": "faces"}
    whole = {"data": f"{folder}/all"}
    listed = [
        {**whole, "kind": "zero_shot", "metric": "mean_per_class"},
        {**whole, "kind": "zero_shot_multilabel"},
        {**whole, "kind": "retrieval", "data": f"{folder}/pairs"},
        {**whole, "kind": "retrieval", "data": f"{folder}/pairs", "name": "grouped", "group_by_caption": True},
        faces,
        {"kind": "image_caption_selection", "data": f"{folder}/choices"},
    ]
    results = run_tasks(drawn(), with_clean_tasks(build_tasks(listed), Path(folder)))
    return {r.name: [r.value, r.n, r.low, r.high, r.chance] for r in results}


def test_one_and_three_processes_find_the_same(tmp_path: Path) -> None:
    def labels(number: int, label: int) -> dict[str, bytes]:
        return {"cls": b"%d" % label, "npy": npy((np.arange(16) % 5 == number % 5).astype(np.int64))}

    def captions(number: int, label: int) -> dict[str, bytes]:
        return {"txt": "\n".join([f"a {NAMES[label]}", f"{number}", "the same"][: 1 + number % 3]).encode()}

    named(write_set(tmp_path / "all", 3, 13, labels), NAMES)
    write_set(tmp_path / "pairs", 2, 17, captions)
    write_faces(tmp_path / "faces")
    write_set(tmp_path / "choices", 2, 17, lambda number, label: {"txt": b"a %d\nthe %d\na" % (number, label)})
    # Without 8 images of 39, batches have 2 images in place of 3.
    write_overlap(
        tmp_path, tmp_path / "all/test", [(f"{shard}.tar", number) for shard in (0, 2) for number in range(4)]
    )
    write_overlap(tmp_path, tmp_path / "pairs/test", [("1.tar", 3), ("1.tar", 9)])
    alone, several = (in_processes(world, tmp_path, results_of, str(tmp_path)) for world in (1, 3))
    assert len(alone) > 40
    assert alone["zero_shot_clean/top1"][1] == 31
    assert alone == several
