"""Reads what a function computes from its jaxpr, compiled programs being other on every device."""

from collections.abc import Iterator

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Yields every equation, those of loops, branches and called functions too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from equations(getattr(value, "jaxpr", value))


def _is_jaxpr(value) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)


def float32_precisions(f, *args) -> list:
    """Returns the `precision` of each product of float32 arrays in f(*args)."""
    return [
        equation.params["precision"]
        for equation in equations(jax.make_jaxpr(f)(*args).jaxpr)
        if "dot_general" in equation.primitive.name
        and all(operand.aval.dtype == "float32" for operand in equation.invars[:2])
    ]
