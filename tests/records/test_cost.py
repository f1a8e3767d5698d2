"""Energy counters, their sums over processes and starts, and the hours and prices of a run."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import processes
import pytest
import torch
from loop import troubled

from flipscale.records import energy_meter
from flipscale.records.energy_meter import EnergyMeter, open_gpu, open_processors
from flipscale.records.run_summary import Energy, RunSummary

# Recorded on a server with two sockets: name of the zone, counter and wrap, in microjoules.
ZONES = {
    "intel-rapl:0": ("package-0", 262_142_900_000, 262_143_328_850),
    "intel-rapl:0:0": ("dram", 11_000_000, 65_712_999_613),
    "intel-rapl:1": ("package-1", 87_031_250_000, 262_143_328_850),
    "intel-rapl:2": ("psys", 5_000_000, 262_143_328_850),
    "intel-rapl-mmio:0": ("package-0", 1_000_000, 262_143_328_850),
}
GPU = "00000000-1111-2222-3333-444444444444"


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "powercap"
    for zone, (name, counted, limit) in ZONES.items():
        (folder / zone).mkdir(parents=True)
        (folder / zone / "name").write_text(f"{name}\n")
        (folder / zone / "max_energy_range_uj").write_text(f"{limit}\n")
        count(folder, zone, counted)
    monkeypatch.setattr(energy_meter, "POWERCAP", folder)
    return folder


def count(folder: Path, zone: str, microjoules: int) -> None:
    (folder / zone / "energy_uj").write_text(f"{microjoules}\n")


def meter(run_dir: Path, device: str = "cpu", others: list[float] | None = None) -> EnergyMeter:
    """Return the meter of a process; `others` are added to its sums."""

    def reduce(mine: torch.Tensor, how: str) -> torch.Tensor:
        return mine if others is None else mine + torch.tensor(others[: len(mine)], dtype=mine.dtype)

    with open(run_dir / "starts.jsonl", "a") as file:
        file.write('{"step": 0, "num_processes": 1, "time": 1.0}\n')
    place = {"is_main_process": True, "local_process_index": 0, "device": torch.device(device), "reduce": reduce}
    return EnergyMeter(SimpleNamespace(**place), run_dir)


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "energy.jsonl").read_text().splitlines()]


def test_processors_count_once_and_wrap(powercap: Path) -> None:
    first, second = open_processors()
    assert (first.joules(), second.joules()) == (0.0, 0.0)
    for zone in ("intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
        count(powercap, zone, 60_000_000_000)
    count(powercap, "intel-rapl:1", 87_031_250_000 + 2_500_000)
    count(powercap, "intel-rapl:0", 571_150)
    assert first.joules() == pytest.approx((262_143_328_850 - 262_142_900_000 + 571_150) / 1e6)
    assert (first.joules(), second.joules()) == (0.0, 2.5)
    (powercap / "intel-rapl:1/energy_uj").unlink()
    with pytest.raises(OSError, match="intel-rapl:1/energy_uj"):
        open_processors()


def test_a_gpu_is_opened_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    names = ("nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption")
    assert all(callable(getattr(pynvml, name)) for name in names)
    assert open_gpu(torch.device("cpu")) == []
    counted = iter([5_000_000, 5_000_250, 5_007_000])
    driver = ModuleType("pynvml")
    driver.nvmlInit = lambda: None
    driver.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    driver.nvmlDeviceGetTotalEnergyConsumption = lambda gpu: {f"GPU-{GPU}": counted}[gpu].__next__()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=GPU))
    (counter,) = open_gpu(torch.device("cuda", 3))
    assert (counter.joules(), counter.joules()) == (0.25, 6.75)


def test_starts_add_up(powercap: Path, tmp_path: Path) -> None:
    kwh, counted = 0.0, 87_031_250_000
    for number, joules in enumerate((7.2, 3.6), 1):
        energy = meter(tmp_path)
        counted += round(1e6 * joules)
        count(powercap, "intel-rapl:1", counted)
        kwh += joules / 3.6e6
        assert energy.update(7) == {"energy_kwh": pytest.approx(kwh)}
        line = lines(tmp_path)[-1]
        assert (line["start"], line["step"], line["counters"]) == (number, 7, {"processors": 2})
        assert line["energy_parts"] == {"processors": pytest.approx(joules / 3.6e6)}
    assert RunSummary(tmp_path).energy == Energy({"processors": pytest.approx(kwh)}, 2, 2)
    assert RunSummary(tmp_path, 6).energy.kwh is None


def test_a_failing_counter_ends_the_measurement(powercap: Path, tmp_path: Path, caplog) -> None:
    energy = meter(tmp_path)
    (powercap / "intel-rapl:0/energy_uj").unlink()
    assert energy.update(3) == {"energy_kwh": 0.0}
    assert energy.update(4) == {}
    assert len(caplog.records) == 1
    assert RunSummary(tmp_path).energy.words == "measured: processors, in 1 of 1 starts, 1 of them not to the end"


def test_no_permission_is_no_measurement(powercap: Path, tmp_path: Path, caplog, monkeypatch) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied", "energy_uj")

    monkeypatch.setattr(energy_meter, "_number_in", refuse)
    monkeypatch.setattr(energy_meter, "open_gpu", lambda device: refuse() if device.type == "cuda" else [])
    monkeypatch.setattr(torch, "tensor", lambda data, dtype, device, tensor=torch.tensor: tensor(data, dtype=dtype))
    with caplog.at_level("INFO"):
        assert meter(tmp_path, "cuda").update(7) == {}
    assert len(caplog.records) == 2
    assert not (tmp_path / "energy.jsonl").exists()


@pytest.mark.parametrize("is_missing", [False, True])
def test_processes_add_up_or_the_kind_is_left_out(powercap: Path, tmp_path: Path, is_missing: bool) -> None:
    # Sums of the other process: counters and missing ones of both kinds; later joules and failures.
    energy = meter(tmp_path, others=[0, 2, 0, int(is_missing)])
    assert energy.update(1) == ({} if is_missing else {"energy_kwh": 0.0})
    if not is_missing:
        assert lines(tmp_path)[-1]["counters"] == {"processors": 4}


class Steady:
    """A counter that has 1 Wh more at each read."""

    def joules(self) -> float:
        return 3600.0


def main(arguments: list[str]) -> None:
    """Train as `loop.troubled` does, where each read counts 1 Wh of a processor and of the GPU of each process.

    Args:
        arguments: powercap folder, then the arguments of `loop.troubled`.
    """
    powercap, *rest = arguments
    energy_meter.POWERCAP = Path(powercap)
    energy_meter.Counter.joules, energy_meter.open_gpu = Steady.joules, lambda device: [Steady()]
    troubled.main(rest)


@pytest.mark.long
def test_a_kill_and_another_world(write_recipe: Callable[..., Path], powercap: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    changes = {"save": {"every_samples": 80}, "log": {"every_samples": 32}}
    arguments = [str(powercap), "--config", str(write_recipe(run_dir, **changes))]
    assert processes.run("records.test_cost", [*arguments, "--killed", "12"], 2).returncode == 9
    first = lines(run_dir)[-1]
    assert (first["start"], first["counters"]) == (1, {"GPUs": 2, "processors": 2})
    done = processes.run("records.test_cost", arguments, 1)
    assert done.returncode == 0, done.stderr
    last = lines(run_dir)[-1]
    assert (last["start"], last["counters"]) == (2, {"GPUs": 1, "processors": 2})
    energy = RunSummary(run_dir).energy
    assert energy == Energy(energy.parts, 2, 2)
    assert energy.kwh == pytest.approx(first["energy_kwh"] + last["energy_kwh"])


def test_device_hours(tmp_path: Path) -> None:
    """Eight devices for an hour, killed; a start that died before its first sign; two devices for half an hour."""
    starts = [
        {"time": 10_000.0, "last_sign_before": None, "step": 0, "trained_seconds": 0.0, "num_processes": 8},
        {"time": 20_000.0, "last_sign_before": 13_600.0, "step": 6, "trained_seconds": 600.0, "num_processes": 8},
        {"time": 30_000.0, "last_sign_before": 13_600.0, "step": 6, "trained_seconds": 600.0, "num_processes": 2},
    ]
    assert RunSummary(tmp_path).device_hours is None
    files = {
        "starts.jsonl": starts,
        "heartbeat.json": [{"time": 31_800.0, "step": 9, "phase": "ended", "step_s": 1.0}],
        "metrics.jsonl": [{"step": 9, "samples_seen": 9, "trained_seconds": 4200.0}],
    }
    for name, records in files.items():
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    assert RunSummary(tmp_path).device_hours == pytest.approx(9.0)
    assert RunSummary(tmp_path, 9).device_hours == pytest.approx((600 * 8 + 3600 * 2) / 3600)
