"""Linear probes and few shots: against scikit-learn and traces by hand, on several processes, and bad input."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import write_shards
from evaluation.made_up_sets import png, write_samples
from evaluation.tiny_model import in_processes, tiny_embedder
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, RidgeClassifier

from flipscale.data.decode import DRAWS_PER_CROP, decode_box
from flipscale.data.randomness import keyed_uniform
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.probe import (
    CONSTANT,
    L2,
    MAX_ITERATIONS,
    FewShot,
    Head,
    LarsRecipe,
    LinearClassifier,
    RandomCrops,
    Rows,
    best_penalty,
    fit,
    ridge,
)
from flipscale.evaluation.metrics import mean_per_class
from flipscale.evaluation.model_results import evaluate_model, read_result_lines
from flipscale.evaluation.results import Result
from flipscale.evaluation.suite import build_tasks, evaluated, run_tasks
from flipscale.evaluation.whole_images import ChosenRows
from flipscale.hub.loading import open_embedder

ALONE = torch.Tensor.clone  # the sum over one process


@cache
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features and labels of every second digit, and the features of the others."""
    features, labels = load_digits(return_X_y=True)
    return features[::2] / 16, labels[::2].astype(np.int64), features[1::2] / 16


def objective(weight: np.ndarray, bias: np.ndarray, features: np.ndarray, labels: np.ndarray, l2: float) -> float:
    scores = features @ weight.T + bias
    losses = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(labels)), labels]
    return losses.sum() + l2 / 2 * (weight**2).sum()


def answers(classifier: LinearClassifier, features: np.ndarray) -> np.ndarray:
    return classifier.scores(torch.from_numpy(features)).argmax(dim=1).numpy()


def fits() -> dict[str, Any]:
    """Fit this process's digits at two penalties, each from the fit before."""
    accelerator, (features, labels, _) = Accelerator(cpu=True), digits()
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    rows, results, start = Rows(torch.from_numpy(features[mine]), torch.from_numpy(labels[mine])), {}, None
    for l2 in (1.0, 0.01):
        last = fit(rows, 10, l2, accelerator.reduce, start=start)
        start = last.classifier
        weights = [start.weight.tolist(), start.bias.tolist()]
        results[str(l2)] = {"objective": last.objective, "converged": last.converged, "weights": weights}
    return results


@pytest.mark.parametrize("world", [1, pytest.param(4, marks=pytest.mark.long)])
def test_fit_is_scikit_learns_on_any_number_of_processes(world: int, tmp_path: Path) -> None:
    features, labels, test = digits()
    for l2, result in in_processes(world, tmp_path, fits).items():
        theirs = LogisticRegression(C=1 / float(l2), tol=1e-9, max_iter=20_000).fit(features, labels)
        weight, bias = (np.array(values) for values in result["weights"])
        assert result["converged"]
        best = objective(theirs.coef_, theirs.intercept_, features, labels, float(l2))
        assert result["objective"] == pytest.approx(best, rel=1e-6)
        assert objective(weight, bias, features, labels, float(l2)) == pytest.approx(result["objective"], rel=1e-12)
        ours = answers(LinearClassifier(torch.from_numpy(weight), torch.from_numpy(bias)), test)
        assert (ours != theirs.predict(test)).sum() <= 1


@pytest.mark.parametrize(("offset", "l2"), [(0.0, 1e-6), (50.0, 1.0)])
def test_hard_problems_converge_within_clips_steps(offset: float, l2: float) -> None:
    features, labels, _ = digits()
    features = features + offset
    result = fit(Rows(torch.from_numpy(features), torch.from_numpy(labels)), 10, l2, ALONE)
    assert result.converged
    assert result.iterations < MAX_ITERATIONS / 2
    newton = LogisticRegression(C=1 / l2, solver="newton-cholesky", tol=1e-12, max_iter=100).fit(features, labels)
    best = objective(newton.coef_, newton.intercept_, features, labels, l2)
    assert result.objective == pytest.approx(best, rel=1e-6)


def test_two_classes_and_a_class_without_images() -> None:
    features, labels, test = digits()
    features, labels = features[labels < 2], labels[labels < 2]
    theirs = LogisticRegression(C=1 / 0.1, tol=1e-9, max_iter=20_000).fit(features, labels)
    classifier = fit(Rows(torch.from_numpy(features), torch.from_numpy(labels * 3)), 5, 0.1, ALONE).classifier
    ours = answers(classifier, test)
    assert set(ours) == {0, 3}
    assert (ours / 3 != theirs.predict(test)).sum() <= 1
    difference = (classifier.weight[3] - classifier.weight[0]).numpy()
    assert np.allclose(difference, theirs.coef_[0], atol=1e-3)
    assert classifier.bias.isinf().tolist() == [False, True, True, False, True]


def test_search_and_rates_are_clips_and_the_papers() -> None:
    rates = [LarsRecipe().rate(epoch) for epoch in (0, 5, 10, 50, 90)]
    assert rates == pytest.approx([0, 0.32, 0.64, 0.32, 0])
    tried: list[int] = []

    def accuracy(number: int) -> float:
        tried.append(number)
        return -abs(number - 53)

    assert best_penalty(accuracy) == (53, 0)
    assert tried == [0, 16, 32, 48, 64, 80, 96, 40, 56, 52, 60, 50, 54, 51, 53]
    assert best_penalty(lambda number: 0.5) == (0, 0.5), "the smallest of equals"
    assert best_penalty(float) == (96, 96.0)


def test_lars_by_hand() -> None:
    """Step 1: the ratio is 0.1 x 5 / 10 = 0.05, so the momentum is (0, 0.5) and the matrix (3, 4 - 2 x 0.5). A vector
    has no ratio: 1 - 2 x 0.25."""
    head = Head(2, 1, LarsRecipe(momentum=0.5, trust=0.1), ALONE, "cpu")
    head.weight.copy_(torch.tensor([[3.0, 4.0]]))
    head.bias.fill_(1.0)
    for of_matrix, of_vector, rate, matrix_after, vector_after in [
        ([0.0, 10.0], 0.25, 2.0, [3.0, 3.0], 0.5),
        ([0.0, 0.0], 0.0, 4.0, [3.0, 2.0], 0.0),
        ([6.0, 4.0], 1.0, 10.0, [0.0, -1.25], -10.625),
        ([0.0, -0.5], 0.0, 2.0, [-0.3, -1.325], -11.6875),
    ]:
        head.step([torch.tensor([of_matrix]).double(), torch.tensor([of_vector]).double()], rate)
        assert [*head.weight[0].tolist(), head.bias.item()] == pytest.approx([*matrix_after, vector_after], abs=1e-12)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_head_learns_like_torch(batch_norm: bool) -> None:
    draws = torch.Generator().manual_seed(1)
    recipe = LarsRecipe(batch_norm=batch_norm, seed=3)
    features = torch.randn(12, 5, generator=draws, dtype=torch.float64) * 3 + 1
    labels = torch.randint(0, 4, (12,), generator=draws)
    head = Head(5, 4, recipe, ALONE, "cpu")
    assert head.weight.std() == pytest.approx(0.01, rel=0.5)
    norm = torch.nn.BatchNorm1d(5, eps=1e-6, affine=False).double()
    other = Head(5, 4, recipe, ALONE, "cpu")
    for _ in range(3):
        weight, bias = other.weight.clone().requires_grad_(), other.bias.clone().requires_grad_()
        scores = (norm(features) if batch_norm else features) @ weight.t() + bias
        loss = torch.nn.functional.cross_entropy(scores, labels)
        other.step(list(torch.autograd.grad(loss, (weight, bias))), 30.0)
        assert head.learn(Rows(features, labels), 12, 30.0) == pytest.approx(loss.item(), abs=1e-12)
        assert torch.allclose(head.weight, other.weight, atol=1e-12)
    plain = norm.eval()(features) if batch_norm else features
    assert torch.allclose(head.classifier().scores(features), plain @ other.weight.t() + other.bias)


def test_ridge_is_scikit_learns() -> None:
    """On standardised features with the constant feature, targets -1 and 1."""
    features, labels, test = digits()
    features, labels = features[:60], labels[:60]
    classifier = ridge(Rows(torch.from_numpy(features), torch.from_numpy(labels)), 10, ALONE)
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-5

    def inputs(rows: np.ndarray) -> np.ndarray:
        return np.hstack([(rows - mean) / deviation, np.full((len(rows), 1), CONSTANT)])

    theirs = RidgeClassifier(alpha=L2, fit_intercept=False).fit(inputs(features), labels)
    assert (answers(classifier, test) == theirs.predict(inputs(test))).all()
    assert np.allclose(classifier.weight.numpy() * deviation, theirs.coef_[:, :-1], atol=1e-9)


@pytest.fixture(scope="module")
def model(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tiny = tmp_path_factory.mktemp("model"), tiny_embedder(tokenizer_dir, batch_size=64)
    for part in (tiny.model, tiny.tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_shards(folder, [100, 1, 115], seed=1)
    return folder


def probed(embedder: Embedder, train: Path, test: Path, **options: object) -> list[Result]:
    (task,) = build_tasks([{"kind": "probe", "data": str(test), "train": str(train), **options}])
    task.check()
    return run_tasks(embedder, [task])


def known(embedder: Embedder, folder: Path, features: str = "pooled") -> tuple[np.ndarray, np.ndarray]:
    source = TarSource(str(folder))
    where = [(shard, number) for shard, size in enumerate(source.shard_sizes) for number in range(size)]
    labels = np.array([source.read_label(*place) for place in where])
    return embedder.images(source, features).double().numpy(), labels


@pytest.mark.parametrize(("features", "dim"), [("pooled", 32), ("embeds", 16)])
def test_probe_is_scikit_learns(features: str, dim: int, embedder: Embedder, train: Path, shards: Path) -> None:
    (inputs, labels), (asked, right) = (known(embedder, folder, features) for folder in (train, shards))
    assert inputs.shape == (216, dim)
    theirs = LogisticRegression(C=1 / 0.01, tol=1e-10, max_iter=20_000).fit(inputs, labels).predict(asked)
    top1, by_class = probed(embedder, train, shards, features=features, l2=0.01)
    assert top1.value == pytest.approx(100 * (theirs == right).mean(), abs=1.05)
    assert top1.chance == pytest.approx(100 * np.bincount(right).max() / 96)
    counts, hits = np.bincount(right, minlength=16), np.bincount(right[theirs == right], minlength=16)
    assert by_class.value == pytest.approx(100 * mean_per_class(hits, counts).value, abs=2.0)
    expected = {"features": features, "solver": "lbfgs", "l2": 0.01, "num_train": 216, "converged": True}
    assert top1.made_by.items() >= expected.items()


def test_penalty_is_searched_on_a_part_and_last_fit_is_to_all(embedder: Embedder, train: Path, shards: Path) -> None:
    made = probed(embedder, train, shards)[0].made_by
    assert 1e-6 <= made["l2"] <= 1e2
    again = probed(embedder, train, shards, l2=made["l2"])[0].made_by
    assert again["objective"] == pytest.approx(made["objective"], rel=1e-6)
    drawn = keyed_uniform(0, "probe validation", np.arange(216), 1)[:, 0] < 0.2
    inputs, labels = known(embedder, train)
    theirs = LogisticRegression(C=1 / made["l2"], tol=1e-9, max_iter=20_000).fit(inputs[~drawn], labels[~drawn])
    assert made["validation_top1"] == pytest.approx(100 * theirs.score(inputs[drawn], labels[drawn]), abs=2.5)


def probes(model: str, train: str, test: str) -> dict[str, Any]:
    """Probe a model by both solvers and by few shots."""
    recipe = {"batch_size": 72, "epochs": 3, "warmup_epochs": 1, "base_lr": 1.0, "batch_norm": True}
    listed: list[dict[str, Any]] = [
        {"kind": "probe", "name": "fixed", "l2": 0.1},
        {"kind": "probe", "name": "lars", "solver": "lars", "lars": recipe},
        {"kind": "few_shot", "shots": [1, 3, 1000], "seeds": [0, 5]},
        {"kind": "probe", "name": "searched"},
    ]
    tasks = build_tasks([{**task, "data": test, "train": train} for task in listed])
    return {
        task.name: [{"metric": r.metric, "value": r.value, "low": r.low, "high": r.high, **r.made_by} for r in results]
        for task, results in evaluated(open_embedder(model, Accelerator(cpu=True), 16), tasks)
    }


@pytest.mark.long
def test_probes_do_not_depend_on_the_number_of_processes(
    model: Path, train: Path, shards: Path, tmp_path: Path
) -> None:
    """Counts to the last image, objectives and losses to rounding. On 4 processes the parts differ in size.

    `searched` takes about the most steps of a fit, so rounding decides whether it still converges."""
    alone, several = (in_processes(world, tmp_path, probes, str(model), str(train), str(shards)) for world in (1, 4))
    counts = {"fixed": 2, "lars": 2, "few_shot": 3, "searched": 2}
    assert {name: len(of_task) for name, of_task in alone.items()} == counts
    for name, of_task in several.items():
        for one, other in zip(alone[name], of_task, strict=True):
            one, other = ({**some, "iterations": 0, "converged": None} for some in (one, other))
            assert other == {
                key: pytest.approx(value, rel=1e-8) if isinstance(value, float) else value for key, value in one.items()
            }
    lars = alone["lars"][0]
    assert (lars["solver"], lars["steps"], lars["batch_size"], lars["crop_scale"]) == ("lars", 9, 72, [0.08, 1.0])
    assert lars["loss"] < np.log(16), "it learned nothing"


def test_draws_take_shots_of_each_class_and_fewer_shots_are_among_more(
    embedder: Embedder, train: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    whole = TarSource.read
    monkeypatch.setattr(TarSource, "read", lambda self, *where: read.append(where) or whole(self, *where))

    def embedded(**changes: object) -> set[tuple[int, int]]:
        read.clear()
        run_tasks(embedder, [FewShot("few_shot", str(shards), "few_shot", train=str(train), **changes)])
        return set(read[:-96])

    one, three = embedded(shots=[1], seeds=[4]), embedded(shots=[1, 3], seeds=[4])
    assert (len(one), len(three)) == (16, 48)
    assert one < three
    assert embedded(shots=[1], seeds=[5]) != one


def test_crops_are_those_of_seed_epoch_and_row(train: Path, embedder: Embedder) -> None:
    source, order = TarSource(str(train)), np.array([205, 3, 100])
    crops = {}
    for epoch, seed in [(0, 0), (7, 0), (7, 1)]:
        image = RandomCrops(source, order, epoch, 32, (0.3, 0.6), seed).read(0, 2).image
        crops[epoch, seed] = decode_box(image, None, 32, (1.0, 1.0))
    draws = keyed_uniform(0, "probe crop", np.array([7 * 216 + 100]), DRAWS_PER_CROP)[0]
    expected = decode_box(source.read(1, 0).image, draws, 32, (0.3, 0.6))
    assert np.array_equal(crops[7, 0], expected), "it was resized or cut again"
    assert not np.array_equal(crops[0, 0], crops[7, 0])
    assert not np.array_equal(crops[7, 0], crops[7, 1])
    view = ChosenRows(source, order)
    assert (view.shard_sizes, view.shard_bytes, view.read(0, 2).image) == (
        [3],
        source.shard_bytes,
        source.read(1, 0).image,
    )
    with pytest.raises(NotImplementedError):
        view.key(0, 2)
    chosen = embedder.images(view)
    assert torch.allclose(chosen, embedder.images(source)[torch.from_numpy(order)], atol=1e-6)


def test_other_training_images_are_another_setting(embedder: Embedder, shards: Path, tmp_path: Path) -> None:
    def probed_lines() -> int:
        tasks = build_tasks([{"kind": "few_shot", "data": str(shards), "train": str(tmp_path / "train")}])
        evaluate_model(embedder, "tiny", tmp_path / "results.jsonl", tasks)
        return len(read_result_lines(tmp_path / "results.jsonl"))

    write_shards(tmp_path / "train", [40], seed=1)
    assert (probed_lines(), probed_lines()) == (4, 4)
    write_shards(tmp_path / "train", [41], seed=1)
    assert probed_lines() == 8


def bad(folder: Path, labels: list[str | None], names: list[str]) -> Path:
    image = {"png": png(np.full((8, 8, 3), 90, np.uint8))}
    write_samples(folder, (image if label is None else {**image, "cls": label.encode()} for label in labels))
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


LARS = {"solver": "lars", "lars": {"batch_size": 3, "epochs": 2, "warmup_epochs": 1}}
TWO = ["cat", "dog"]
SETS = [
    (["0"], ["cat"], {}, r"set has 1 class; .*2 or more"),
    (["0", "1"], ["cat", "cow"], {}, r"differ: 'cow', 'dog'"),
    ([], TWO, {}, r"set has no images"),
    (["0", "1"], TWO, {}, r"train has 2 images, too few"),
    (["0", "1", "1"], TWO, {"solver": "lars"}, r"lars.batch_size is 16,384; .*3 training images"),
    (["0", "1", None], TWO, {}, r"0.tar#2 has class None; 2 are listed"),
    (["0", "1", "2"], TWO, LARS, r"0.tar#2 has class 2; 2 are listed"),
    (["1", "1", "1"], TWO, {}, r"class 'cat' has no image in .*set"),
    (["1", "1", "1"], TWO, LARS, r"class 'cat' has no image in .*set"),
]


@pytest.mark.parametrize(("labels", "names", "options", "message"), SETS)
def test_training_sets_that_cannot_be(
    embedder: Embedder, tmp_path: Path, labels: list[str | None], names: list[str], options: dict, message: str
) -> None:
    good = bad(tmp_path / "good", ["0", "1", "1"], ["cat", "dog"])
    with pytest.raises(ValueError, match=message):
        probed(embedder, bad(tmp_path / "set", labels, names), good, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "few_shot", "shots": [0]}, r"shots\[0\] is 0"),
        ({"kind": "few_shot", "seeds": [1, 1]}, r"seeds is \[1, 1\]"),
        ({"solver": "lars", "l2": 1.0}, r"solver is lars.*l2"),
        ({"lars": {"crop_scale": [0.5, 0.1]}}, r"crop_scale is 0.5 0.1"),
        ({"lars": {"epochs": 10}}, r"lars.epochs is 10; expected more than lars.warmup_epochs 10"),
    ],
)
def test_fields_that_cannot_be(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_tasks([{"kind": "probe", "data": "set", **fields}])
