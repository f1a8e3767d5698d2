"""What a model's card says of the audit of its training data, `hub.audit` of the recipe."""

import json
import logging
from pathlib import Path
from typing import Any

from flipscale.io.errors import UserError
from flipscale.io.files import read_text
from flipscale.io.text_table import escape_markdown

_log = logging.getLogger(__name__)

# The section of the card. It is left out where the recipe names no audit of the data.
TEMPLATE = """## What is in the training data

By `flipscale prepare audit`, of {samples} samples: {captions} captions, {distinct} of them different.
{exact} images have the bytes of an earlier one and {near} more are nearly like one; {unusable}
samples cannot be used.

Languages of captions of {letters} letters and more: {languages}.

Words of women only stand in {women} captions, words of men only in {men}, both in {both}. The
occupations most often named with either: {occupations}.

The countries named most: {countries}.

Images of test sets that lie in the training data: {tests}.

The audit looked at words, bytes and likeness only: not at faces, and not for harmful or private content."""

_SHOWN = 5
_PARTS = ("samples", "unusable", "captions", "languages", "gender", "countries", "images", "tests")


def read_audit(file: str) -> dict[str, Any]:
    """Return the audit that `flipscale prepare audit` wrote as `file`.

    Raises:
        ValueError: it is missing, or not an audit.
    """
    try:
        found = json.loads(read_text(Path(file)))
        audit = {key: found[key] for key in _PARTS}
        _section(audit)
        return audit
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"hub.audit is {file!r}, which is no audit ({error!r}); name the audit.json of flipscale prepare audit"
        ) from None


def check_audit(file: str | None) -> None:
    """Raise if a recipe names an audit that cannot be read, before a run begins.

    Raises:
        ValueError: as of `read_audit`.
    """
    if file:
        read_audit(file)


def audit_section(file: str | None, num_samples: int | None) -> str | None:
    """Return the card's section on the training data; None if there is no audit, or it is of other data.

    Args:
        file: `hub.audit` of the recipe.
        num_samples: of the run's training data.
    """
    if not file:
        return None
    try:
        audit = read_audit(file)
    except ValueError as error:
        _log.warning("the model card says nothing of the training data: %s", error)
        return None
    if num_samples is not None and audit["samples"] != num_samples:
        _log.warning(
            "hub.audit is of %s samples and the training data has %s: the model card leaves it out",
            f"{audit['samples']:,}",
            f"{num_samples:,}",
        )
        return None
    return _section(audit)


def _section(audit: dict[str, Any]) -> str:
    captions, images, gender, long = audit["captions"], audit["images"], audit["gender"], audit["languages"]["long"]
    occupations = [one for one in gender["occupations"] if one["with_women"] + one["with_men"]][:_SHOWN]
    counts = {
        "samples": audit["samples"],
        "captions": captions["captions"],
        "distinct": captions["distinct"],
        "exact": images["exact_copies"],
        "near": images["near_copies"],
        "unusable": sum(one["count"] for one in audit["unusable"].values()),
        "letters": audit["languages"]["long_letters"],
        "women": gender["women"],
        "men": gender["men"],
        "both": gender["both"],
    }
    lists = {
        "languages": [f"{one['language']} {one['share']:.1%}" for one in long["languages"][:_SHOWN]],
        "occupations": [
            f"{one['occupation']} ({one['with_women']:,} of women, {one['with_men']:,} of men)" for one in occupations
        ],
        "countries": [f"{one['name']} ({one['captions']:,})" for one in audit["countries"]["rows"][:_SHOWN]],
        "tests": [
            f"{one['exact'] + one['near']:,} of the {one['images']:,} of {one['name']}" for one in audit["tests"]
        ],
    }
    said = {name: f"{count:,}" for name, count in counts.items()}
    said |= {name: escape_markdown(", ".join(found)) or "none" for name, found in lists.items()}
    return TEMPLATE.format(**said)
