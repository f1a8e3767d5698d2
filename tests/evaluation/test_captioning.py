"""Captions that a small decoder writes, and classes by their likelihood, against the plain computation."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import COLOURS, SHAPES, TOWERS, write_shards
from evaluation.made_up_sets import png, write_samples
from evaluation.tiny_model import CAPTION_LENGTH, pixels_of, tiny_writer

from flipscale import cli
from flipscale.data.captions import tokenise
from flipscale.data.samples import SampleNumbers
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.kinds.caption_metrics import bleu_4, cider, rouge_l
from flipscale.evaluation.kinds.captioning import Likelihoods, captioner, generated_captions
from flipscale.evaluation.results import Result
from flipscale.evaluation.suite import build_tasks, run_tasks
from flipscale.hub.export import build_processor, export_model
from flipscale.model import FlipConfig, FlipForConditionalGeneration, FlipModel


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return tiny_writer(Accelerator(cpu=True))


@pytest.fixture(scope="module")
def test_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)

    def sample(number: int) -> dict[str, bytes]:
        lines = [f"a {rng.choice([*COLOURS])} {rng.choice(SHAPES)}." for _ in range(1 + number % 3)]
        image = rng.integers(0, 256, (32, 32, 3), np.uint8)
        return {"png": png(image), "txt": ("\n".join(lines) + "\n\n").encode()}

    return write_samples(tmp_path_factory.mktemp("captions"), map(sample, range(21)))


def evaluated(embedder: Embedder, **task: object) -> dict[str, Result]:
    return {result.metric: result for result in run_tasks(embedder, build_tasks([task]))}


@pytest.mark.parametrize("num_beams", [1, 3])
def test_captions_are_those_of_generate(embedder: Embedder, test_set: Path, num_beams: int) -> None:
    options = {"max_new_tokens": 4, "num_beams": num_beams, "do_sample": False}
    ids = [embedder.model.generate(image[None], **options) for image in pixels_of(embedder, test_set)]
    expected = [embedder.tokenizer.batch_decode(one, skip_special_tokens=True)[0] for one in ids]
    assert len(set(expected)) > 3
    source = TarSource(str(test_set))
    for batch_size in (4, 16):
        some = dataclasses.replace(embedder, batch_size=batch_size)
        assert generated_captions(some, source, 4, num_beams) == expected


def test_scores_are_those_of_the_captions(embedder: Embedder, test_set: Path) -> None:
    source = TarSource(str(test_set))
    made = [caption.split() for caption in generated_captions(embedder, source, 4, 1)]
    given = [
        [line.removesuffix(".").split() for line in source.read(*where).captions[0].decode().splitlines() if line]
        for where in SampleNumbers(source)
    ]
    found = evaluated(embedder, kind="captioning", data=str(test_set), max_new_tokens=4)
    assert [*found] == ["cider", "bleu_4", "rouge_l"]
    assert found["cider"].value == pytest.approx(100 * cider(made, given).mean())
    assert found["bleu_4"].value == pytest.approx(100 * bleu_4(made, given).value)
    assert found["rouge_l"].value == pytest.approx(100 * rouge_l(made, given).mean())


def test_likelihood_is_that_of_each_prompt(tmp_path: Path) -> None:
    write_shards(tmp_path, [23])
    templates = ["a {c}", "the {c}"]
    embedder = tiny_writer(Accelerator(cpu=True), 5)
    names = (tmp_path / "classnames.txt").read_text(encoding="utf-8").splitlines()
    model, pixels = embedder.model, pixels_of(embedder, tmp_path)
    scores = torch.zeros(len(pixels), len(names))
    for column, name in enumerate(names):
        for template in templates:
            tokens = tokenise(embedder.tokenizer, [template.replace("{c}", name)] * len(pixels), CAPTION_LENGTH)
            with torch.no_grad():
                output = model(pixels, **tokens)
            # The loss is a mean over the words and the end.
            scores[:, column] -= output.caption_losses * (tokens["attention_mask"][0].sum() + 1) / len(templates)
    source = TarSource(str(tmp_path))
    labels = torch.tensor([source.read_label(*where) for where in SampleNumbers(source)])
    found = evaluated(embedder, kind="likelihood", data=str(tmp_path), templates=templates)
    assert found["top1"].value == pytest.approx(100 * (scores.argmax(dim=1) == labels).float().mean().item())
    best = scores.topk(5, dim=1).indices
    assert found["top5"].value == pytest.approx(100 * (best == labels[:, None]).any(dim=1).float().mean().item())
    assert 0 < found["top5"].value < 100
    assert found["top1"].chance == 100 / 16


def test_likelihoods_in_batches_of_any_size(tmp_path: Path) -> None:
    write_shards(tmp_path, [5])
    texts = [f"{start} {colour}{end}" for start in ("a", "a big") for colour in COLOURS for end in ("", " square", ".")]
    found = []
    for batch_size, images in ((3, 2), (64, 2), (1000, 5)):  # one image and part of the texts, one, several
        embedder = tiny_writer(Accelerator(cpu=True), batch_size)
        found.append(Likelihoods(embedder, texts, images).of({"pixel_values": pixels_of(embedder, tmp_path)[:images]}))
    for one in found[:2]:
        torch.testing.assert_close(one, found[2][:2], rtol=1e-5, atol=1e-5)


def test_some_images_are_spread_over_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, [10, 13])
    read: list[tuple[int, int]] = []
    whole = TarSource.read
    monkeypatch.setattr(TarSource, "read", lambda self, *where: read.append(where) or whole(self, *where))
    (task,) = build_tasks([{"kind": "likelihood", "data": str(tmp_path), "images": 6}])
    results = run_tasks(tiny_writer(Accelerator(cpu=True)), [task])
    assert [10 * shard + number for shard, number in read] == [0, 3, 7, 11, 15, 19]
    assert {result.n for result in results} == {6}
    assert results[0].made_by["images"] == 6


def test_a_model_in_training_writes_what_its_captioner_does(embedder: Embedder, test_set: Path) -> None:
    class Trained(torch.nn.Module):
        def __init__(self, model: FlipForConditionalGeneration):
            super().__init__()
            self.config, self.vision_model, self.decoder = model.config, model.vision_model, model.decoder

    trained = dataclasses.replace(embedder, model=Trained(embedder.model))
    assert captioner(trained).decoder is embedder.model.decoder
    source = TarSource(str(test_set))
    assert generated_captions(trained, source, 4, 1) == generated_captions(embedder, source, 4, 1)


def test_captions_of_masked_images(
    embedder: Embedder, test_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export_model(
        embedder.model, build_processor(embedder.model.config, embedder.tokenizer), tmp_path / "model"
    )
    command = ["evaluate", str(folder), "--task", f"{{kind: captioning, data: {test_set}, max_new_tokens: 4}}"]
    command += ["--mask_ratio", "0.5", "--num_workers", "0", "--output_dir", str(tmp_path / "out")]
    AcceleratorState._reset_state(reset_partial_state=True)
    cli.main(command)
    assert "50 % random" in capsys.readouterr().out
    assert "ratio 0.5" in (tmp_path / "out/results.md").read_text()
    with pytest.raises(SystemExit):
        cli.main([*command, "--mask_views", "1", "2"])
    assert "mask_views is 2 and captioning" in capsys.readouterr().err


def test_a_model_without_a_decoder_is_refused(tmp_path: Path, embedder: Embedder) -> None:
    without = dataclasses.replace(embedder, model=FlipModel(FlipConfig(**TOWERS)).eval(), name="runs/clip")
    with pytest.raises(ValueError, match=r"captioning is of kind .*the model runs/clip has no decoder; use kind zero"):
        evaluated(without, kind="captioning", data=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "captioning", "metrics": []}, r"metrics is \[\]"),
        ({"kind": "captioning", "metrics": ["wer"]}, "metrics"),
        ({"kind": "likelihood", "templates": ["no name"]}, "prompt 'no name'"),
    ],
)
def test_options_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_tasks([{"data": "x", **options}])
