"""The planner's bytes against those that torch's own trackers find in a step of the real engine (`tracked.py`), for a
model of a few layers; docs/planning.md has the table of the real ones."""

import pytest
from planning.tracked import cell

FEW_LAYERS = ["--model.vision_config", "{num_hidden_layers: 4}", "--model.text_config", "{num_hidden_layers: 4}"]
MASKED = "[{name: masked, samples: 65536, mask_ratio: 0.5, base_lr: 1.0e-4}]"
RECONSTRUCTION = ["--loss.reconstruction_weight", "0.5", "--stages", MASKED]


@pytest.mark.long
@pytest.mark.parametrize(
    ("launch", "micro_batches", "recompute", "flags"),
    [
        ("ddp", 2, True, []),
        ("fsdp2", 2, False, []),
        ("hsdp", 1, False, ["--loss.kind", "sigmoid", "--optim.ema_decay", "0.999"]),
        ("fsdp2", 1, True, RECONSTRUCTION),
    ],
)
def test_the_plan_is_what_torch_tracks(launch: str, micro_batches: int, recompute: bool, flags: list[str]) -> None:
    tracked, planned = cell("b16", launch, micro_batches, recompute, *FEW_LAYERS, *flags)
    # NCCL's buffers are not torch's.
    assert planned.total - planned.nccl == pytest.approx(tracked["Total"], rel=0.05)
