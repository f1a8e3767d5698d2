"""`results.jsonl` of a model: complete groups, each figure once; and the digest of weights."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flipscale.evaluation.model_results import append_lines, drop_torn, read_result_lines, state_dict_digest
from flipscale.evaluation.results import Result

ABOUT = {"model": "demo", "weights": "12ab", "data": {"name": "cars"}, "mask": {}}


def results(task: str, top1: float) -> list[Result]:
    made_by = {"data": task}
    return [Result(task, "zero_shot", metric, top1, 200, 33.4, 46.9, made_by=made_by) for metric in ("top1", "top5")]


def names(path: Path) -> list[str]:
    return [line.result.name for line in read_result_lines(path)]


def test_lines_come_back(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert read_result_lines(path) == []
    written = append_lines(path, "aa", results("cars", 41.5), ABOUT)
    assert read_result_lines(path) == written
    assert [line.result for line in written] == results("cars", 41.5)
    assert written[0].about == {"group": "aa", "lines": 2, **ABOUT}
    assert json.loads(path.read_text().splitlines()[0])["value"] == 41.5


def test_a_torn_group_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_lines(path, "aa", results("cars", 41.5), ABOUT)
    first = path.stat().st_size
    append_lines(path, "bb", results("pets", 61.5), ABOUT)
    whole = path.read_bytes()
    for end in [*range(first, len(whole) - 1, 7), len(whole) - 2]:
        path.write_bytes(whole[:end])
        assert names(path) == ["cars/top1", "cars/top5"]
        drop_torn(path)
        assert path.read_bytes() == whole[:first]
    # A power failure may leave zeros, and a later writer continues after them.
    path.write_bytes(whole[: first + 30] + bytes(99))
    append_lines(path, "bb", results("pets", 61.5), ABOUT)
    assert names(path) == ["cars/top1", "cars/top5", "pets/top1", "pets/top5"]
    drop_torn(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "text", ["notes on my model\n", '{"step": 20, "task": "zero_shot", "value": 3.0}\n', '["group"]\n', "5\n"]
)
def test_a_foreign_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.jsonl"
    append_lines(path, "aa", results("cars", 41.5), ABOUT)
    path.write_text(path.read_text() + text)
    before = path.read_bytes()
    for look in (read_result_lines, drop_torn):
        with pytest.raises(ValueError, match=r"results\.jsonl, line 3, is not a line of `flipscale evaluate`"):
            look(path)
    assert path.read_bytes() == before


def test_the_digest_of_weights() -> None:
    weights = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(3, dtype=torch.int64)}
    expected = hashlib.sha256(
        b'["a", "int64", []]' + weights["a"].numpy().tobytes() + b'["b", "float32", [2, 3]]'
        + weights["b"].numpy().tobytes()
    ).hexdigest()  # fmt: skip
    assert state_dict_digest(weights, weights.__getitem__) == expected
    assert state_dict_digest(reversed(weights), weights.__getitem__) == expected
    changes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda b: b.reshape(3, 2),
        lambda b: b.view(torch.int32),
        lambda b: b.bfloat16(),
        lambda b: torch.cat([b[:1], b[1:] + 1e-6]),
    ]
    digests = {state_dict_digest(weights, {**weights, "b": change(weights["b"])}.__getitem__) for change in changes}
    assert len(digests | {expected}) == 5
