"""Masked inference: which patches are seen, and figures beside a plain computation."""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import TOWER
from processes import run
from transformers import AutoTokenizer

from flipscale import cli, evaluate
from flipscale.data.decode import decode_box
from flipscale.data.sources.tar import TarSource
from flipscale.evaluation.embedders.masked import (
    WHOLE,
    ImageMask,
    MaskedEmbedder,
    asked_masks,
    check_mask_arguments,
    image_masks,
    masked_embedder,
)
from flipscale.evaluation.embedding import Embedder
from flipscale.evaluation.reports.record import read_lines
from flipscale.evaluation.results import as_metrics
from flipscale.evaluation.suite import build_tasks, evaluate_tasks
from flipscale.hub.export import build_processor, export_model
from flipscale.model import FlipConfig, FlipModel
from flipscale.model.patches import patchify
from flipscale.planning.flops import forward_flops

CONFIG = FlipConfig(
    vision_config={**TOWER, "image_size": 32, "patch_size": 8},
    text_config={**TOWER, "vocab_size": 16, "max_position_embeddings": 8},
    projection_dim=16,
)


@pytest.fixture(scope="module")
def embedder(tokenizer_dir: Path) -> Embedder:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return Embedder(FlipModel(CONFIG).eval(), tokenizer, Accelerator(cpu=True), batch_size=7, name="ours")


@pytest.fixture(scope="module")
def model_dir(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    return export_model(embedder.model, build_processor(CONFIG, embedder.tokenizer), folder)


@pytest.mark.parametrize("side", [8, 14])
@pytest.mark.parametrize(("ratio", "views"), [(0.5, 2), (0.75, 4)])
@pytest.mark.parametrize("kind", ["random", "grid"])
def test_views_share_no_patch_and_cover_the_image(side: int, ratio: float, views: int, kind: str) -> None:
    index = ImageMask(ratio, views, kind).patches(range(50), side)
    assert index.shape == (50, views, side * side // views)
    assert (np.sort(index.reshape(50, -1)) == np.arange(side * side)).all()
    assert len(np.unique(index[:, 0], axis=0)) == 50, "each image has a mask of its own"
    assert (index[7] == ImageMask(ratio, views, kind).patches([7], side)[0]).all(), "which its row alone decides"


def test_more_views_have_those_of_fewer() -> None:
    few, many = (ImageMask(0.75, views).patches(range(5), 14) for views in (2, 4))
    assert (few == many[:, :2]).all()


def test_every_combination_that_exists() -> None:
    found = image_masks([0, 0.5, 0.75], [1, 2, 4], "random", 14)
    assert [(mask.ratio, mask.views) for mask in found] == [(0, 1), (0.5, 1), (0.5, 2), (0.75, 1), (0.75, 2), (0.75, 4)]
    assert found[0] is WHOLE
    assert [mask.label for mask in found[:3]] == ["whole", "50 % random", "2 views of 50 % random"]
    assert image_masks([0.5, 0.5], [2, 2], "grid", 14) == [ImageMask(0.5, 2, "grid")]


@pytest.mark.parametrize(
    ("ratios", "views", "kind", "message"),
    [
        ([1.0], [1], "random", r"mask_ratio is 1.0; it must be in \[0, 1\): the fraction of patches removed"),
        ([-0.5], [1], "random", r"mask_ratio is -0.5; it must be in \[0, 1\)"),
        ([0.99], [1], "random", r"mask_ratio 0.99 leaves none of 64 patches; use a lower ratio"),
        ([0.5], [0], "random", r"--mask_views is 0; it must be 1 or more"),
        (
            [0.5, 0.75],
            [4],
            "random",
            r"--mask_ratio 0.5 leaves room for 2 views that share no patch, fewer than --",
        ),
        ([0.5, 0.75], [1, 8], "random", r"--mask_views 8 fits no --mask_ratio of 0.5 0.75, .* or ratio 0.875 or more"),
        ([0.5], [1], "rows", r"--mask_kind is 'rows'; use one of random, grid, block, centre"),
        ([0.5], [2], "block", r"views is 2, but block masks of one image overlap; use kind random or grid"),
        ([0.6], [1], "grid", r"a grid mask cannot keep 25 of 8 x 8 patches"),
    ],
)
def test_masks_that_cannot_be(ratios: list[float], views: list[int], kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_masks(ratios, views, kind, 8)


@pytest.mark.parametrize("flag", [["--mask_views", "2"], ["--mask_kind", "grid"], ["--mask_figure", "masks.png"]])
def test_a_flag_that_needs_a_ratio(embedder: Embedder, flag: list[str]) -> None:
    parser = argparse.ArgumentParser()
    evaluate.add_mask_arguments(parser)
    assert asked_masks(parser.parse_args([]), embedder) == [WHOLE]
    with pytest.raises(ValueError, match=rf"{flag[0]} needs a --mask_ratio above 0, such as --mask_ratio 0 0.5 0.75"):
        check_mask_arguments(parser.parse_args(flag), [])


def test_a_figure_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    evaluate.add_mask_arguments(parser)
    monkeypatch.setattr("flipscale.evaluation.embedders.masked.can_draw", lambda: False)
    with pytest.raises(ValueError, match=r"--mask_figure draws with matplotlib, which is not installed; pip install"):
        check_mask_arguments(parser.parse_args(["--mask_ratio", "0.5", "--mask_figure", "a.png"]), [])


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        ("a.pdf", "--mask_figure .*a.pdf cannot be written; name a PNG file in a folder that exists"),
        ("no/a.png", "--mask_figure .*a.png cannot be written; name a PNG file in a folder that exists"),
        ("pipe.png", "pipe.png is no plain file; move it away"),
    ],
)
def test_a_figure_that_cannot_be_written(tmp_path: Path, figure: str, message: str) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    parser = argparse.ArgumentParser()
    evaluate.add_mask_arguments(parser)
    with pytest.raises(ValueError, match=message):
        check_mask_arguments(parser.parse_args(["--mask_ratio", "0.5", "--mask_figure", str(tmp_path / figure)]), [])


def test_nothing_masked_is_the_whole_image_bit_for_bit(embedder: Embedder, shards: Path) -> None:
    source, nothing = TarSource(str(shards)), ImageMask(0.0)
    assert masked_embedder(embedder, nothing) is embedder
    everything = MaskedEmbedder(
        *(embedder.model, embedder.tokenizer, embedder.accelerator, embedder.batch_size), image_mask=nothing
    )
    assert torch.equal(everything.images(source), embedder.images(source))
    assert torch.equal(everything.images(source, "pooled"), embedder.images(source, "pooled"))


@pytest.mark.parametrize("mask", [ImageMask(0.75), ImageMask(0.5, 2), ImageMask(0.75, 3, "grid")])
def test_an_ensemble_is_the_mean_of_its_views(embedder: Embedder, shards: Path, mask: ImageMask) -> None:
    source, vision = TarSource(str(shards)), embedder.model.config.vision_config
    masked = masked_embedder(embedder, mask)
    assert masked.mask == {"ratio": mask.ratio, "views": mask.views, "kind": mask.kind}
    assert embedder.mask == {}
    found, pooled = masked.images(source), masked.images(source, "pooled")
    for row, number in ((0, 0), (29, 29)):
        square = decode_box(source.read(0, number).image, None, 32, (1.0, 1.0)).astype(np.float32)
        pixels = (torch.from_numpy(square) / 255 - torch.tensor(vision.image_mean)) / torch.tensor(vision.image_std)
        patches = patchify(pixels.permute(2, 0, 1)[None], 8)
        views = []
        for index in torch.from_numpy(mask.patches([row], 4)[0]).long():
            seen = {"patches": patches[:, index], "patch_index": index[None]}
            views.append((embedder.model.get_image_features(**seen).pooler_output[0].detach(),
                          embedder.model.vision_model(**seen).pooler_output[0].detach()))  # fmt: skip
        mean = torch.stack([embeds / embeds.norm() for embeds, _ in views]).mean(dim=0)
        assert (found[row] - mean / mean.norm()).abs().max() < 1e-6
        assert (pooled[row] - torch.stack([features for _, features in views]).mean(dim=0)).abs().max() < 1e-5


def test_other_models_cannot_be_masked(embedder: Embedder) -> None:
    class Other(Embedder):
        pass

    other = Other(embedder.model, embedder.tokenizer, embedder.accelerator, name="open_clip:ViT-B-16,openai")
    with pytest.raises(ValueError, match=r"open_clip:ViT-B-16,openai takes whole images only; --mask_ratio is for"):
        masked_embedder(other, ImageMask(0.5))
    assert masked_embedder(other, WHOLE) is other


def test_other_models_are_refused_before_any_is_loaded(shards: Path) -> None:
    command = ["nowhere", "hf:openai/clip", "--zero_shot", str(shards), "--mask_ratio", "0.5"]
    with pytest.raises(ValueError, match=r"hf:openai/clip takes whole images only; --mask_ratio is for flipscale's"):
        run_verb(command)


def run_verb(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    evaluate.run(parser.parse_args(arguments))


FLAGS = ["--mask_ratio", "0", "0.5", "0.75", "--mask_views", "1", "2", "4", "--batch_size", "7"]


def test_figures_are_the_same_in_two_worlds_and_two_runs(
    embedder: Embedder, model_dir: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(model_dir), "--zero_shot", str(shards), *FLAGS, "--json", "--num_workers", "0"]
    AcceleratorState._reset_state(reset_partial_state=True)
    cli.main([*command, "--output_dir", str(tmp_path / "one"), "--mask_figure", str(tmp_path / "masks.png")])
    one = json.loads(capsys.readouterr().out.splitlines()[-1])
    done = run("flipscale.cli", [*command, "--output_dir", str(tmp_path / "two")], world=2)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout.splitlines()[-1])
    assert one == two
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")
    tasks = build_tasks([{"kind": "zero_shot", "data": str(shards)}])
    for line, mask in zip(one, image_masks([0, 0.5, 0.75], [1, 2, 4], "random", 4), strict=True):
        expected = as_metrics(evaluate_tasks(masked_embedder(embedder, mask), tasks))
        assert {name: line[name] for name in expected} == pytest.approx(expected)
        flops = forward_flops(CONFIG, mask.ratio, mask.views).modules
        assert line["encoder_gflops"] == (flops["vision_model"] + flops["image_projection"]) / 1e9
    assert one[0]["encoder_relative"] == 1.0
    assert one[1]["encoder_relative"] == pytest.approx(0.5, abs=0.1)


def test_the_table(model_dir: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = [*FLAGS, "--num_workers", "0", "--output_dir", str(tmp_path)]
    cli.main(["evaluate", str(model_dir), "--zero_shot", str(shards), *flags])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].split("|")[1:4] == [" image                  ", " encoder GFLOPs ", " of whole "]
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "whole", "50 % random", "2 views of 50 % random", "75 % random", "2 views of 75 % random",
        "4 views of 75 % random",
    ]  # fmt: skip
    assert lines[2].split("|")[3].strip() == "1.00x"
    assert "% (" in lines[2].split("|")[4]
    kept = [line.about["mask"] for line in read_lines(next(tmp_path.glob("*/results.jsonl")))]
    assert [dict(mask) for mask in {tuple(mask.items()): mask for mask in kept}] == [
        mask.fields for mask in image_masks([0, 0.5, 0.75], [1, 2, 4], "random", 4)
    ]
