"""What a traced program consists of."""

from collections.abc import Iterator
from typing import Any


def operations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every operation of a program, those inside of others included, and how often it runs: in a `while` loop once."""
    for equation in jaxpr.eqns:
        yield equation, times
        again = times * (equation.params['length'] if equation.primitive.name == 'scan' else 1)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, 'jaxpr', inner)
                if hasattr(inner, 'eqns'):
                    yield from operations(inner, again)
