"""What share of its peak a GPU reaches: as stated, or as `flipscale bench step` has measured it."""

import json
from pathlib import Path

from flipscale.io.errors import UserError

# Of a GPU's peak, where nobody says otherwise.
USUAL_SHARE = 0.4


def share_of_peak(flag: str, stated: float | None, bench: Path | None, peak: float) -> float:
    """Return the share of the peak that is reached: as stated, as measured, or a usual one.

    Args:
        flag: that states it.
        bench: the file of the JSON line of `flipscale bench step --json`, which counts the useful operations of whole
            steps on one GPU.
        peak: operations a second of a GPU.

    Raises:
        ValueError: both are given, the file cannot be read, or the GPU was faster than its peak.
    """
    if bench is None:
        return USUAL_SHARE if stated is None else stated
    if stated is not None:
        raise UserError(f"{flag} and --bench both say what share of its peak a GPU reaches; leave one of them out")
    flops = _measured_flops(bench)
    if not 0.0 < flops <= peak:
        raise UserError(
            f"--bench {bench} has {flops / 1e12:,.1f} Tflop/s, and the GPU's peak is {peak / 1e12:,.0f}; measure it on "
            "a GPU of this kind"
        )
    return flops / peak


def _measured_flops(file: Path) -> float:
    try:
        found = json.loads(file.read_text(encoding="utf-8").strip().splitlines()[-1])
        return float(found["flops_per_pair"]) * float(found["images_per_s"])
    except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
        raise UserError(
            f"--bench {file} is not a JSON line of `flipscale bench step --json` ({error!r}); write one there"
        ) from error
