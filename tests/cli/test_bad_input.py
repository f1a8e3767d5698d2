"""A user's mistake is one line that names what, got and fix, and exit code 2; never a traceback."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from conftest import add_member, write_shards

import flipscale
from flipscale.cli import main


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Callable[[list[str]], str]:
    """Runs a command that must end with exit code 2; returns its one line."""

    def run(arguments: list[str]) -> str:
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        lines = capsys.readouterr().err.strip().splitlines()
        assert exit_info.value.code == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith("flipscale: error: ")
        return lines[0]

    return run


@pytest.fixture
def refused_recipe(refused: Callable[[list[str]], str], write_recipe, tmp_path: Path) -> Callable[..., str]:
    """Runs `pretrain` on the tiny recipe with changes that make it wrong."""

    def run(*flags: str, **changes: object) -> str:
        return refused(["pretrain", "--config", str(write_recipe(tmp_path / "run", **changes)), *flags])

    return run


def test_what_nobody_foresaw_is_one_line_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fails(args: object) -> None:
        raise RuntimeError("upside down")

    monkeypatch.setattr("flipscale.status.run", fails)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(["status", "run"])
    (line,) = capsys.readouterr().err.splitlines()
    (file,) = tmp_path.iterdir()
    assert ended.value.code == 1
    assert line.startswith("flipscale: error: RuntimeError: upside down, in ")
    assert line.endswith(f"; its traceback is in {file}")
    text = file.read_text()
    assert "Traceback (most recent call last)" in text
    assert f"flipscale {flipscale.__version__}" in text


def test_missing_shards(refused_recipe: Callable[..., str], tmp_path: Path) -> None:
    line = refused_recipe(data={"shards": str(tmp_path / "nowhere")})
    assert f"no shards at '{tmp_path}/nowhere'; name a folder of *.tar" in line


def test_a_gap_in_a_shard_range(refused_recipe: Callable[..., str], shards: Path) -> None:
    line = refused_recipe(data={"shards": f"{shards}/{{00002..00004}}.tar"})
    assert f"shard {shards}/00004.tar does not exist; check data.shards" in line


def test_an_unreadable_shard(refused_recipe: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"this is no tar file" * 100)
    line = refused_recipe(data={"shards": str(tmp_path / "bad.tar")})
    assert "1 of 1 shards cannot be read, more than data.max_bad_fraction 0.05" in line
    assert f"({tmp_path}/bad.tar: it is not a tar file: it begins with b'this is no tar f'); fetch them again" in line


def test_an_empty_data_set(refused_recipe: Callable[..., str], tmp_path: Path) -> None:
    write_shards(tmp_path / "empty", [0])
    assert "the data set is empty: 0 samples in 1 shards" in refused_recipe(data={"shards": str(tmp_path / "empty")})


def test_a_shard_without_a_usable_sample(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for number in range(3):
            add_member(tar, f"{number}.jpg", b"\xff\xd8 not a picture")
            add_member(tar, f"{number}.txt", b"a caption")
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", "--config", str(write_recipe(tmp_path / "run", data={"shards": str(tmp_path / "bad.tar")}))])
    assert ended.value.code == 2
    # After the lines with which a run begins, since a sample is read then.
    *_, begins, line = capsys.readouterr().err.strip().splitlines()
    assert begins.startswith("  run folder")
    assert line.startswith(f"flipscale: error: shard {tmp_path}/bad.tar: neither sample")
    assert "has a readable image and caption" in line


def test_a_fraction_that_is_none(refused_recipe: Callable[..., str]) -> None:
    line = refused_recipe(data={"max_bad_fraction": 5})
    assert "data.max_bad_fraction is 5.0; it must be at least 0 and at most 1" in line


def test_no_shards_named(refused_recipe: Callable[..., str]) -> None:
    assert "data.shards is empty; name a folder of *.tar" in refused_recipe(data={"shards": ""})


def test_a_key_that_does_not_exist(refused_recipe: Callable[..., str]) -> None:
    assert "weigth_decay" in refused_recipe(optim={"weigth_decay": 0.1})
    assert "optim.nothing" in refused_recipe("--optim.nothing", "3")


def test_a_field_that_a_tower_does_not_have(refused_recipe: Callable[..., str]) -> None:
    line = refused_recipe("--model.vision_config", "{depth: 3}")
    assert "model.vision_config.depth is not a field of FlipVisionConfig" in line


def test_a_value_of_the_wrong_type(refused_recipe: Callable[..., str]) -> None:
    assert "optim.name" in refused_recipe(optim={"name": "adagrad"})
    assert "global_batch_size" in refused_recipe(data={"global_batch_size": "many"})


def test_a_loss_without_the_other_processes_gradients(refused_recipe: Callable[..., str]) -> None:
    line = refused_recipe(loss={"exchange": "local"})
    assert "loss.exchange is 'local'; use 'gather' or 'ring'" in line


def test_an_unknown_loss_and_a_negative_weight(refused_recipe: Callable[..., str]) -> None:
    assert "loss.kind is 'triplet'; use 'infonce' or 'sigmoid'" in refused_recipe(loss={"kind": "triplet"})
    line = refused_recipe(loss={"reconstruction_weight": -0.1})
    assert "loss.reconstruction_weight is -0.1; it must be at least 0" in line


def test_lanes_that_do_not_divide(refused_recipe: Callable[..., str]) -> None:
    line = refused_recipe("--data.lanes", "5")
    assert line == "flipscale: error: data.lanes 5 does not divide data.global_batch_size 16; use 4 or 8"


def test_a_micro_batch_that_does_not_divide(refused_recipe: Callable[..., str]) -> None:
    line = refused_recipe("--data.micro_batch_size", "5")
    assert "data.micro_batch_size 5 does not divide the 16 pairs of a process" in line
    assert "use 4 or 8" in line


def test_dropout_in_two_passes(refused_recipe: Callable[..., str]) -> None:
    line = refused_recipe("--data.micro_batch_size", "4", "--model.text_config", "{attention_dropout: 0.1}")
    assert "model.text_config.attention_dropout is 0.1 and data.micro_batch_size is set" in line
    assert "leave one of them out" in line


def test_an_unknown_recipe(refused: Callable[[list[str]], str]) -> None:
    line = refused(["pretrain", "--config", "b17"])
    assert "recipe 'b17' is neither a file nor one of" in line
    assert "b16_laion400m" in line


def test_an_unknown_size(refused_recipe: Callable[..., str]) -> None:
    assert "model size 'xxl' is unknown; use one of b16, l16" in refused_recipe(model={"size": "xxl"})


@pytest.mark.parametrize("ratio", [1.0, -0.25, 7.5])
def test_a_mask_ratio_outside_its_range(refused_recipe: Callable[..., str], ratio: float) -> None:
    line = refused_recipe(stages=[{"name": "masked", "samples": 160, "mask_ratio": ratio, "base_lr": 0.1}])
    assert f"stages[0].mask_ratio is {ratio}; it must be at least 0 and below 1" in line


def test_a_mask_ratio_that_leaves_nothing(refused_recipe: Callable[..., str]) -> None:
    line = refused_recipe(stages=[{"name": "masked", "samples": 160, "mask_ratio": 0.99, "base_lr": 0.1}])
    assert "mask_ratio 0.99 leaves none of 16 patches; use a lower ratio" in line


def test_an_image_size_that_the_patch_does_not_divide(refused_recipe: Callable[..., str]) -> None:
    line = refused_recipe("--model.vision_config", "{image_size: 30, patch_size: 8}")
    assert "image_size 30 is not divisible by patch_size 8; use 24 or 32" in line


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (30, "stage 'small': image_size 30 is not divisible by patch_size 8; use 24 or 32"),
        (4, "stage 'small': image_size 4 is not divisible by patch_size 8; use 8"),
        (0, "stages[0].image_size is 0; it must be at least 1 and at most 16,384"),
        (20.5, "20.5"),
    ],
)
def test_a_stage_s_image_size(refused_recipe: Callable[..., str], size: float, message: str) -> None:
    assert message in refused_recipe(stages=[{"name": "small", "samples": 160, "image_size": size, "base_lr": 0.1}])


def test_the_dry_run_refuses_a_stage_s_image_size(refused_recipe: Callable[..., str]) -> None:
    stages = [{"name": "small", "samples": 160, "image_size": 30, "base_lr": 0.1}]
    assert "stage 'small': image_size 30 is not divisible by" in refused_recipe("--dry_run", stages=stages)


@pytest.mark.parametrize(
    ("fraction", "message"),
    [
        (0.0, "data.fraction is 0.0; it must be above 0 and at most 1"),
        (1.5, "data.fraction is 1.5; it must be above 0 and at most 1"),
        (1e-4, "data.fraction 0.0001 leaves none of the 96 samples of data.shards; use a larger one"),
    ],
)
def test_a_fraction_of_the_data(refused_recipe: Callable[..., str], fraction: float, message: str) -> None:
    assert message in refused_recipe(data={"fraction": fraction})


def test_a_tokenizer_that_is_not_there(refused_recipe: Callable[..., str], tmp_path: Path) -> None:
    assert "data.tokenizer" in refused_recipe(data={"tokenizer": str(tmp_path / "none")})


def test_a_tokenizer_larger_than_the_vocabulary(refused_recipe: Callable[..., str], recipe: dict) -> None:
    text_config = {**recipe["model"]["text_config"], "vocab_size": 5}
    line = refused_recipe(model={"text_config": text_config})
    assert "the tokenizer has 12 entries, the model's vocab_size is 5" in line


def test_a_run_directory_of_another_recipe(refused_recipe: Callable[..., str], tmp_path: Path, recipe: dict) -> None:
    (tmp_path / "run").mkdir()
    saved = {**recipe, "seed": 7, "optim": {"weight_decay": 0.5}}
    (tmp_path / "run/recipe.yaml").write_text(yaml.safe_dump(saved))
    line = refused_recipe()
    assert f"{tmp_path}/run holds a run of another recipe" in line
    assert "seed: 7, now 0" in line
    assert "optim.weight_decay: 0.5, now 0.2" in line
    assert "use that recipe or another output_dir" in line


def test_missing_evaluation_shards_are_found_out_at_the_start(refused_recipe: Callable[..., str]) -> None:
    assert "no shards at 'nowhere/val'" in refused_recipe(eval={"zero_shot": "nowhere/val"})


def test_a_precision_that_is_not_supported(refused_recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    try:
        assert "needs 'bf16' or 'no'" in refused_recipe()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_weights_to_start_from_that_are_not_there(refused_recipe: Callable[..., str], tmp_path: Path) -> None:
    line = refused_recipe(model={"init_from": str(tmp_path / "none")})
    assert f"model.init_from '{tmp_path}/none' cannot be loaded" in line


def test_an_unknown_way_to_resume(refused_recipe: Callable[..., str]) -> None:
    assert "resume_from_checkpoint is 'yes'; use 'auto' or 'never'" in refused_recipe("--resume_from_checkpoint", "yes")


def test_nothing_to_evaluate(refused: Callable[[list[str]], str]) -> None:
    line = refused(["evaluate", "org/name"])
    assert "nothing to evaluate; give --suite NAME, --only NAME ..., --zero_shot DIR" in line


def test_a_model_that_is_not_there(refused: Callable[[list[str]], str], tmp_path: Path, shards: Path) -> None:
    line = refused(["evaluate", str(tmp_path / "none"), "--zero_shot", str(shards)])
    assert f"there is no folder '{tmp_path}/none'; name the folder of a model or of a run, or ORG/NAME on the" in line


@pytest.mark.parametrize(("flag", "message"), [
    ("--minutes", "--minutes is 0; it must be above 0"), ("--seeds", "--seeds is 0; it must be at least 1"),
])  # fmt: skip
def test_a_race_of_nothing(refused: Callable[[list[str]], str], tmp_path: Path, flag: str, message: str) -> None:
    arguments = {"--minutes": "1", "--output_dir": str(tmp_path / "study"), flag: "0"}
    assert message in refused(["study", "race", "small_cpu", *(word for pair in arguments.items() for word in pair)])


@pytest.mark.parametrize(
    ("mask", "ratio", "message"),
    [
        ({"views": 3}, 0.5, "3 views of 8 patches each (mask_ratio 0.5) are more than the 16 of an image"),
        ({"views": 0}, 0.5, "mask.views is 0; it must be at least 1"),
        ({"views": 2, "kind": "block"}, 0.75, "views is 2, but block masks of one image overlap"),
        ({"kind": "grid"}, 0.3, "of at most 8; use kind random, or a mask_ratio such as 0, 0.5, 0.75, 0.875"),
        ({"kind": "spiral"}, 0.5, "spiral"),
        ({"text_kind": "syntax"}, 0.5, "syntax"),
    ],
)
def test_a_mask_that_does_not_exist(refused_recipe: Callable[..., str], mask: dict, ratio: float, message: str) -> None:
    stages = [{"name": "masked", "samples": 64, "mask_ratio": ratio, "base_lr": 0.01}]
    assert message in refused_recipe(mask=mask, stages=stages)


@pytest.mark.parametrize(
    ("ratio", "message"),
    [(1.0, "stages[0].text_mask_ratio is 1.0; it must be at least 0 and below 1"), (0.9, "leaves none of 8 tokens")],
)
def test_a_text_mask_that_leaves_nothing(refused_recipe: Callable[..., str], ratio: float, message: str) -> None:
    stages = [{"name": "a", "samples": 64, "text_mask_ratio": ratio, "base_lr": 0.01}]
    assert message in refused_recipe(stages=stages)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (-1.0, "loss.reconstruction_weight is -1.0; it must be at least 0"),
        (0.5, "loss.reconstruction_weight is 0.5 with mask.views 2"),
    ],
)
def test_an_impossible_reconstruction(refused_recipe: Callable[..., str], weight: float, message: str) -> None:
    assert message in refused_recipe(loss={"reconstruction_weight": weight}, mask={"views": 2})
