"""Masked evaluation: the patches that are seen, and figures against a plain computation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from evaluation.tiny_model import pixels_of
from processes import run

from flipscale import cli
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.masked_images import (
    WHOLE,
    ImageMask,
    MaskedEmbedder,
    asked_masks,
    check_mask_arguments,
    image_masks,
    masked_embedder,
)
from flipscale.evaluation.model_results import read_result_lines
from flipscale.evaluation.results import as_metrics
from flipscale.evaluation.suite import build_tasks, run_tasks
from flipscale.hub.export import build_processor, export_model
from flipscale.model.patches import patchify
from flipscale.planning.flops import StepShape, forward_flops


def test_the_row_alone_decides_a_mask() -> None:
    index = ImageMask(0.75, 4).patches(range(50), 14)
    assert (np.sort(index.reshape(50, -1)) == np.arange(14 * 14)).all()
    assert len(np.unique(index[:, 0], axis=0)) == 50
    assert (index[7] == ImageMask(0.75, 4).patches([7], 14)[0]).all()
    assert (index[:, :2] == ImageMask(0.75, 2).patches(range(50), 14)).all(), "more views include those of fewer"


def test_every_combination_that_exists() -> None:
    masks = image_masks([0, 0.5, 0.75], [1, 2, 4], "random", 14)
    assert [(mask.ratio, mask.views) for mask in masks] == [(0, 1), (0.5, 1), (0.5, 2), (0.75, 1), (0.75, 2), (0.75, 4)]
    assert image_masks([0.5, 0.5], [2, 2], "grid", 14) == [ImageMask(0.5, 2, "grid")]


@pytest.mark.parametrize(
    ("ratios", "views", "kind", "message"),
    [
        ([0.99], [1], "random", r"mask_ratio 0.99 leaves none of 64 patches"),
        ([0.5, 0.75], [4], "random", r"--mask_ratio 0.5 has room for 2 views"),
        ([0.5], [1], "rows", r"--mask_kind is 'rows'"),
        ([0.5], [2], "block", r"views is 2, but block"),
    ],
)
def test_masks_that_cannot_be(ratios: list[float], views: list[int], kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_masks(ratios, views, kind, 8)


def test_arguments_that_do_not_fit(embedder: Embedder) -> None:
    assert asked_masks([0.0], [1], "random", embedder) == [WHOLE]
    for flag, views, kind in (("--mask_views", 2, "random"), ("--mask_kind", 1, "grid")):
        with pytest.raises(ValueError, match=f"{flag} needs a --mask_ratio above 0"):
            check_mask_arguments([0.0], [views], kind, [], [])


def test_nothing_masked_is_the_whole_image_bit_for_bit(embedder: Embedder, shards: Path) -> None:
    source, nothing = TarSource(str(shards)), ImageMask(0.0)
    assert masked_embedder(embedder, nothing) is embedder
    everything = MaskedEmbedder(
        *(embedder.model, embedder.tokenizer, embedder.accelerator, embedder.batch_size), image_mask=nothing
    )
    assert torch.equal(everything.images(source), embedder.images(source))
    assert torch.equal(everything.images(source, "pooled"), embedder.images(source, "pooled"))


@pytest.mark.parametrize("mask", [ImageMask(0.75), ImageMask(0.5, 2), ImageMask(0.75, 3, "grid")])
def test_embedding_is_the_mean_of_the_views(embedder: Embedder, shards: Path, mask: ImageMask) -> None:
    source, pixels = TarSource(str(shards)), pixels_of(embedder, shards)
    masked = masked_embedder(embedder, mask)
    assert masked.mask == {"ratio": mask.ratio, "views": mask.views, "kind": mask.kind}
    assert embedder.mask == {}
    found, pooled = masked.images(source), masked.images(source, "pooled")
    for row in (0, 29):
        patches = patchify(pixels[row, None], 8)
        index = torch.from_numpy(mask.patches([row], 4)[0]).long()
        seen = {"patches": patches[0, index], "patch_index": index}
        with torch.no_grad():
            embeds = embedder.model.get_image_features(**seen).pooler_output
            features = embedder.model.vision_model(**seen).pooler_output
        mean = (embeds / embeds.norm(dim=1, keepdim=True)).mean(dim=0)
        assert (found[row] - mean / mean.norm()).abs().max() < 1e-6
        assert (pooled[row] - features.mean(dim=0)).abs().max() < 1e-5


def test_other_models_cannot_be_masked(embedder: Embedder, shards: Path) -> None:
    class Other(Embedder):
        pass

    other = Other(embedder.model, embedder.tokenizer, embedder.accelerator, name="open_clip:ViT-B-16,openai")
    with pytest.raises(ValueError, match=r"open_clip:ViT-B-16,openai takes whole images only"):
        asked_masks([0.5], [1], "random", other)
    assert masked_embedder(other, WHOLE) is other
    command = cli.parse(["evaluate", "nowhere", "hf:openai/clip", "--zero_shot", str(shards), "--mask_ratio", "0.5"])
    with pytest.raises(ValueError, match=r"hf:openai/clip takes whole images only"):
        command.run()  # before any model is loaded


@pytest.mark.long
def test_figures_of_the_command_on_one_and_two_processes(
    embedder: Embedder, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = embedder.model.config
    model = export_model(embedder.model, build_processor(config, embedder.tokenizer), tmp_path / "model")
    flags = ["--mask_ratio", "0", "0.5", "0.75", "--mask_views", "1", "2", "4", "--batch_size", "7"]
    command = ["evaluate", str(model), "--zero_shot", str(shards), *flags, "--num_workers", "0"]
    AcceleratorState._reset_state(reset_partial_state=True)
    cli.main([*command, "--json", "--output_dir", str(tmp_path / "one")])
    one = json.loads(capsys.readouterr().out.splitlines()[-1])
    done = run("flipscale.cli", [*command, "--json", "--output_dir", str(tmp_path / "two")], world=2)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == one
    assert (tmp_path / "one/results.png").read_bytes().startswith(b"\x89PNG")
    tasks = build_tasks([{"kind": "zero_shot", "data": str(shards)}])
    masks = image_masks([0, 0.5, 0.75], [1, 2, 4], "random", 4)
    for line, mask in zip(one, masks, strict=True):
        expected = as_metrics(run_tasks(masked_embedder(embedder, mask), tasks))
        assert {name: line[name] for name in expected} == pytest.approx(expected)
        flops = forward_flops(config, StepShape(1, mask.ratio, mask.views)).modules
        assert line["encoder_gflops"] == (flops["vision_model"] + flops["image_projection"]) / 1e9
    assert [line["encoder_relative"] for line in one[:2]] == [1.0, pytest.approx(0.5, abs=0.1)]

    kept = [line.about["mask"] for line in read_result_lines(next((tmp_path / "one").glob("*/results.jsonl")))]
    assert [dict(mask) for mask in {tuple(mask.items()): mask for mask in kept}] == [mask.fields for mask in masks]
