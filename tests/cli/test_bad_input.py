"""A user's mistake is one line with the field, its value and a fix, and exit code 2. `tests/attacks` has many more."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TOWER, write_shards

import flipscale
from flipscale.cli import main


def stage(**fields: Any) -> dict[str, Any]:
    return {"stages": [{"name": "small", "samples": 160, "base_lr": 0.1, **fields}]}


def masked(kind: dict[str, Any], ratio: float) -> dict[str, Any]:
    return {"mask": kind, **stage(mask_ratio=ratio)}


# Changes of a recipe, or flags of its run, or another command; and words of the error.
MISTAKES: list[tuple[Any, ...]] = [
    ({"data": {"shards": "nowhere"}}, "no shards", "'nowhere'"),
    ({"data": {"shards": "SHARDS/{00002..00004}.tar"}}, "00004.tar"),
    ({"data": {"shards": "TMP/no_tar.tar"}}, "1 of 1 shards", "data.max_bad_fraction", "b'this is no tar f'"),
    ({"data": {"shards": "TMP/empty"}}, "0 samples", "1 shards"),
    ({"data": {"shards": ""}}, "data.shards"),
    ({"data": {"fraction": 1e-4}}, "data.fraction", "0.0001", "96"),
    ({"data": {"micro_batch_size": 5}}, "data.micro_batch_size", "5", "16", "4 or 8"),
    ({"data": {"tokenizer": "TMP/none"}}, "data.tokenizer"),
    ({"loss": {"exchange": "ring"}}, "exchange", "gather", "ring"),
    ({"loss": {"kind": "triplet"}}, "loss.kind", "'triplet'", "'infonce'"),
    ({"model": {"size": "xxl"}}, "'xxl'", "b16, l16"),
    ({"model": {"frozen": "vision_model"}}, "model.frozen: Expected a list, such as [a, b]", "vision_model"),
    ({"model": {"init_from": "TMP/none"}}, "model.init_from", "none"),
    ({"model": {"vision_config": {**TOWER, "image_size": 30, "patch_size": 8}}}, "image_size 30", "24 or 32"),
    ({"model": {"text_config": {**TOWER, "vocab_size": 5}}}, "12", "vocab_size", "5"),
    ({"eval": {"zero_shot": "nowhere/val"}}, "'nowhere/val'"),
    ({"resume_from_checkpoint": "yes"}, "resume_from_checkpoint", "'yes'", "'auto'", "'never'"),
    (stage(mask_ratio=0.99), "mask_ratio 0.99", "16 patches"),
    (stage(image_size=30), "'small'", "image_size 30", "patch_size 8", "24 or 32"),
    (stage(text_mask_ratio=0.9), "8 tokens"),
    (masked({"views": 3}, 0.5), "3 views", "16"),
    (masked({"views": 2, "kind": "block"}, 0.75), "views", "2", "block"),
    (masked({"kind": "grid"}, 0.3), "mask_ratio", "0, 0.5, 0.75, 0.875"),
    (masked({"kind": "spiral"}, 0.5), "spiral"),
    ("--optim.nothing 3", "optim.nothing"),
    ("--data.micro_batch_size 4 --model.text_config '{attention_dropout: 0.1}'", "attention_dropout", "0.1"),
    ("--dry_run --stages '[{name: a, samples: 160, image_size: 30, base_lr: 0.1}]'", "image_size 30"),
    ("pretrain --data.augment some.yaml", "--data.augment is 'some.yaml'"),
    ("pretrain --config b17", "'b17'", "b16_laion400m"),
    ("prepare audit train test", "arguments: test; see flipscale prepare --help"),
    ("evaluate org/name", "--suite", "--zero_shot"),
    ("evaluate ./none --zero_shot SHARDS", "none", "ORG/NAME"),
]


@pytest.mark.parametrize(("mistake", "says"), [(mistake, says) for mistake, *says in MISTAKES])
def test_mistake(
    mistake: dict | str, says: list[str], refused: Callable, write_recipe: Callable[..., Path], shards: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no_tar.tar").write_bytes(b"this is no tar file" * 100)
    write_shards(tmp_path / "empty", [0])
    text = yaml.safe_dump(mistake).replace("SHARDS", str(shards)).replace("TMP", str(tmp_path))
    asked = yaml.safe_load(text)
    words, changes = (shlex.split(asked), {}) if isinstance(asked, str) else ([], asked)
    if not words or words[0].startswith("--"):
        words = ["pretrain", "--config", str(write_recipe(tmp_path / "run", **changes)), *words]
    line = refused(*words)
    assert all(fragment in line for fragment in says), line


def test_an_unexpected_error_is_one_line_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fails(args: object) -> None:
        raise RuntimeError("upside down")

    monkeypatch.setattr("flipscale.cli.status.Status.run", fails)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(["status", "run"])
    (line,) = capsys.readouterr().err.splitlines()
    (file,) = tmp_path.iterdir()
    assert ended.value.code == 1
    assert line.startswith("flipscale: error: RuntimeError: upside down")
    assert str(file) in line
    text = file.read_text()
    assert "Traceback (most recent call last)" in text
    assert f"flipscale {flipscale.__version__}" in text
