"""Under TORCH_DISTRIBUTED_DEBUG=DETAIL every collective is compared with those of the other processes before it runs.

DDP is not among them: on gloo, torch 2.13 ends in a segmentation fault when it is made under DETAIL, of one layer, too.
"""

from pathlib import Path

import pytest
import yaml
from conftest import metrics
from distributed.crowd import Crowd


def test_collectives_agree_in_detail(
    recipe: dict, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    crowd = Crowd(2)  # a new one, because torch reads the variable once
    for optimizer in ("adamw", "muon"):
        run_dir = tmp_path / optimizer
        changes = {
            "stages": [{"name": "masked", "samples": 128, "mask_ratio": 0.75, "base_lr": 0.012}],
            "save": {"every_samples": 64},
            "eval": {"tasks": [{"kind": "zero_shot", "data": str(shards)}], "every_samples": 96, "batch_size": 7},
            "optim": {"name": optimizer},
            "output_dir": str(run_dir),
        }
        file = tmp_path / f"{optimizer}.yaml"
        file.write_text(yaml.safe_dump({**recipe, **changes}))
        assert crowd.run("train_poisoned", "fsdp2", file) == ["done"] * 2
        records = metrics(run_dir)
        assert sum(record.get("num_skipped", 0) for record in records) == 1
        assert any("loss" not in record for record in records)
        assert len(list((run_dir / "checkpoints").iterdir())) == 2
    crowd.end()
