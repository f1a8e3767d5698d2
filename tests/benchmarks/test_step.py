"""`flipscale bench step` at a tiny size, and the race beside open_clip."""

import json

import pytest
import torch

from benchmarks.step import beside, compare_steps
from flipscale.cli import main
from flipscale.model import FlipConfig, FlipModel
from flipscale.planning.bench_step import StepSetting, StepTimes, flip_batch, flip_step, matmul_peak, measure_step
from flipscale.planning.flops import forward_flops

PROMISED = {
    *("size", "mask_ratio", "batch_size", "dtype", "compile", "device", "threads", "torch", "images_per_s", "median_s"),
    *("flops_per_pair", "share_of_matmul_peak", "peak_memory_bytes"),
}
CPU = torch.device("cpu")


def tiny_config() -> FlipConfig:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return FlipConfig(
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        text_config={**tower, "vocab_size": 64, "max_position_embeddings": 8},
        projection_dim=16,
    )


def tiny(mask_ratio: float = 0.75, dtype: str = "bf16", num_steps: int = 2) -> StepSetting:
    return StepSetting(tiny_config(), "tiny", mask_ratio, batch_size=4, dtype=dtype, num_steps=num_steps)


@pytest.fixture
def tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--size b16` builds the tiny model."""
    monkeypatch.setattr(FlipConfig, "from_size", classmethod(lambda *_: tiny_config()))


def test_figures_of_a_step() -> None:
    figures = json.loads(json.dumps(measure_step(tiny())))
    assert figures.keys() >= PROMISED
    assert figures["images_per_s"] == pytest.approx(4 / figures["median_s"])
    assert figures["flops_per_pair"] == forward_flops(tiny_config(), 0.75).training
    achieved = figures["flops_per_pair"] * figures["images_per_s"]
    assert figures["share_of_matmul_peak"] == pytest.approx(achieved / figures["matmul_peak_flops"])
    assert figures["peak_memory_bytes"] > 2**20
    assert matmul_peak(CPU, "fp32") > 1e9


def test_a_step_uses_the_kernels_of_training() -> None:
    """The trainer, too, leaves products in fp32 at torch's default, without TF32."""
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        flip_step(tiny())()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_step_trains_every_weight(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[FlipModel] = []
    init = FlipModel.__init__

    def keep(self: FlipModel, config: FlipConfig) -> None:
        init(self, config)
        built.append(self)

    monkeypatch.setattr(FlipModel, "__init__", keep)
    step = flip_step(tiny(dtype=dtype))
    before = {name: weight.detach().clone() for name, weight in built[0].named_parameters()}
    step()
    # The bias of the keys has no gradient: it adds the same to every score of a query.
    still = {name for name, weight in built[0].named_parameters() if torch.equal(weight, before[name])}
    assert {name for name in still if not name.endswith("k_proj.bias")} == set()


def test_the_batch_is_the_loader_s() -> None:
    masked, whole = flip_batch(tiny()), flip_batch(tiny(mask_ratio=0.0))
    assert masked["patches"].shape == (4, 4, 192)
    assert masked["patches"].dtype == torch.uint8
    assert (masked["patch_index"].shape, masked["patch_index"].dtype) == ((4, 4), torch.int16)
    assert whole["patches"].shape == (4, 16, 192)
    assert "patch_index" not in whole


def test_output(tiny_size: None, capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "step", "--batch_size", "4", "--steps", "1", "--dtype", "fp32", "--json"])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert json.loads(printed)["dtype"] == "fp32"
    main(["bench", "step", "--batch_size", "4", "--steps", "1"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines.keys() >= PROMISED
    assert lines["code"] == "flipscale"


def test_rows_beside_open_clip() -> None:
    rows = list(compare_steps(tiny(num_steps=3)))
    assert [(row["dtype"], row["mask_ratio"]) for row in rows] == [
        (dtype, mask_ratio) for dtype in ("bf16", "fp32") for mask_ratio in (0.0, 0.5, 0.75)
    ]
    for row in rows:
        assert row["first_quartile_s"] <= row["median_s"] <= row["third_quartile_s"]
        assert row["open_clip_first_quartile_s"] <= row["open_clip_median_s"] <= row["open_clip_third_quartile_s"]
        assert row["ratio"] == pytest.approx(row["open_clip_median_s"] / row["median_s"])
        assert row["open_clip"]
        assert "watts" not in row  # of a CPU


def test_pairs_per_joule() -> None:
    state = {"driver_version": "570.86", "clocks.sm": "1755", "power.draw": "650.0"}
    found = beside("open_clip_", StepTimes([3.0, 1.0, 2.0], 1.0), state, {"images_per_s": 1300.0})
    assert found == {
        "open_clip_first_quartile_s": 1.5,
        "open_clip_third_quartile_s": 2.5,
        "driver": "570.86",
        "open_clip_mhz": 1755.0,
        "open_clip_watts": 650.0,
        "open_clip_pairs_per_joule": 2.0,
    }
    # Some GPUs state no power.
    assert "driver" not in beside("", StepTimes([1.0, 1.0], 1.0), {**state, "power.draw": "[N/A]"}, {})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_used_when_there_is_one(tiny_size: None, capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "step", "--batch_size", "4", "--steps", "1", "--json"])
    assert json.loads(capsys.readouterr().out)["device"] == torch.cuda.get_device_name()
