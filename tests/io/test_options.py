"""Every number of a recipe has a range, and a number out of its range is named with what is allowed."""

import dataclasses
import math
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest

from flipscale.evaluation import suite as tasks
from flipscale.io.options import Count, Positive, Range, Share, ShareBelowOne, check_ranges
from flipscale.objectives.build_objective import loss_kinds
from flipscale.recipe.recipe import Recipe


@dataclasses.dataclass
class Inner:
    ratio: ShareBelowOne = 0.0
    sizes: list[Count] = dataclasses.field(default_factory=lambda: [1])


@dataclasses.dataclass
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    pair: tuple[Share, Share] = (0.0, 1.0)
    norm: Positive | None = None
    several: list[Inner] = dataclasses.field(default_factory=list)
    name: str = "x"


def unbounded(hint: Any, name: str) -> Iterator[str]:
    """The names of the numbers in a type that have no range."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        for field, inner in get_type_hints(hint, include_extras=True).items():
            if get_origin(inner) is not None or inner in (int, float) or dataclasses.is_dataclass(inner):
                yield from unbounded(inner, f"{name}.{field}")
    elif hint in (int, float):
        yield name
    elif get_origin(hint) is Annotated:
        if not any(isinstance(one, Range) for one in hint.__metadata__):
            yield name
    elif get_origin(hint) in (list, tuple, dict, Union, types.UnionType):
        for one in get_args(hint):
            yield from unbounded(one, name)


@pytest.mark.parametrize(
    "kind", [Recipe, *tasks.KINDS.values(), *loss_kinds().values()], ids=lambda kind: kind.__name__
)
def test_every_number_has_a_range(kind: type) -> None:
    assert list(unbounded(kind, kind.__name__)) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Outer(inner=Inner(ratio=math.nan)), "inner.ratio is nan; it must be at least 0 and below 1"),
        (Outer(norm=math.inf), "norm is inf; it must be above 0"),
        (Outer(pair=(0.5, 9.0)), r"pair\[1\] is 9.0; it must be at least 0 and at most 1"),
        (Outer(inner=Inner(sizes=[3, 0])), r"inner.sizes\[1\] is 0; it must be at least 1 and at most 1,000,000,000"),
        (Outer(several=[Inner(), Inner(ratio=2)]), r"several\[1\].ratio is 2; it must be at least 0 and below 1"),
        (Outer(name=None), "name is null; leave it out, or give it a value"),  # type: ignore[arg-type]
        (Outer(name="a\udcff"), r"it must be without '\\udcff'"),
        (Outer(inner=Inner(sizes=[10**5000])), r"sizes\[0\] is a number of thousands of digits; it must be"),
    ],
)
def test_a_number_out_of_its_range(value: Outer, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_ranges(value)
