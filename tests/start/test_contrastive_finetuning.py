"""Fine-tuning on pairs that loses little: parts that stay as they are, and weights between two models'."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import changed_recipe, cut, metrics, trained
from safetensors.torch import load_file, save_file

from flipscale.cli import main
from flipscale.evaluation.results import BEFORE, CHANGES, latest, read_results, with_changes

FROZEN = ["logit_scale", "text_model", "vision_model.encoder.layers.0"]


@pytest.fixture(scope="module")
def evaluation(shards: Path) -> dict:
    return {"zero_shot": str(shards), "every_samples": 64, "num_workers": 0}


@pytest.fixture(scope="module")
def base(recipe: dict, evaluation: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    stages = [{"name": "masked", "samples": 64, "mask_ratio": 0.5, "base_lr": 0.01}]
    file = folder / "base.yaml"
    file.write_text(yaml.safe_dump({**recipe, "eval": evaluation, "stages": stages, "output_dir": str(folder / "run")}))
    trained(file)
    return folder / "run"


@pytest.fixture(scope="module")
def write(recipe: dict, base: Path, evaluation: dict) -> Callable[..., Path]:
    def write(run_dir: Path, **changes: dict) -> Path:
        tuned = {
            "model": {"init_from": str(base), "frozen": FROZEN},
            "optim": {"layer_decay": 0.5},
            "stages": [{"name": "tuned", "samples": 96, "base_lr": 0.01}],
            "save": {"every_samples": 32, "total_limit": 20},
            "eval": evaluation,
            "output_dir": str(run_dir),
        }
        file = run_dir.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(changed_recipe(recipe, {**tuned, **changes})))
        return file

    return write


@pytest.fixture(scope="module")
def tuned(write: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("tuned") / "run"
    trained(write(run_dir))
    return run_dir


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def is_frozen(name: str) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in FROZEN)


def test_frozen_parts_stay_bit_for_bit_and_the_rest_learns(
    write: Callable[..., Path], base: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    trained(write(run_dir, data={"micro_batch_size": 8}))
    before, after = weights(base / "model"), weights(run_dir / "model")
    for name, value in before.items():
        assert torch.equal(value, after[name]) == is_frozen(name), name
    copy = tmp_path / "cut"
    cut(run_dir, copy, 4)
    trained(write(copy, data={"micro_batch_size": 8}))
    assert all(torch.equal(value, after[name]) for name, value in weights(copy / "model").items())


@pytest.mark.long
def test_what_the_model_before_achieved_and_what_was_lost(
    write: Callable[..., Path], base: Path, tuned: Path, tmp_path: Path
) -> None:
    run_dir = tuned
    at_its_end = [replace(m.result, who=BEFORE) for m in read_results(base) if m.step == 4]
    found = read_results(run_dir)
    assert [m.result for m in found if m.step == 0] == at_its_end
    assert all((m.result.who == BEFORE) == (m.step == 0) for m in found)
    assert metrics(run_dir)[0]["zero_shot/top1"] == at_its_end[0].value
    assert [r for r in with_changes(latest(found)) if r.metric == "top1" and r.who in CHANGES]

    # A run that goes on does not evaluate the model before again, and one that starts anew has it once.
    for last in (4, 0):
        copy = tmp_path / f"cut-{last}"
        cut(run_dir, copy, last)
        trained(write(copy))
        assert [(m.step, m.result) for m in read_results(copy)] == [(m.step, m.result) for m in found]


def test_weights_between_two_models(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tuned
    before, after = weights(base / "model"), weights(run_dir / "model")
    between = ["export", str(run_dir), "--interpolate", str(base), "--out"]
    main([*between, str(tmp_path / "at"), "--alpha", "0", "0.25"])
    main([*between, str(tmp_path / "at/alpha-1"), "--alpha", "1"])
    folders = {alpha: tmp_path / f"at/alpha-{alpha:g}" for alpha in (0.0, 0.25, 1.0)}
    assert capsys.readouterr().out.split()[-3:] == [str(folder) for folder in folders.values()]
    for alpha, folder in folders.items():
        found = weights(folder)
        for name, tuned in after.items():
            assert torch.allclose(found[name], (1 - alpha) * before[name] + alpha * tuned, atol=1e-7), name
    assert all(torch.equal(weights(folders[1.0])[name], value) for name, value in after.items())

    name = "image_projection.weight"
    for changed, said in (
        ({**before, name: before[name][:4].contiguous()}, "shape [4, "),
        ({n: w for n, w in before.items() if n != name}, f"weight {name} has no value in the base"),
        ({**before, name: before[name] * float("nan")}, f"{name} of {tmp_path / 'other'} has numbers that are NaN"),
    ):
        other = tmp_path / "other"
        shutil.copytree(base / "model", other, dirs_exist_ok=True)
        save_file(changed, other / "model.safetensors")
        with pytest.raises(SystemExit):
            main(["export", str(run_dir), "--interpolate", str(other), "--out", str(tmp_path / "refused")])
        assert said in capsys.readouterr().err
        assert not (tmp_path / "refused").exists()

    # Equal shapes are not enough: these weights belong to another function.
    for file, old, new, field in (
        ("config.json", '"gelu_pytorch_tanh"', '"quick_gelu"', "hidden_act is 'quick_gelu'"),
        ("config.json", '"image_mean": [', '"image_mean": [0.9, 0.8, 0.7], "unused": [', "image_mean is"),
        ("processor_config.json", '"image_mean": [', '"image_mean": [0.9, 0.8, 0.7], "unused": [', "image_mean is"),
        ("tokenizer.json", '"red": 4', '"der": 4', "tokenizer entries is"),
    ):
        shutil.copytree(base / "model", other, dirs_exist_ok=True)
        text = (other / file).read_text()
        assert old in text
        (other / file).write_text(text.replace(old, new, 1))
        with pytest.raises(SystemExit):
            main(["export", str(run_dir), "--interpolate", str(other), "--out", str(tmp_path / "refused")])
        assert field in capsys.readouterr().err
