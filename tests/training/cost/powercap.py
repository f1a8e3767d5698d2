"""A folder as Linux has it in /sys/class/powercap, of a machine with two processors."""

from pathlib import Path

# As a two-socket server had them: a zone's name, its counter and where that starts anew, in microjoules.
RECORDED = {
    "intel-rapl:0": ("package-0", 262_142_900_000, 262_143_328_850),
    "intel-rapl:0:0": ("dram", 11_000_000, 65_712_999_613),
    "intel-rapl:1": ("package-1", 87_031_250_000, 262_143_328_850),
    "intel-rapl:1:0": ("dram", 12_000_000, 65_712_999_613),
    "intel-rapl:2": ("psys", 5_000_000, 262_143_328_850),
    "intel-rapl-mmio:0": ("package-0", 1_000_000, 262_143_328_850),
}


def write(folder: Path) -> Path:
    """Write the zones, and return the folder."""
    for zone, (name, counted, limit) in RECORDED.items():
        (folder / zone).mkdir(parents=True)
        (folder / zone / "name").write_text(f"{name}\n")
        (folder / zone / "max_energy_range_uj").write_text(f"{limit}\n")
        count(folder, zone, counted)
    (folder / "intel-rapl").mkdir()
    return folder


def count(folder: Path, zone: str, microjoules: int) -> None:
    """Have a zone's counter say so many."""
    (folder / zone / "energy_uj").write_text(f"{microjoules}\n")
