"""Peaks of devices, and the binding to the sockets of GPUs."""

import os
from pathlib import Path

import pytest
import torch

from flipscale.engines import device
from flipscale.engines.device import best_attention, bind_to_numa, peak_flops


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


# Two sockets of two NUMA nodes of two CPUs. As in A100 machines, some NUMA nodes have no GPU.
GPUS_OF = {"0000:07:00.0": "2-3", "0000:47:00.0": "6,7"}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """CPU sets that this process is bound to, on a made-up machine with two GPUs."""
    for cpu in range(8):
        topology = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{cpu // 4}\n")
    for address, cpus in GPUS_OF.items():
        folder = tmp_path / "bus/pci/devices" / address
        folder.mkdir(parents=True)
        (folder / "local_cpulist").write_text(f"{cpus}\n")
    moved: list[set[int]] = []
    cpus_near, addresses = device._cpus_near, list(GPUS_OF)
    monkeypatch.setattr(device, "_cpus_near", lambda address: cpus_near(address, tmp_path))
    monkeypatch.setattr(device, "_pci_address", lambda gpu: addresses[gpu])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(1, 8)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cpus: moved.append(cpus))
    return moved


def test_a_process_stays_on_the_socket_of_its_gpu(machine: list[set[int]]) -> None:
    bind_to_numa(torch.device("cuda", 1))
    bind_to_numa(torch.device("cuda", 0))
    assert machine == [{4, 5, 6, 7}, {1, 2, 3}]


def test_no_socket_is_left_idle(machine: list[set[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    bind_to_numa(torch.device("cuda", 0))
    monkeypatch.setattr(device, "_pci_address", lambda gpu: "0000:99:00.0")
    bind_to_numa(torch.device("cuda", 0))
    bind_to_numa(torch.device("cpu"))
    assert machine == []
