"""The shipped settings of DeepSpeed, and errors for settings that it refuses."""

import json
from pathlib import Path

import pytest

from flipscale.engines.zero import _check_settings

pytest.importorskip("deepspeed")
FOLDER = Path(__file__).parents[2] / "ds_configs"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_shipped_settings_overlap_sums_with_backward(stage: int) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    given = json.loads((FOLDER / f"zero{stage}.json").read_text())
    assert given.keys() == {"zero_optimization"}
    found = DeepSpeedZeroConfig(**given["zero_optimization"])
    assert (found.stage, found.overlap_comm, found.reduce_bucket_size) == (stage, True, 50_000_000)
    assert found.contiguous_gradients
    _check_settings(given["zero_optimization"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"overlap_com": True}, "zero_optimization.overlap_com is True .*Extra inputs"),
        ({"reduce_bucket_size": "much"}, r"zero_optimization.reduce_bucket_size is 'much' in .*ds_configs"),
        ({"reduce_bucket_size": 0}, "reduce_bucket_size is 0 in .*Input should be greater"),
    ],
)
def test_refused_settings_are_named(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        _check_settings({"stage": 2, **given})
    assert "\n" not in str(raised.value)
