"""Peaks and attention kernels of devices."""

import os

import pytest
import torch

from flipscale.engines.device import GPUS, attention_kernel, best_attention, gpu_named, peak_flops, set_up_gpu
from flipscale.io.errors import UserError


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str, teraflops: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16") == (teraflops and teraflops * 1e12)
    assert peak_flops(torch.device("cuda"), "no") is None


def test_a_gpu_is_typed_in_any_way() -> None:
    for typed, name, gib in (("H100_PCIe", "H100 PCIe", 80), ("a100-80gb", "A100 80GB", 80), ("4090", "RTX 4090", 24)):
        assert gpu_named(typed) == name
        assert GPUS[name].gib == gib
    for unknown in ("", "4090 laptop"):
        with pytest.raises(UserError, match=r"use one of h100, h100_pcie, .*rtx_4090"):
            gpu_named(unknown)


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


@pytest.mark.parametrize("own", [{}, {"PYTORCH_ALLOC_CONF": "x", "TORCH_FR_BUFFER_SIZE": "7"}], ids=["unset", "set"])
def test_allocator_and_flight_recorder_are_set_in_the_process(
    own: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under every launcher, where the environment does not say otherwise."""
    usual = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "TORCH_FR_BUFFER_SIZE": "8192"}
    expected = {**usual, **own}
    monkeypatch.setattr(os, "environ", own)
    set_up_gpu()
    assert own == expected
