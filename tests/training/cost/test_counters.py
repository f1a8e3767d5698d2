"""Counters of energy, on files as Linux has them and in place of a driver."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from training.cost.powercap import count, write

from flipscale.training.cost import counters
from flipscale.training.cost.counters import GpuCounter, open_gpu, open_processors

GPU = "00000000-1111-2222-3333-444444444444"


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write(tmp_path / "powercap")
    monkeypatch.setattr(counters, "POWERCAP", folder)
    return folder


def test_processors_count_once_and_over_their_limit(powercap: Path) -> None:
    first, second = open_processors()
    assert (first.joules(), second.joules()) == (0.0, 0.0)
    for zone in ("intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
        count(powercap, zone, 60_000_000_000)
    count(powercap, "intel-rapl:1", 87_031_250_000 + 2_500_000)
    # To the limit, and on from zero.
    count(powercap, "intel-rapl:0", 571_150)
    assert first.joules() == pytest.approx((262_143_328_850 - 262_142_900_000 + 571_150) / 1e6)
    assert first.joules() == 0.0
    assert second.joules() == 2.5


def test_a_processor_that_may_not_be_read_leaves_no_sum_without_it(powercap: Path) -> None:
    (powercap / "intel-rapl:1/energy_uj").unlink()
    with pytest.raises(OSError, match="intel-rapl:1/energy_uj"):
        open_processors()


def test_a_machine_without_such_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "POWERCAP", tmp_path / "nowhere")
    assert open_processors() == []
    assert open_gpu(torch.device("cpu")) == []


def test_a_gpu_is_asked_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = iter([5_000_000, 5_000_250, 5_007_000])
    driver = ModuleType("pynvml")
    driver.nvmlInit = lambda: None
    driver.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    driver.nvmlDeviceGetTotalEnergyConsumption = lambda gpu: {f"GPU-{GPU}": counted}[gpu].__next__()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=GPU))
    (counter,) = open_gpu(torch.device("cuda", 3))
    assert (counter.joules(), counter.joules()) == (0.25, 6.75)


def test_the_package_has_what_is_asked_of_it() -> None:
    """Of NVML's own bindings; a machine without a driver has no counter."""
    import pynvml

    names = ("nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption")
    assert all(callable(getattr(pynvml, name)) for name in names)
    if not torch.cuda.is_available():
        with pytest.raises(pynvml.NVMLError):
            GpuCounter(f"GPU-{GPU}")
