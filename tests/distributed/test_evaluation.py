"""Evaluation on several processes: no image is read twice, all embeddings have the same bits, and all end together."""

import json
import os
import re
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import processes
import pytest
import torch
from conftest import COLOURS, SHAPES, TOWERS, add_member, write_shards
from distributed.crowd import start_ranks
from evaluation.tiny_model import tiny_writer
from transformers import AutoTokenizer

from flipscale.data.samples import SampleNumbers
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds import languages
from flipscale.evaluation.suite import build_tasks, run_tasks
from flipscale.evaluation.whole_images import Decoder
from flipscale.model import FlipConfig, FlipModel

SIZES = [30, 20, 1, 48]  # 99 images: in batches of seven, two and three processes have a different number of them


def drawn(tokenizer: str, num_workers: int = 0) -> Embedder:
    from flipscale.engines.build_engine import start_accelerator

    torch.manual_seed(0)
    config = FlipConfig(**TOWERS, projection_dim=16)
    model, words = FlipModel(config).eval(), AutoTokenizer.from_pretrained(tokenizer)
    return Embedder(model, words, start_accelerator([], "."), batch_size=7, num_workers=num_workers)


def read_and_embed(folder: str, tokenizer: str, out: str) -> None:
    """Write the samples that this process read for four tasks, and the embeddings of all images."""
    languages.babel_imagenet = lambda: {  # type: ignore[assignment]
        "de": ([3, 0, 7], ["red cross", "red disc", "green cross"], ["a {c}", "the {c}"]),
        "zh": ([9, 5], ["blue bar", "green bar"], ["{c} a"]),
    }
    read: list[list[int]] = []
    whole = TarSource.read
    TarSource.read = lambda self, *where: read.append([*where]) or whole(self, *where)  # type: ignore[method-assign]
    embedder = drawn(tokenizer)
    listed = [
        {"kind": "zero_shot", "data": folder},
        {"kind": "retrieval", "data": folder},
        {"kind": "multilingual_retrieval", "data": folder},
        {"kind": "multilingual_zero_shot", "data": folder},
    ]
    results = run_tasks(embedder, build_tasks(listed))
    found = {"read": read.copy(), "values": {result.name: result.value for result in results}}
    embeds, texts = embedder.images(TarSource(folder)), embedder.texts(["a red disc", "the blue ring", "a bar"])
    rank = embedder.accelerator.process_index
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    torch.save([embeds, texts], Path(out, f"{rank}.pt"))
    embedder.accelerator.end_training()


def run_ranks(world: int, function: Callable[..., None], *arguments: object) -> None:
    """Run a function in processes that meet; one process has no launcher."""
    running = start_ranks(world, function, *arguments) if world > 1 else [processes.start(function, *arguments)]
    assert processes.exit_codes(running) == [0] * world


def test_each_image_is_read_once_and_has_the_same_embedding(tmp_path: Path, tokenizer_dir: Path) -> None:
    folder = tmp_path / "set"
    write_shards(folder, SIZES)
    (folder / "captions").mkdir()
    (folder / "languages.txt").write_text("de\nzh\n")
    for seed, language in enumerate(("de", "zh")):
        words = np.random.default_rng(seed).choice([*COLOURS, *SHAPES, "a", "the"], (99, 5))
        (folder / f"captions/{language}.json").write_text(json.dumps([" ".join(row) for row in words]))
    every = [[*where] for where in SampleNumbers(TarSource(str(folder)))]
    assert len(every) == 99
    found = {}
    for world in (1, 2, 3):
        out = tmp_path / f"{world}"
        out.mkdir()
        run_ranks(world, read_and_embed, str(folder), str(tokenizer_dir), str(out))
        told = [json.loads((out / f"{rank}.json").read_text()) for rank in range(world)]
        assert sorted(where for one in told for where in one["read"]) == every
        assert all(one["values"] == told[0]["values"] for one in told)
        found[world] = (told[0]["values"], *torch.load(out / "0.pt"))
    for values, embeds, texts in (found[2], found[3]):
        assert values == found[1][0]
        assert torch.equal(embeds, found[1][1])
        assert torch.equal(texts, found[1][2])


def write(folder: str, out: str) -> None:
    """Write the results of a captioner."""
    from flipscale.engines.build_engine import start_accelerator

    embedder = tiny_writer(start_accelerator([], "."), batch_size=7)
    listed = [{"kind": "captioning", "data": folder, "num_beams": 2}, {"kind": "likelihood", "data": folder}]
    results = run_tasks(embedder, build_tasks(listed))
    values = {result.name: [result.value, result.low] for result in results}
    Path(out, f"{embedder.accelerator.process_index}.json").write_text(json.dumps(values))
    embedder.accelerator.end_training()


@pytest.mark.long
def test_captions_are_scored_as_one_set(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_shards(folder, SIZES)
    found = {}
    for world in (1, 2):
        out = tmp_path / f"{world}"
        out.mkdir()
        run_ranks(world, write, str(folder), str(out))
        found[world] = [json.loads((out / f"{rank}.json").read_text()) for rank in range(world)]
    assert found[2] == found[1] * 2
    assert found[1][0]["captioning/cider"][0] > 0


class Deadly(Embedder):
    """Embeds with workers that die at image 20."""

    def decoder(self) -> Decoder:
        return _deadly


def _deadly(encoded: bytes, row: int) -> dict[str, np.ndarray]:
    if row == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"patches": np.zeros((16, 192), np.uint8)}


def fail(folder: str, tokenizer: str, out: str, deadly: bool) -> None:
    """Write the error of this process."""
    embedder = drawn(tokenizer, num_workers=1 if deadly else 0)
    if deadly:
        embedder = Deadly(**vars(embedder))
    try:
        embedder.images(TarSource(folder))
    except (ValueError, OSError) as error:
        Path(out, str(embedder.accelerator.process_index)).write_text(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("deadly", "sentence"),
    [
        (False, r"UserError: evaluation image 0.tar#20 cannot be decoded: .*"),
        (True, r"OSError: a worker that decoded images died \(.*\); give it more memory, or set .* to 0"),
    ],
)
def test_what_one_process_finds_ends_both(tmp_path: Path, tokenizer_dir: Path, deadly: bool, sentence: str) -> None:
    png = cv2.imencode(".png", np.full((16, 16, 3), 90, np.uint8))[1].tobytes()
    folder = tmp_path / "set"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(99):
            add_member(tar, f"{number:02d}.png", b"no picture" if number == 20 and not deadly else png)
    run_ranks(2, fail, str(folder), str(tokenizer_dir), str(tmp_path), deadly)
    told = [(tmp_path / f"{rank}").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert len(told[0].splitlines()) == 1
    assert re.fullmatch(sentence, told[0])
