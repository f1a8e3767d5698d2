"""What a start takes is written, whatever becomes of it, and never stops it."""

import itertools
import json
import logging
import threading
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
import torch.distributed as dist
from training.cost.powercap import count, write

from flipscale.status import as_table, read_status
from flipscale.training.cost import counters, meter
from flipscale.training.cost.energy import Energy, read_energy
from flipscale.training.cost.meter import EnergyMeter

WATCH = SimpleNamespace(step=7)


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write(tmp_path / "powercap")
    monkeypatch.setattr(counters, "POWERCAP", folder)
    return folder


def place(rank: int = 0, world: int = 1, device: str = "cpu") -> SimpleNamespace:
    """What a meter asks accelerate, of the first process of a machine."""
    return SimpleNamespace(
        is_main_process=rank == 0, num_processes=world, local_process_index=0, device=torch.device(device)
    )


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "energy.jsonl").read_text().splitlines()]


def begin(run_dir: Path) -> None:
    """Begin a start."""
    with open(run_dir / "starts.jsonl", "a") as file:
        file.write('{"step": 0}\n')


def test_starts_add_up(powercap: Path, tmp_path: Path) -> None:
    kwh = 0.0
    for number, joules in enumerate((7.2, 3.6), 1):
        begin(tmp_path)
        with EnergyMeter(place(), tmp_path, WATCH) as energy:
            assert energy.kwh() == {}
            before = int((powercap / "intel-rapl:1/energy_uj").read_text())
            count(powercap, "intel-rapl:1", before + round(1e6 * joules))
        kwh += joules / 3.6e6
        line = lines(tmp_path)[-1]
        assert (line["start"], line["step"], line["counters"]) == (number, 7, {"processors": 2})
        assert line["energy_parts"] == {"processors": pytest.approx(joules / 3.6e6)}
        assert line["failed"] is False
        assert energy.kwh() == {"energy_kwh": pytest.approx(kwh)}
    assert read_energy(tmp_path) == Energy({"processors": pytest.approx(kwh)}, 2, 2)
    with open(tmp_path / "energy.jsonl", "a") as file:  # what a disk or a text editor may have left
        file.write('{"start": 2, "step": 7, "energy_parts": 3}\n{"start": "2"}\n')
    assert read_energy(tmp_path).kwh == pytest.approx(kwh)
    assert "energy" not in {thread.name for thread in threading.enumerate()}


def test_a_counter_that_fails_ends_the_measuring_and_not_the_run(
    powercap: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter, "READ_SECONDS", 0.01)
    monkeypatch.setattr(meter, "WRITE_SECONDS", 0.0)
    begin(tmp_path)
    with EnergyMeter(place(), tmp_path, WATCH) as energy:
        (powercap / "intel-rapl:0/energy_uj").unlink()
        energy._thread.join(60)
        assert not energy._thread.is_alive()
    assert [record.message for record in caplog.records] == [
        f"energy is not measured any more: [Errno 2] No such file or directory: '{powercap}/intel-rapl:0/energy_uj'"
    ]
    assert lines(tmp_path)[-1]["failed"] is True
    assert read_energy(tmp_path).words == "measured: processors, in 1 of 1 starts, 1 of them not to the end"


def test_a_folder_in_place_of_the_file_ends_no_run(
    powercap: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin(tmp_path)
    (tmp_path / "energy.jsonl").mkdir()
    with EnergyMeter(place(), tmp_path, WATCH):
        pass
    assert read_energy(tmp_path) == Energy()
    assert all(record.message.startswith(f"the energy of {tmp_path} is not known: ") for record in caplog.records)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_cannot_be_read_is_absent(
    powercap: Path, tmp_path: Path, device: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied", "energy_uj")

    monkeypatch.setattr(counters.ProcessorCounter, "_microjoules", refuse)
    monkeypatch.setattr(meter, "open_gpu", lambda device: refuse() if device.type == "cuda" else [])
    begin(tmp_path)
    with caplog.at_level(logging.INFO), EnergyMeter(place(device=device), tmp_path, WATCH) as energy:
        pass
    said = "is not measured: [Errno 13] Permission denied: 'energy_uj'"
    kinds = ["GPUs", "processors"] if device == "cuda" else ["processors"]
    assert [record.message for record in caplog.records] == [f"the energy of the {kind} {said}" for kind in kinds]
    assert not (tmp_path / "energy.jsonl").exists()
    assert energy.kwh() == {}
    assert read_energy(tmp_path).kwh is None


@pytest.mark.parametrize("is_read", [True, False])
def test_machines_add_up_or_are_left_out(
    powercap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_read: bool
) -> None:
    """A machine that may not be read leaves no sum that lacks it."""
    store = dist.HashStore()
    monkeypatch.setattr(meter, "own_store", lambda: store)
    monkeypatch.setattr(meter, "_number", itertools.repeat(0))
    begin(tmp_path)
    first = EnergyMeter(place(0, 2), tmp_path, WATCH)
    if not is_read:
        (powercap / "intel-rapl:0/energy_uj").unlink()
    with EnergyMeter(place(1, 2), tmp_path, WATCH):
        count(powercap, "intel-rapl:1", 87_031_250_000 + 1_800_000)
    if not is_read:
        count(powercap, "intel-rapl:0", 262_142_900_000)
    first.settle()
    if is_read:
        assert lines(tmp_path)[-1]["energy_kwh"] == pytest.approx(1e-6)
        assert lines(tmp_path)[-1]["counters"] == {"processors": 4}
    assert (tmp_path / "energy.jsonl").exists() == is_read


def test_a_kill_and_another_world(write_recipe, powercap: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    file = str(write_recipe(run_dir, save={"every_samples": 80}, cost={"kwh_co2_grams": 500.0}))
    metered = ["training.cost.metered", [str(powercap), str(run_dir)]]
    killed = processes.run(metered[0], [*metered[1], "--killed", "12", "--config", file], 2)
    assert killed.returncode == 9, killed.stderr
    (lost,) = {line["start"] for line in lines(run_dir)}
    assert lost == 1
    first = lines(run_dir)[-1]
    assert first["counters"] == {"GPUs": 2, "processors": 2}
    done = processes.run(metered[0], [*metered[1], "--config", file], 1)
    assert done.returncode == 0, done.stderr
    last = lines(run_dir)[-1]
    assert (last["start"], last["counters"]) == (2, {"GPUs": 1, "processors": 2})
    kwh = first["energy_kwh"] + last["energy_kwh"]
    assert first["energy_kwh"] > 0.003
    assert last["energy_kwh"] > 0.002
    found = read_energy(run_dir)
    assert found.kwh == pytest.approx(kwh)
    assert found.is_whole
    status = read_status(run_dir, last["time"])
    assert status["energy_kwh"] == pytest.approx(kwh)
    assert f"{kwh:,.3g} kWh, measured: GPUs and processors" in as_table(status)
    card = (run_dir / "model/README.md").read_text()
    assert f"| energy | {kwh:.2f} kWh, measured: GPUs and processors |" in card
    assert f"| emissions | {kwh / 2:.2f} kg of CO2, at 500 g a kWh and a PUE of 1, without" in card
