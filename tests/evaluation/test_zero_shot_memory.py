"""Zero-shot with a memory of training pairs: a plain formula, the search, what it refuses, and its rows of results."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import check_start, write_shards
from evaluation.tiny_model import in_processes, tiny_embedder

from flipscale.api import evaluate
from flipscale.cli import main
from flipscale.data.features import read_about
from flipscale.data.samples import SampleNumbers
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds import zero_shot_memory as memory
from flipscale.evaluation.kinds.zero_shot_memory import Memory
from flipscale.evaluation.results import Result
from flipscale.evaluation.suite import build_tasks, run_tasks
from flipscale.hub.export import build_processor, export_model
from flipscale.io.digests import weights_digest
from flipscale.preparation.feature_writer import precompute_features
from flipscale.start.complete_recipe import parse_recipe

KS, WEIGHTS = [1, 3, 9], [0.0, 0.4, 1.0]


@pytest.fixture(scope="module")
def folder(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in three shards, one of them empty, with features `memory`; a test and a validation set. One stored image
    and one stored text could not be embedded."""
    made = tmp_path_factory.mktemp("memory")
    for seed, (name, sizes) in enumerate({"pairs": [23, 0, 30], "test": [25, 16], "validation": [30]}.items()):
        write_shards(made / name, sizes, seed)
    precompute_features(embedder, TarSource(str(made / "pairs")), made / "memory", ["images", "texts"], "embeds")
    for tower, row in (("images", 3), ("texts", 5)):
        file = made / "memory" / tower / "00000.npy"
        rows = np.load(file)
        rows[row] = np.nan
        np.save(file, rows)
    return made


def listed(folder: Path, **fields: object) -> list[dict[str, object]]:
    places = {"data": folder / "test", "memory": folder / "memory", "validation": folder / "validation"}
    chosen = {"neighbours": KS, "weights": WEIGHTS}
    return [{"kind": "zero_shot_memory", **{name: str(path) for name, path in places.items()}, **chosen, **fields}]


def run(embedder: Embedder, folder: Path, **fields: object) -> dict[str, Result]:
    tasks = build_tasks(listed(folder, **fields))
    tasks[0].check()
    return {result.metric: result for result in run_tasks(embedder, tasks)}


def stored(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The usable pairs, fp64."""
    files = [sorted((folder / "memory" / tower).glob("*.npy")) for tower in ("images", "texts")]
    images, texts = (np.concatenate([np.load(file) for file in group]).astype(np.float64) for group in files)
    usable = np.isfinite(images[:, 0]) & np.isfinite(texts[:, 0])
    assert usable.sum() == len(usable) - 2
    return images[usable], texts[usable]


def answers_by_hand(
    embedder: Embedder, folder: Path, name: str, k: int, weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """The class of highest probability of each image, and its label."""
    source, (images, texts) = TarSource(str(folder / name)), stored(folder)
    scale = read_about(folder / "memory")["logit_scale"]
    names = (folder / name / "classnames.txt").read_text().splitlines()
    prompts = embedder.texts([f"{word} {one}" for one in names for word in ("a", "the")], together=2).double().numpy()

    def softmax(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)

    best = []
    for query in embedder.images(source).double().numpy():
        cosines = images @ query
        nearest = np.argsort(-cosines)[:k]
        votes = np.exp(scale * (cosines[nearest, None] + texts[nearest] @ prompts.T - 2)).sum(axis=0)
        votes /= votes.sum()
        best.append(int(((1 - weight) * softmax(scale * prompts @ query) + weight * votes).argmax()))
    labels = [source.read_label(*place) for place in SampleNumbers(source)]
    return np.array(best), np.array(labels)


def test_results_are_those_of_a_plain_formula(
    embedder: Embedder, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    by_hand = {
        (weight, k): np.mean(np.equal(*answers_by_hand(embedder, folder, "validation", k, weight)))
        for weight in WEIGHTS
        for k in KS
    }
    weight, k = max(by_hand, key=by_hand.get)
    assert weight > 0
    assert len({round(share, 6) for share in by_hand.values()}) > 3
    results = run(embedder, folder)
    best, labels = answers_by_hand(embedder, folder, "test", k, weight)
    assert results["top1"].value == pytest.approx(100 * np.mean(best == labels), abs=1e-6)
    assert (results["top1"].made_by["neighbours"], results["top1"].made_by["weights"]) == ([k], [weight])
    assert f"{by_hand[weight, k]:.1%}" in caplog.text
    (plain, *_) = run_tasks(embedder, build_tasks([{"kind": "zero_shot", "data": str(folder / "test")}]))
    gain = results["top1_gain"]
    assert gain.value == pytest.approx(results["top1"].value - plain.value, abs=1e-6)
    assert gain.unit == "points"
    assert gain.low < gain.value < gain.high


def test_one_number_each_needs_no_validation(embedder: Embedder, folder: Path) -> None:
    alone, chosen = (run(embedder, folder, neighbours=[3], weights=[0.4], **more) for more in ({"validation": ""}, {}))
    assert [one.outcomes for one in alone.values()] == [one.outcomes for one in chosen.values()]


@pytest.mark.parametrize("k", [1, 7, 100])
def test_blocks_find_the_exact_neighbours(
    embedder: Embedder, folder: Path, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    images, known = stored(folder)[0], Memory(folder / "memory", embedder)
    queries = embedder.images(TarSource(str(folder / "test")))
    for block in (8, 1000):
        monkeypatch.setattr(memory, "_BLOCK", block)
        found = known.nearest([queries[:30], queries[30:], queries[:0]], k)
        cosines, pairs = (torch.cat(parts) for parts in zip(*found, strict=True))
        expected = np.sort(queries.double().numpy() @ images.T, axis=1)[:, ::-1][:, :k]
        assert cosines.shape == (41, min(k, len(images)))
        assert np.abs(cosines.numpy() - expected).max() < 1e-5
        shard, row = divmod(int(pairs[5, -1]), 1 << 32)
        file = np.load(folder / "memory" / "images" / f"{shard:05d}.npy")
        assert queries[5].numpy() @ file[row].astype(np.float32) == pytest.approx(cosines[5, -1].item(), abs=1e-5)


def test_a_memory_with_the_test_s_images_is_named(
    embedder: Embedder, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(embedder, folder, neighbours=[1], weights=[0.5])
    assert "has the images" not in caplog.text
    run(embedder, folder, neighbours=[1], weights=[0.5], data=str(folder / "pairs"))
    assert f"the memory {folder / 'memory'} has the images of {folder / 'pairs'}" in caplog.text


def results_of(folder: str, tokenizer_dir: str) -> list[list]:
    results = run_tasks(tiny_embedder(tokenizer_dir, batch_size=7), build_tasks(listed(Path(folder))))
    return [[one.metric, one.value, one.outcomes] for one in results]


@pytest.mark.long
def test_two_processes_find_the_same(embedder: Embedder, folder: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    alone = [[one.metric, one.value, one.outcomes] for one in run(embedder, folder).values()]
    assert in_processes(2, tmp_path, results_of, str(folder), str(tokenizer_dir)) == alone


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory": "nowhere"}, "memory is 'nowhere'"),
        ({"validation": ""}, r"validation '', neighbours \[1, 3, 9\]"),
        ({"validation": "test/../test"}, r"validation is .*test/\.\./test, the test images"),
        ({"weights": []}, r"weights \[\]"),
        ({"weights": [2]}, r"weights.*2"),
    ],
)
def test_fields_that_cannot_be(embedder: Embedder, folder: Path, fields: dict, message: str) -> None:
    if fields.get("validation"):
        fields = {"validation": str(folder / fields["validation"])}
    with pytest.raises(ValueError, match=message):
        run(embedder, folder, **fields)


def test_a_recipe_has_no_memory(folder: Path, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Training changes the weights that a memory belongs to."""
    recipe = parse_recipe(["--config", str(write_recipe(tmp_path / "run", eval={"tasks": listed(folder)}))])
    with pytest.raises(ValueError, match=r"eval\.tasks has 'zero_shot_memory' of kind 'zero_shot_memory'"):
        check_start(recipe)


def test_memories_that_do_not_fit(embedder: Embedder, folder: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    wide, other = (tiny_embedder(tokenizer_dir, batch_size=7, projection_dim=dim) for dim in (24, 16))
    with torch.no_grad():
        next(other.model.parameters()).add_(1)
    source = TarSource(str(folder / "validation"))
    precompute_features(embedder, source, tmp_path / "images", ["images"], "embeds")
    precompute_features(embedder, source, tmp_path / "pooled", ["images", "texts"], "pooled")
    for name in ("half", "bad"):
        shutil.copytree(folder / "memory", tmp_path / name)
    (tmp_path / "half/images/00002.npy").unlink()
    for file in (tmp_path / "bad/texts").iterdir():
        np.save(file, np.full_like(np.load(file), np.nan))
    digests = [weights_digest(one.model.parameters())[:12] for one in (embedder, other)]
    for model, place, message in (
        (wide, folder / "memory", r"width 16 .*expected embeds of width 24"),
        (other, folder / "memory", f"{digests[0]}.*{digests[1]}"),
        (embedder, tmp_path / "images", "images has no features of texts"),
        (embedder, tmp_path / "pooled", "has pooled of width 32"),
        (embedder, tmp_path / "half", "has images of 23 of its 53 samples"),
        (embedder, tmp_path / "bad", r"memory .*/bad has no pair whose image and text"),
    ):
        with pytest.raises(ValueError, match=message):
            run(model, folder, memory=str(place))
    (tmp_path / "half/images/00002.npy").write_bytes(b"not an array")
    with pytest.raises(ValueError, match=r"00002\.npy is damaged"):
        run(embedder, folder, memory=str(tmp_path / "half"))


def test_the_command_and_the_call_keep_rows_of_their_own(
    embedder: Embedder, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = export_model(embedder.model, build_processor(embedder.model.config, embedder.tokenizer), tmp_path / "flip")
    words = ["evaluate", str(model), "--zero_shot", str(folder / "test"), "--num_workers", "0"]
    both = [f"--memory={folder / 'memory'}", f"--validation={folder / 'validation'}"]
    with pytest.raises(SystemExit):
        main([*words, both[0]])
    assert "--memory FEATURES needs --validation DIR" in capsys.readouterr().err
    main([*words, *both])
    table = capsys.readouterr().out
    lines = [json.loads(line) for line in (model / "results.jsonl").read_text().splitlines()]
    names = [(line["task"], line["kind"], line["metric"]) for line in lines if line["kind"] == "zero_shot_memory"]
    metrics = ("top1", "top5", "mean_per_class", "top1_gain")
    assert names == [("zero_shot_memory", "zero_shot_memory", metric) for metric in metrics]
    assert [line["metric"] for line in lines if line["kind"] == "zero_shot"] == list(metrics[:3])
    assert "top-1 gain over zero-shot" in table
    assert "zero_shot_memory" in table
    assert all(line["made_by"]["memory"] == "memory" for line in lines if line["kind"] == "zero_shot_memory")
    (asked,) = listed(folder)
    del asked["neighbours"], asked["weights"]
    results = evaluate(model, [asked])
    assert [result.value for result in results] == [line["value"] for line in lines[3:]]
    assert len((model / "results.jsonl").read_text().splitlines()) == len(lines), "the call evaluated again"
