"""The figures of zero-shot and retrieval tasks are CLIP_benchmark's own, of one open_clip model and the same folders.

Their reader, preprocessing, texts and metrics do the other side, in fp32; nothing of ours takes part in it.
"""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import pytest
import torch
from accelerate import Accelerator
from clip_benchmark.datasets import crossmodal3600, flickr30k_200, xtd10
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from conftest import add_member, draw
from evaluation.made_up_sets import NAMES, npy, write_set
from PIL import Image
from safetensors.torch import save_file

from flipscale.cli import main
from flipscale.evaluation import task_page
from flipscale.evaluation.foreign_models import OpenClipEmbedder, open_clip_embedder
from flipscale.evaluation.kinds import languages
from flipscale.evaluation.results import as_metrics
from flipscale.evaluation.suite import build_tasks, run_tasks

pytestmark = pytest.mark.long

# Their names of our metrics.
RECALLS = {"text_to_image": "image_retrieval_recall", "image_to_text": "text_retrieval_recall"}


class Sides(NamedTuple):
    ours: OpenClipEmbedder
    model: torch.nn.Module
    preprocess: Callable[[Image.Image], torch.Tensor]
    tokenizer: Callable[[list[str]], torch.Tensor]


@pytest.fixture(scope="module")
def sides(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    """A model of open_clip's with random weights, which tells images and classes well apart."""
    text = {"context_length": 8, "vocab_size": 16, "hf_tokenizer_name": str(tokenizer_dir)}
    return random_sides("oracle-vit", tmp_path_factory.mktemp("oracle"), text)


@pytest.fixture(scope="module")
def polyglot(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    """Such a model with CLIP's vocabulary, which has the bytes of every script."""
    return random_sides("polyglot-vit", tmp_path_factory.mktemp("polyglot"), {"context_length": 24})


def random_sides(name: str, folder: Path, text: dict) -> Sides:
    config: dict = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        "text_cfg": {"vocab_size": 49408, "width": 32, "heads": 2, "layers": 2, **text},
    }
    (folder / f"{name}.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    tower = {name: value for name, value in config["text_cfg"].items() if name != "hf_tokenizer_name"}
    model = open_clip.CLIP(16, config["vision_cfg"], tower)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim > 1 and "positional" not in key:
                weight.mul_(3)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "weights.safetensors")
    path = f"{folder / f'{name}.json'},{folder / 'weights.safetensors'}"
    ours = open_clip_embedder(path, Accelerator(cpu=True), batch_size=13)
    loaded, _, preprocess = open_clip.create_model_and_transforms(name, str(folder / "weights.safetensors"))
    return Sides(ours, loaded.eval(), preprocess, open_clip.get_tokenizer(name))


@pytest.fixture(autouse=True)
def _their_float(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their accuracy calls `float` of an array of one number, which numpy refuses since 2.5."""
    number = lambda value: float(value.item() if isinstance(value, np.ndarray) else value)  # noqa: E731
    monkeypatch.setattr(zeroshot_classification, "float", number, raising=False)


def theirs(sides: Sides, folder: Path, task: str) -> dict[str, float]:
    dataset = build_dataset("wds/set", root=str(folder), transform=sides.preprocess, split="test", task=task)
    loader = torch.utils.data.DataLoader(dataset.batched(7), batch_size=None, shuffle=False)
    common = {"device": "cpu", "amp": False}
    if task == "zeroshot_retrieval":
        found = zeroshot_retrieval.evaluate(sides.model, loader, sides.tokenizer, recall_k_list=[1, 5, 10], **common)
    else:
        named = (dataset.classes, dataset.templates)
        found = zeroshot_classification.evaluate(sides.model, loader, sides.tokenizer, *named, **common)
    return {name: 100 * value for name, value in found.items()}


def ours(sides: Sides, folder: Path, **task: object) -> dict[str, float]:
    found = as_metrics(run_tasks(sides.ours, build_tasks([{"data": str(folder), **task}])))
    return {name.partition("/")[2]: value for name, value in found.items()}


def assert_same_classification(sides: Sides, folder: Path) -> None:
    found, expected = ours(sides, folder, kind="zero_shot"), theirs(sides, folder, "zeroshot_classification")
    assert 5 < expected["acc5"] < 95
    assert found["mean_per_class"] == pytest.approx(expected["mean_per_class_recall"], abs=1e-6)
    assert found["top1"] == pytest.approx(expected["acc1"], abs=1e-6)
    assert ("top5" in found) == (not np.isnan(expected["acc5"]))
    assert found.get("top5", 0.0) == pytest.approx(np.nan_to_num(expected["acc5"]), abs=1e-6)


def assert_same_retrieval(sides: Sides, folder: Path) -> None:
    found, expected = ours(sides, folder, kind="retrieval"), theirs(sides, folder, "zeroshot_retrieval")
    for way, name in RECALLS.items():
        for k in (1, 5, 10):
            assert found[f"{way}_r{k}"] == pytest.approx(expected[f"{name}@{k}"], abs=2e-5), (way, k)
    assert 5 < expected["image_retrieval_recall@10"] < 95


def in_their_layout(flat: Path, folder: Path, dataset_type: str) -> Path:
    (folder / "test").mkdir(parents=True)
    shards = sorted(flat.glob("*.tar"))
    for number, shard in enumerate(shards):
        (folder / "test" / f"{number}.tar").symlink_to(shard)
    for text in flat.glob("*.txt"):
        (folder / text.name).symlink_to(text)
    (folder / "test" / "nshards.txt").write_text(str(len(shards)))
    (folder / "dataset_type.txt").write_text(dataset_type)
    return folder


def test_a_set_in_the_demo_s_layout(sides: Sides, shards: Path, tmp_path: Path) -> None:
    """Of whose 96 captions most are those of other images too: theirs and ours break ties alike."""
    classes = in_their_layout(shards, tmp_path / "classes", "classification")
    assert_same_classification(sides, classes)
    assert ours(sides, shards, kind="zero_shot") == ours(sides, classes, kind="zero_shot")
    pairs = in_their_layout(shards, tmp_path / "pairs", "retrieval")
    assert_same_retrieval(sides, pairs)
    assert ours(sides, shards, kind="retrieval") == ours(sides, pairs, kind="retrieval")


def test_odd_images_names_and_labels_in_eleven_shards(sides: Sides, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", 11, 9, lambda number, label: {"cls": f"{label}\n".encode()})
    # Spaces at the end of a line are no part of the name.
    names = [f"{name}  " for name in NAMES]
    (folder / "classnames.txt").write_text("\n".join([*names, "the red"]) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n{c} \nthe {c}, a {c}.\n")
    assert_same_classification(sides, folder)


def test_several_captions_an_image(sides: Sides, tmp_path: Path) -> None:
    def captions(number: int, label: int) -> dict[str, bytes]:
        words = [*NAMES[label].split(), *NAMES[number % 16].split()]
        # One to five captions; some are blank, some are another image's too.
        lines = [f"a {words[0]} {words[1]}", f"the {words[2]} {words[1]} {words[3]}  ", "", f" {words[3]} a {words[0]}"]
        lines.append(" ".join(words[:: -1 if number % 2 else 1]))
        return {"txt": "\n".join(lines[: 1 + number % 5]).encode()}

    assert_same_retrieval(sides, write_set(tmp_path / "set", 11, 8, captions, "retrieval"))


def test_several_labels_an_image(sides: Sides, tmp_path: Path) -> None:
    def labels(number: int, label: int) -> dict[str, bytes]:
        # The last class has no image.
        array = (np.arange(17) == label) | (np.random.default_rng(number).random(17) < 0.1)
        array[16] = False
        return {"npy": npy(array.astype((np.uint8, np.int64, np.float32)[number % 3]))}

    folder = write_set(tmp_path / "set", 11, 9, labels, "multilabel")
    (folder / "classnames.txt").write_text("\n".join([*NAMES, "the red"]))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}\n")
    expected = theirs(sides, folder, "zeroshot_classification")
    found = ours(sides, folder, kind="zero_shot_multilabel", metric="map")
    assert 5 < expected["mean_average_precision"] < 95
    assert found["map"] == pytest.approx(expected["mean_average_precision"], abs=2e-5)


WORDS = {"de": "ein rotes Bild", "quz": "huk siq'i", "zh": "一张图片", "deu_Latn": "ein Bild", "ace_Arab": "سبوه"}
# CLIP_benchmark's module of each task, its class and its folder of images, and some languages.
TRANSLATED: dict[str, tuple[Any, str, str, list[str]]] = {
    "xm3600": (crossmodal3600, "Crossmodal3600", "xm3600", ["de", "quz", "zh"]),
    "xtd10": (xtd10, "XTD10", "xtd10", ["de", "zh"]),
    "flickr30k_200": (flickr30k_200, "Flickr30k_200", "flickr30k-200", ["deu_Latn", "ace_Arab"]),
}


def their_recalls(sides: Sides, dataset: Any) -> dict[str, float]:
    def collate(rows: list[tuple[torch.Tensor, list[str]]]) -> tuple[torch.Tensor, list[list[str]]]:
        return torch.stack([pixels for pixels, _ in rows]), [captions for _, captions in rows]

    loader = torch.utils.data.DataLoader(dataset, 7, collate_fn=collate)
    common: dict[str, Any] = {"recall_k_list": [1, 5], "device": "cpu", "amp": False}
    found = zeroshot_retrieval.evaluate(sides.model, loader, sides.tokenizer, **common)
    return {f"{way}_r{k}": 100 * found[f"{name}@{k}"] for way, name in RECALLS.items() for k in (1, 5)}


@pytest.mark.parametrize("name", TRANSLATED)
def test_captions_in_many_languages(
    polyglot: Sides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Their reader of the original files, and ours of what `prepare tasks` makes of them, with one image missing."""
    module, dataset, inner, chosen = TRANSLATED[name]
    page, rng, source, root = (
        task_page.read_page(name),
        np.random.default_rng(0),
        tmp_path / "source",
        tmp_path / "root",
    )
    images = root / inner / "images"
    for folder in (images, source):
        folder.mkdir(parents=True)
    names = [f"picture_{number:03d}.jpg" for number in range(24)]
    texts = {language: [f"{WORDS[language]} {number * 7}" for number in range(24)] for language in chosen}
    for number, file in enumerate(names[:-1]):
        Image.fromarray(draw(*NAMES[number % 16].split(), rng)).save(images / file, quality=90)
    with tarfile.open(source / "images.tgz", "w:gz") as archive:
        for path in sorted(images.iterdir(), reverse=True):
            archive.add(path, f"./images/{path.name}")
    rows = [
        {"image/key": file[:-4], **{language: {"caption": [texts[language][n], "another"]} for language in chosen}}
        for n, file in enumerate(names)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (images.parent / "captions.jsonl").write_text(lines)
    with zipfile.ZipFile(source / "captions.zip", "w") as zipped:
        zipped.writestr("captions.jsonl", lines)
    (source / "names").write_text("\n".join(names))
    for language in chosen:
        (source / language).write_text("\n".join(texts[language]) + "\n")

    def lines_at(url: str) -> list[str]:
        """Return the lines of a file that CLIP_benchmark downloads. The page must name the same address."""
        if url == page.source.names:
            return (source / "names").read_text().splitlines()
        asked = {known.format(language=one): one for known, those in page.source.captions.items() for one in those}
        return (source / asked[url]).read_text().splitlines()

    monkeypatch.setattr(module, "_get_lines", lines_at, raising=False)
    assert page.source.repo == module.IMAGES_DOWNLOAD_URL
    every = [language for those in page.source.captions.values() for language in those]
    assert sorted(every) == sorted(module.SUPPORTED_LANGUAGES)
    here = {f"file://{source}/{'captions.zip' if name == 'xm3600' else '{language}'}": chosen}
    local = replace(page.source, repo=f"file://{source}/images.tgz", captions=here, names=f"file://{source}/names")
    monkeypatch.setattr("flipscale.cli.prepare.read_page", lambda _: replace(page, source=local))
    main(["prepare", "tasks", str(tmp_path / "ours"), "--only", name])
    task = {"kind": page.kind, "data": str(tmp_path / "ours" / name), "name": name, "ks": [1, 5]}
    results = run_tasks(polyglot.ours, build_tasks([task]))
    found, expected = as_metrics(results), {}
    for language in chosen:
        module.create_annotation_file(str(root), language)
        file = root / module.OUTPUT_FILENAME_TEMPLATE.format(language)
        expected[language] = their_recalls(polyglot, getattr(module, dataset)(root, str(file), polyglot.preprocess))
        own = found[f"{name}/text_to_image_r1_{language}"]
        assert own == pytest.approx(expected[language]["text_to_image_r1"], abs=2e-5)
    assert_means(name, found, expected, "text_to_image_r1")


def assert_means(name: str, found: dict[str, float], expected: dict[str, dict[str, float]], headline: str) -> None:
    differing = 0
    for metric in next(iter(expected.values())):
        values = [one[metric] for one in expected.values()]
        differing += max(values) > min(values)
        assert found[f"{name}/{metric}"] == pytest.approx(np.mean(values), abs=2e-5), metric
    assert differing, "the languages are alike, so equality means little"
    values = [one[headline] for one in expected.values()]
    spread = {"std": np.std(values), "min": min(values), "max": max(values)}
    assert {part: found[f"{name}/{headline}_{part}"] for part in spread} == pytest.approx(spread, abs=2e-5)


def test_classes_in_many_languages(polyglot: Sides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their Babel-ImageNet of ImageNet's folders, and ours of shards, in the languages with the fewest classes."""
    every = languages.babel_imagenet()
    assert len(every) == 90
    chosen = sorted(every, key=lambda language: len(every[language][0]))[:3]
    monkeypatch.setattr(languages, "babel_imagenet", lambda: {language: every[language] for language in chosen})
    rng, root, folder = np.random.default_rng(0), tmp_path / "imagenet", tmp_path / "ours"
    (folder / "test").mkdir(parents=True)
    with tarfile.open(folder / "test/0.tar", "w") as shard:
        for label in range(1000):
            encoded = io.BytesIO()
            Image.fromarray(draw(*NAMES[int(rng.integers(16))].split(), rng)).save(encoded, "png")
            file = root / f"val/n{label:08d}/{label}.png"
            file.parent.mkdir(parents=True)
            file.write_bytes(encoded.getvalue())
            add_member(shard, f"{label:04d}.png", encoded.getvalue())
            add_member(shard, f"{label:04d}.cls", str(label).encode())
    torch.save(({f"n{label:08d}": (str(label),) for label in range(1000)}, []), root / "meta.bin")
    task = {"kind": "multilingual_zero_shot", "data": str(folder), "name": "babel"}
    (folder / "classnames.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=f"{folder} has 2 classes"):
        build_tasks([task])[0].check()
    (folder / "classnames.txt").write_text("".join(f"class {label}\n" for label in range(1000)))
    found, expected = as_metrics(run_tasks(polyglot.ours, build_tasks([task]))), {}
    for language in chosen:
        dataset = build_dataset("babel_imagenet", root=str(root), transform=polyglot.preprocess, language=language)
        loader, named = torch.utils.data.DataLoader(dataset, 50), (dataset.classes, dataset.templates)
        common: dict[str, Any] = {"device": "cpu", "amp": False}
        theirs = zeroshot_classification.evaluate(polyglot.model, loader, polyglot.tokenizer, *named, **common)
        expected[language] = {"top1": 100 * theirs["acc1"], "mean_per_class": 100 * theirs["mean_per_class_recall"]}
        assert found[f"babel/top1_{language}"] == pytest.approx(expected[language]["top1"], abs=2e-5)
    assert_means("babel", found, expected, "top1")


def test_captions_that_do_not_fit(polyglot: Sides, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", 1, 5, lambda number, label: {})
    (folder / "captions").mkdir()
    (folder / "languages.txt").write_text("zh\n")
    (task,) = build_tasks([{"kind": "multilingual_retrieval", "data": str(folder)}])
    for captions, expected in ((["一"] * 4, "4 captions of 5"), (None, "no list"), ([1] * 5, "5 captions of 5")):
        (folder / "captions/zh.json").write_text(json.dumps(captions))
        with pytest.raises(ValueError, match=rf"captions/zh.json has {expected}"):
            run_tasks(polyglot.ours, [task])
