"""Linear probes and few shots of a tiny model: against plain computations, on several processes, and bad input."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import processes
import pytest
import torch
from accelerate import Accelerator
from conftest import TOWER, add_member, flipscale, metrics, pretrain, write_shards
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from flipscale import cli
from flipscale.data.decode import DRAWS_PER_CROP, decode_box
from flipscale.data.randomness import keyed_uniform
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedders.plain import plain_embedder
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.images import ChosenRows
from flipscale.evaluation.kinds.few_shot import FewShot
from flipscale.evaluation.metrics import mean_per_class
from flipscale.evaluation.nearest_neighbour import hog_features
from flipscale.evaluation.probe.sets import LabelledSet, Sets
from flipscale.evaluation.probe.views import RandomCrops
from flipscale.evaluation.reports.record import read_lines
from flipscale.evaluation.results import Result, read_results
from flipscale.evaluation.suite import build_tasks
from flipscale.hub.card import results_table
from flipscale.hub.loading import open_embedder
from flipscale.model import FlipConfig, FlipModel


@pytest.fixture(scope="module")
def model(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with random weights; its pooled features are wider than its embeddings."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = FlipConfig(
        vision_config={**TOWER, "image_size": 32, "patch_size": 8},
        text_config={**TOWER, "vocab_size": 16, "max_position_embeddings": 8},
        projection_dim=16,
    )
    FlipModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def embedder(model: Path) -> Embedder:
    return Embedder(FlipModel.from_pretrained(model).eval(), None, Accelerator(cpu=True), batch_size=64)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """216 images of 16 classes in three shards."""
    folder = tmp_path_factory.mktemp("train")
    write_shards(folder, [100, 1, 115], seed=1)
    return folder


def probed(embedder: Embedder, train: Path, test: Path, **options: object) -> list[Result]:
    """The results of a probe."""
    (task,) = build_tasks([{"kind": "probe", "data": str(test), "train": str(train), **options}])
    return task.evaluate(embedder)


def sets_of(train: Path, test: Path) -> Sets:
    return Sets(LabelledSet.open(str(train), "train"), LabelledSet.open(str(test), "test"))


def known(embedder: Embedder, folder: Path, features: str = "pooled") -> tuple[np.ndarray, np.ndarray]:
    """The features and labels of a folder."""
    source = TarSource(str(folder))
    where = [(shard, number) for shard, size in enumerate(source.shard_sizes) for number in range(size)]
    labels = np.array([source.read_label(*place) for place in where])
    return embedder.images(source, features).double().numpy(), labels


@pytest.mark.parametrize(("features", "dim"), [("pooled", 32), ("embeds", 16)])
def test_regression_is_scikit_learn_s(features: str, dim: int, embedder: Embedder, train: Path, shards: Path) -> None:
    (inputs, labels), (asked, right) = (known(embedder, folder, features) for folder in (train, shards))
    assert inputs.shape == (216, dim)
    theirs = LogisticRegression(C=1 / 0.01, tol=1e-10, max_iter=20_000).fit(inputs, labels).predict(asked)
    top1, by_class = probed(embedder, train, shards, features=features, l2=0.01)
    assert top1.value == pytest.approx(100 * (theirs == right).mean(), abs=1.05)
    assert (top1.metric, top1.n, by_class.metric) == ("top1", 96, "mean_per_class")
    assert top1.low < top1.value < top1.high
    assert top1.chance == pytest.approx(100 * np.bincount(right).max() / 96)
    assert by_class.chance == pytest.approx(100 / 16)
    counts = np.bincount(right, minlength=16)
    hits = np.bincount(right[theirs == right], minlength=16)
    assert by_class.value == pytest.approx(100 * mean_per_class(hits, counts).value, abs=2.0)
    made = top1.made_by
    assert (made["features"], made["solver"], made["l2"], made["num_train"]) == (features, "lbfgs", 0.01, 216)
    assert made["converged"]
    assert "validation_top1" not in made


def test_the_penalty_is_searched_on_a_part_and_the_last_fit_is_to_all(
    embedder: Embedder, train: Path, shards: Path, tmp_path: Path
) -> None:
    made = probed(embedder, train, shards)[0].made_by
    assert 1e-6 <= made["l2"] <= 1e2
    again = probed(embedder, train, shards, l2=made["l2"])[0].made_by
    assert again["objective"] == pytest.approx(made["objective"], rel=1e-6)
    drawn = keyed_uniform(0, "probe validation", np.arange(216), 1)[:, 0] < 0.2
    inputs, labels = known(embedder, train)
    theirs = LogisticRegression(C=1 / made["l2"], tol=1e-9, max_iter=20_000).fit(inputs[~drawn], labels[~drawn])
    assert made["validation_top1"] == pytest.approx(100 * theirs.score(inputs[drawn], labels[drawn]), abs=2.5)
    write_shards(tmp_path / "other", [40], seed=2)
    made = probed(embedder, train, shards, validation=str(tmp_path / "other"))[0].made_by
    assert made["validation"] == str(tmp_path / "other")
    assert made["validation_top1"] * 40 / 100 == pytest.approx(round(made["validation_top1"] * 40 / 100))


def test_probes_are_the_same_on_any_number_of_processes(model: Path, train: Path, shards: Path, tmp_path: Path) -> None:
    """The counts to the last image; objectives and losses to rounding. The parts differ in size on 4 processes."""
    found = {}
    for world in (1, 2, 4):
        arguments = ["probes", str(tmp_path), str(model), str(train), str(shards)]
        done = processes.run("evaluation.probe_processes", arguments, world)
        assert done.returncode == 0, done.stderr
        ranks = [json.loads((tmp_path / f"{world}-{rank}.json").read_text()) for rank in range(world)]
        assert all(rank == ranks[0] for rank in ranks)
        found[world] = ranks[0]
    assert {name: len(results) for name, results in found[1].items()} == {
        "fixed": 2, "lars": 2, "few_shot": 3, "searched": 2,
    }  # fmt: skip
    for world in (2, 4):
        for name, results in found[world].items():
            for one, other in zip(found[1][name], results, strict=True):
                one, other = ({**some, "iterations": 0} for some in (one, other))
                assert other == {
                    key: pytest.approx(value, rel=1e-8) if isinstance(value, float) else value
                    for key, value in one.items()
                }
    lars = found[1]["lars"][0]
    assert (lars["solver"], lars["steps"], lars["batch_size"], lars["crop_scale"]) == ("lars", 9, 72, [0.08, 1.0])
    assert lars["loss"] < np.log(16), "it learned nothing"


def test_few_shots_are_big_vision_s(embedder: Embedder, train: Path, shards: Path) -> None:
    """All images of all classes, in place of a draw: then scikit-learn's ridge must say the same."""
    listed = {"kind": "few_shot", "data": str(shards), "train": str(train), "shots": [2, 500], "seeds": [0, 1, 2]}
    (task,) = build_tasks([listed])
    few, every = task.evaluate(embedder)
    (inputs, labels), (asked, right) = (known(embedder, folder) for folder in (train, shards))
    mean, deviation = inputs.mean(axis=0), inputs.std(axis=0) + 1e-5

    def scaled(rows: np.ndarray) -> np.ndarray:
        return np.hstack([(rows - mean) / deviation, np.full((len(rows), 1), 100.0)])

    ridge = RidgeClassifier(alpha=1024.0, fit_intercept=False).fit(scaled(inputs), labels)
    assert every.value == pytest.approx(100 * ridge.score(scaled(asked), right), abs=1e-9)
    assert (every.name, every.shown, every.headline) == ("few_shot/500_shot", "500-shot top-1", True)
    assert (few.name, few.headline, few.chance) == ("few_shot/2_shot", False, 100 / 16)
    assert few.low < few.value < few.high
    # All draws are the same three times, so its interval is that of the test images.
    assert every.high - every.low < few.high - few.low or few.value < every.value


def test_a_draw_takes_so_many_of_each_class_and_fewer_shots_are_among_more(
    embedder: Embedder, train: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    whole = TarSource.read
    monkeypatch.setattr(TarSource, "read", lambda self, *where: read.append(where) or whole(self, *where))

    def embedded(**changes: object) -> set[tuple[int, int]]:
        read.clear()
        FewShot("few_shot", str(shards), "few_shot", train=str(train), **changes).evaluate(embedder)
        return set(read[:-96])

    one, three = embedded(shots=[1], seeds=[4]), embedded(shots=[1, 3], seeds=[4])
    assert (len(one), len(three)) == (16, 48)
    assert one < three
    assert embedded(shots=[1], seeds=[5]) != one


def test_crops_are_those_of_seed_epoch_and_row(train: Path, embedder: Embedder) -> None:
    source = TarSource(str(train))
    order = np.array([205, 3, 100])
    crops = {
        (epoch, seed): RandomCrops(source, order, epoch, 32, (0.3, 0.6), seed)
        for epoch, seed in [(0, 0), (7, 0), (7, 1)]
    }
    pixels = {
        where: [decode_box(some.read(0, number).image, None, 32, (1.0, 1.0)) for number in range(3)]
        for where, some in crops.items()
    }
    draws = keyed_uniform(0, "probe crop", np.array([7 * 216 + 100]), DRAWS_PER_CROP)[0]
    expected = decode_box(source.read(1, 0).image, draws, 32, (0.3, 0.6))
    assert np.array_equal(pixels[7, 0][2], expected), "it was resized or cut again"
    for one, other in [((0, 0), (7, 0)), ((7, 0), (7, 1))]:
        assert not np.array_equal(pixels[one][0], pixels[other][0])
    chosen = embedder.images(ChosenRows(source, order))
    assert torch.allclose(chosen, embedder.images(source)[torch.from_numpy(order)], atol=1e-6)


def test_plain_features(train: Path) -> None:
    source, accelerator = TarSource(str(train)), Accelerator(cpu=True)
    image = decode_box(source.read(0, 0).image, None, 64, (1.0, 1.0))
    hog = plain_embedder("hog", accelerator).images(source, "pooled")
    assert np.allclose(hog[0], hog_features(image[None])[0], atol=1e-6)
    pixels = plain_embedder("pixels", accelerator).images(source, "pooled")
    assert pixels.shape == (216, 768)
    assert 0 <= pixels.min() < pixels.max() <= 1


def test_the_verb(model: Path, train: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with train/ and test/, the classes beside them, a table and a JSON line; random weights of the model's
    configuration, and pixels, stand beside it."""
    for part, folder in (("train", train), ("test", shards)):
        shutil.copytree(folder, tmp_path / "set" / part)
        (tmp_path / "set" / part / "classnames.txt").rename(tmp_path / "set/classnames.txt")
    monkeypatch.chdir(tmp_path)
    parts = ("--train", tmp_path / "set", "--test", tmp_path / "set", "--num_workers", "0", "--l2", "0.5")
    done = flipscale("probe", model, *parts)
    assert done.returncode == 0, done.stderr
    name, top1, by_class, how = done.stdout.splitlines()
    assert name == model.name
    assert top1.startswith("  top-1 ")
    assert by_class.startswith("  mean per class ")
    assert how.startswith("  lbfgs on the pooled features (before the projection) of 216 images: l2 0.5, ")
    lines = read_lines(model / "results.jsonl")
    assert [line.result.metric for line in lines] == ["top1", "mean_per_class"]
    assert lines[0].result.made_by.items() >= {"data": "set", "train": "set", "features": "pooled", "l2": 0.5}.items()
    assert lines[0].about.keys() >= {"weights", "versions", "image_size", "precision", "seconds"}
    assert "| probe, `set`, train `set`, solver lbfgs, features pooled | top-1 | this model | " in results_table(lines)
    # What stands there is not done again, until the training images are others.
    done = flipscale("probe", model, f"untrained:{model}", "hog", *parts, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == [model.name, f"untrained:{model.name}", "hog"]
    assert [line["date"] for line in found[model.name]] == [line.about["date"] for line in lines]
    assert found["hog"][0]["made_by"]["num_train"] == 216
    homes = {path.parent.name for path in tmp_path.glob("evaluations/*/results.jsonl")}
    assert homes == {"hog", f"untrained-{model.name}"}
    write_shards(tmp_path / "set/train", [101, 1, 115], seed=1)
    done = flipscale("probe", model, *parts)
    assert done.returncode == 0, done.stderr
    assert " of 217 images: l2 0.5, " in done.stdout
    assert len(read_lines(model / "results.jsonl")) == 4
    lars = ("--solver", "lars", "--global_batch_size", "200", "--epochs", "2", "--warmup_epochs", "1")
    done = flipscale("probe", "hog", "--train", train, "--test", shards, *lars, "--num_workers", "0")
    assert done.returncode == 0, done.stderr
    assert "  lars on the pooled features (before the projection) of 216 images: 2 steps of 200" in done.stdout


def bad(folder: Path, labels: list[str | None], names: list[str]) -> Path:
    """A set with these labels; None for an image without one."""
    folder.mkdir(parents=True)
    image = cv2.imencode(".png", np.full((8, 8, 3), 90, np.uint8))[1].tobytes()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, label in enumerate(labels):
            add_member(tar, f"{number}.png", image)
            if label is not None:
                add_member(tar, f"{number}.cls", label.encode())
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


def test_sets_that_do_not_fit(tmp_path: Path) -> None:
    two = bad(tmp_path / "two", ["0", "1"], ["cat", "dog"])
    one = bad(tmp_path / "one", ["0"], ["cat"])
    other = bad(tmp_path / "other", ["0", "1"], ["cat", "cow"])
    three = bad(tmp_path / "three", ["0", "1"], ["cat", "dog", "cow"])
    with pytest.raises(ValueError, match=r"one has 1 class; a probe needs 2 or more"):
        sets_of(one, one)
    with pytest.raises(ValueError, match=r"two and .*other differ: class 1 is 'dog' and 'cow'; use sets with the same"):
        sets_of(two, other)
    with pytest.raises(ValueError, match=r"two and .*three differ: 2 and 3; use sets with the same classnames.txt"):
        sets_of(two, three)
    empty = bad(tmp_path / "empty", [], ["cat", "dog"])
    with pytest.raises(ValueError, match=r"empty has no images; a probe needs shards with KEY.cls beside each image"):
        sets_of(empty, empty)
    (two / "classnames.txt").unlink()
    with pytest.raises(ValueError, match=r"classnames.txt is missing; it lists the class names"):
        sets_of(two, two)


def test_labels_that_do_not_fit(embedder: Embedder, tmp_path: Path) -> None:
    names, good = ["cat", "dog"], bad(tmp_path / "good", ["0", "1", "1"], ["cat", "dog"])
    missing = bad(tmp_path / "missing", ["0", "1", None], names)
    outside = bad(tmp_path / "outside", ["0", "1", "2"], names)
    lacking = bad(tmp_path / "lacking", ["1", "1", "1"], names)
    recipe = {"batch_size": 3, "epochs": 2, "warmup_epochs": 1}
    for folder, message in [
        (missing, r"missing/0.tar#2 has class None; 2 names are listed"),
        (outside, r"outside/0.tar#2 has class 2; 2 names are listed"),
        (lacking, r"class 'cat' has no image in .*lacking; add one, or take the name out of classnames.txt"),
    ]:
        with pytest.raises(ValueError, match=message):
            probed(embedder, folder, good)
        with pytest.raises(ValueError, match=message):
            probed(embedder, folder, good, solver="lars", lars=recipe)
    # A class that only the test lacks is left out of the mean.
    assert probed(embedder, good, lacking, l2=1.0)[1].value in (0.0, 100.0)
    with pytest.raises(ValueError, match=r"the batch of 4 does not fit the 3 training images"):
        probed(embedder, good, good, solver="lars", lars={**recipe, "batch_size": 4})
    few = bad(tmp_path / "few", ["0", "1"], names)
    with pytest.raises(ValueError, match=r"2 training images are too few to set a fifth aside; give --validation DIR"):
        probed(embedder, few, good)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--l2", "0"], "--l2 is 0; it must be above 0"),
        (["--solver", "lars", "--l2", "1"], "l2 and validation are of solver lbfgs; lars has neither a penalty"),
        (
            ["--crop_scale", "0.5", "0.1"],
            "crop_scale is 0.5 0.1; give two shares above 0, at most 1, the least first",
        ),
        (["--solver", "lars"], "the batch of 16,384 does not fit the 96 training images; give --global_batch_size"),
    ],
)
def test_options_that_cannot_be(
    options: list[str], message: str, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["probe", "pixels", "--train", str(shards), "--test", str(shards), *options])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_model_that_is_not_there(embedder: Embedder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path} has no configuration of a model \("):
        open_embedder(f"untrained:{tmp_path}", embedder.accelerator)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shots": []}, r"shots is \[\]; it must list one number or more, such as \[1, 5\]"),
        ({"shots": [0]}, r"eval.tasks\[0\].shots\[0\] is 0; it must be at least 1"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]; it must list 1 to 10 different numbers"),
    ],
)
def test_few_shots_that_cannot_be(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_tasks([{"kind": "few_shot", "data": "x", **fields}])


def test_few_shots_check_their_sets_before_a_run(train: Path, tmp_path: Path) -> None:
    other = bad(tmp_path / "other", ["0", "1"], ["cat", "cow"])
    with pytest.raises(ValueError, match=r"the classes of .* differ: 16 and 2"):
        FewShot("few_shot", str(other), train=str(train)).check()


def test_a_run_is_followed_by_a_few_shots(
    write_recipe: Callable[..., Path], train: Path, shards: Path, tmp_path: Path
) -> None:
    """The curve is in metrics.jsonl and TensorBoard, and the last figures with their intervals in results.jsonl."""
    task = {"kind": "few_shot", "data": str(shards), "train": str(train), "shots": [1, 5]}
    changes = {
        "eval": {"every_samples": 320, "tasks": [task]},
        "log": {"every_samples": 160, "report_to": ["tensorboard"]},
    }
    done = pretrain(write_recipe(tmp_path / "run", **changes))
    assert done.returncode == 0, done.stderr
    curve = [record for record in metrics(tmp_path / "run") if "few_shot/5_shot" in record]
    assert [record["samples_seen"] for record in curve] == [320, 640]
    assert all(0 < record["few_shot/1_shot"] <= 100 for record in curve)
    folder = next((tmp_path / "run/tensorboard").rglob("events*")).parent
    shown = EventAccumulator(str(folder)).Reload().Scalars("few_shot/5_shot")
    assert [point.value for point in shown] == pytest.approx([record["few_shot/5_shot"] for record in curve])
    last = read_results(tmp_path / "run")[-1].result
    assert (last.metric, last.value) == ("5_shot", curve[-1]["few_shot/5_shot"])
    assert last.low < last.value < last.high
