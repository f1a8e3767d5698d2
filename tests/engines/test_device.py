"""Peaks and attention kernels of devices."""

import pytest
import torch

from flipscale.engines.device import attention_kernel, best_attention, peak_flops


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A1000", None),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str, teraflops: int | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16") == (teraflops and teraflops * 1e12)
    assert peak_flops(torch.device("cuda"), "no") is None


def test_a_cpu_is_measured() -> None:
    assert 1e9 < peak_flops(torch.device("cpu"), "no") < 1e14


def test_plain_attention_for_bf16_on_cpus() -> None:
    asked = [(device, dtype) for device in ("cpu", "cuda") for dtype in (torch.bfloat16, torch.float32)]
    assert [best_attention(torch.device(device), dtype) for device, dtype in asked] == ["eager", *["sdpa"] * 3]


def test_the_attention_kernel_is_the_one_that_torch_takes() -> None:
    cpu = torch.device("cpu")
    assert attention_kernel(cpu, False, 64) == "flash_attention"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert attention_kernel(cpu, False, 64) == "math"
