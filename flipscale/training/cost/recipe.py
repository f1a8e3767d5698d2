"""The section `cost` of a recipe: what a device's hour and a kWh stand for, which no machine knows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flipscale.io.errors import UserError
from flipscale.io.options import NonNegative, Overhead

# In `hub` before; every recipe that a run saved then has them, mostly null.
_FORMER = ("device_hour_dollars", "kwh_co2_grams")
_NULL = ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True)
class CostRecipe:
    """What a run costs, for its model card, its page and `flipscale plan`; what is null is not said there.

    Args:
        device_hour_dollars: The price of a device for an hour, in dollars.
        kwh_co2_grams: How many grams of CO2 the grid emits for a kWh.
        pue: The power of the computing centre over that of its machines; at 1, cooling and the like are left out.
    """

    device_hour_dollars: NonNegative | None = None
    kwh_co2_grams: NonNegative | None = None
    pue: Overhead = 1.0

    def dollars(self, device_hours: float | None) -> float | None:
        """Return the price of some hours of devices, None where either is unknown."""
        if device_hours is None or self.device_hour_dollars is None:
            return None
        return device_hours * self.device_hour_dollars

    def co2_kg(self, kwh: float | None) -> float | None:
        """Return what the grid emits for the kWh of machines, None where either is unknown. What it takes to make the
        machines is not in it."""
        return None if kwh is None or self.kwh_co2_grams is None else kwh * self.pue * self.kwh_co2_grams / 1000


def cost_of_saved(saved: dict[str, Any]) -> CostRecipe:
    """Return the section of a saved recipe; of one from before there was one, that nothing is known."""
    known = {name: value for name, value in (saved.get("cost") or {}).items() if name in CostRecipe.__annotations__}
    return CostRecipe(**known)


def refuse_former(flag: str) -> None:
    """Raise if a flag, such as `--hub.kwh_co2_grams`, is of a field that has moved to this section.

    Raises:
        ValueError: it is; the message names the new one.
    """
    for name in _FORMER:
        if flag == f"--hub.{name}":
            raise UserError(f"hub.{name} is called cost.{name} now; set that")


def without_former(file: Path, outline: Any, is_saved: bool) -> str:
    """Return what `--config` takes for a recipe's file: its path or, where the file has fields that have moved to this
    section, its content without them.

    Args:
        outline: of `read_outline`; it loses these fields, too.
        is_saved: a run wrote it, of which nobody asks what it costs.

    Raises:
        ValueError: such a field is set.
    """
    hub = outline.get("hub") if isinstance(outline, dict) else None
    former = [name for name in _FORMER if name in hub] if isinstance(hub, dict) else []
    if not isinstance(hub, dict) or not former:
        return str(file)
    content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    for name in former:
        if hub[name] not in _NULL and not is_saved:
            refuse_former(f"--hub.{name}")
        del hub[name], content["hub"][name]
    return yaml.safe_dump(content, sort_keys=False)
