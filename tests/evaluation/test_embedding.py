"""Images on their way to a model: shares of processes, workers, memory, and faults."""

import dataclasses
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from data.test_decode import picture, saved, sixteen_bits
from PIL import ExifTags, Image

from flipscale.data.decode import decode_whole
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import Embedder, Share, image_embeds, text_embeds
from flipscale.evaluation.suite import build_tasks, evaluated, run_tasks
from flipscale.evaluation.whole_images import WholeImages, decoded_batches
from flipscale.hub.export import build_processor


@pytest.mark.parametrize(("count", "world"), [(1, 3), (5, 2), (12, 3), (13, 1)])
def test_every_row_has_one_process(count: int, world: int) -> None:
    shares = [Share(count, 2, rank, world) for rank in range(world)]
    rows = [share.rows() for share in shares]
    assert sorted(np.concatenate(rows).tolist()) == list(range(count))
    assert len(rows[0]) == max(map(len, rows))
    for share, mine in zip(shares, rows, strict=True):
        assert [row for batch in share.batches() for row in batch] == mine.tolist()
        assert sum(news for _, news in share.rounds()) == count
        assert [row for batch, _ in share.rounds() for row in batch] == mine.tolist()


def test_workers_share_memory(embedder: Embedder, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for shared memory, batches go through pipes."""
    batches = [range(0, 40), range(40, 96)]
    source, decode = TarSource(str(shards)), embedder.decoder()
    ours, here = (list(decoded_batches(WholeImages(source, decode), batches, workers)) for workers in (2, 0))
    assert all(batch.buffer.is_shared() for batch in ours)
    assert all(torch.equal(a["patches"], b["patches"]) for a, b in zip(ours, here, strict=True))
    expected = embedder.images(source)

    def full(size: int) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    assert torch.equal(dataclasses.replace(embedder, num_workers=1).images(source), expected)


@pytest.mark.parametrize("kind", ["a JPEG that EXIF turns", "a 16-bit grey PNG"])
def test_pictures_of_an_index_are_those_of_training(embedder: Embedder, tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    encoded = sixteen_bits(1) if "PNG" in kind else saved(picture(), "JPEG", quality=95, exif=exif)
    file, seen = tmp_path / "picture", list[Image.Image]()
    file.write_bytes(encoded)
    processor = build_processor(embedder.model.config, embedder.tokenizer)

    def spy(images: list[Image.Image], **options: str) -> object:
        seen.extend(images)
        return processor(images=images, **options)

    of_file, of_image = image_embeds(embedder.model, spy, [file, Image.open(file)])
    assert (of_file == of_image).all()
    expected = decode_whole(encoded).astype(int)
    assert expected.shape == ((150, 210, 3) if "PNG" in kind else (210, 150, 3))
    for pixels in seen:
        assert np.abs(np.asarray(pixels) - expected).max() <= 2


def test_embeddings_are_of_lists_and_of_no_other_width(embedder: Embedder) -> None:
    model, processor = embedder.model, build_processor(embedder.model.config, embedder.tokenizer)
    with pytest.raises(ValueError, match="texts is 'a red disc'; expected a list"):
        text_embeds(model, processor, "a red disc")
    with pytest.raises(ValueError, match="pictures is <PIL"):
        image_embeds(model, processor, picture())
    with pytest.raises(ValueError, match="type ndarray; expected a file's name or a PIL image"):
        image_embeds(model, processor, [np.asarray(picture())])
    width = text_embeds(model, processor, ["a red disc"]).shape[1]
    for dims in (-1, 0, width + 1):
        with pytest.raises(ValueError, match=f"dims is {dims}, .* have {width} numbers"):
            text_embeds(model, processor, ["a red disc"], dims=dims)


def test_tasks_of_one_set_share_a_pass(
    embedder: Embedder, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in [*shards.glob("*.tar"), *shards.glob("*.txt")]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    num_read = [0]
    whole = TarSource.read

    def read(self: TarSource, *where: int) -> object:
        num_read[0] += 1
        return whole(self, *where)

    monkeypatch.setattr(TarSource, "read", read)
    listed = [
        {"kind": "zero_shot", "data": str(shards)},
        {"kind": "zero_shot", "data": str(shards), "name": "clip", "templates": "imagenet7"},
        {"kind": "retrieval", "data": str(shards), "name": "pairs"},
        {"kind": "retrieval", "data": str(tmp_path), "name": "again"},
        {"kind": "zero_shot", "data": str(tmp_path), "name": "last"},
    ]
    tasks = build_tasks(listed)
    together = []
    for task, results in evaluated(embedder, tasks):
        together.append((task.name, results))
        assert num_read[0] == 96 * (1 if task.data == str(shards) else 2)
    assert together == [(task.name, run_tasks(embedder, [task])) for task in tasks]


def test_only_tasks_that_share_a_pass_keep_its_embeddings(
    embedder: Embedder, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[weakref.ref] = []
    num_alive: list[int] = []
    embedded = Embedder._embedded

    def watched(self: Embedder, source: TarSource, features: str) -> Iterator[tuple[range, torch.Tensor]]:
        for rows, output in embedded(self, source, features):
            batches.append(weakref.ref(output))
            num_alive.append(sum(batch() is not None for batch in batches))
            yield rows, output

    monkeypatch.setattr(Embedder, "_embedded", watched)
    task = {"kind": "zero_shot", "data": str(shards)}
    run_tasks(embedder, build_tasks([task]))
    assert len(num_alive) == 16
    assert max(num_alive) <= 2
    run_tasks(embedder, build_tasks([task, {**task, "name": "again"}]))
    assert len(num_alive) == 32
    assert num_alive[-1] >= 16
