"""Isotonic regression, weighted, in both directions and differentiable: the public face."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from isotonic.blocks import Fit, Offset, block_sum, on_any_mesh
from isotonic.dykstra import dykstra_or_warn
from isotonic.merge import merge
from isotonic.pav import pav

# A solver takes (y, w, offset=None), `[..., n]` and of one float dtype, with the largest w about 1,
# and returns the decreasing fit with fields `v` and `block`, see `isotonic.blocks.Fit`.
SOLVERS = {"pav": pav, "merge": merge, "dykstra": dykstra_or_warn}


def isotonic_regression(
    y, weights=None, *, increasing=True, solver=None, axis=-1, y_min=None, y_max=None
):
    r"""Solves  argmin_v  1/2 \sum_i w_i (y_i - v_i)^2  subject to v monotone along `axis`,
    and y_min <= v_i <= y_max.

    Args:
      y: data, any shape; every line along `axis` is a problem of its own, of any length n >= 0.
      weights: w >= 0, of a shape that broadcasts to y's along its last axes; 1 if None. A point
        of zero weight has no say in the values of the others, which are what scikit-learn's
        `IsotonicRegression` fits after dropping the point; its own value is the limit of small
        equal weights, which keeps the fit continuous. Solver "dykstra" takes no zeros.
      increasing: v_1 <= ... <= v_n if True, v_1 >= ... >= v_n if False; static.
      solver: "pav" (exact, sequential), "merge" (exact, data-parallel, of depth log n), "dykstra"
        (iterative, slow to converge on wide pools; it warns of rows where it did not), or None:
        "pav" on CPU, where no other is faster (docs/benchmarks.md), and "merge" elsewhere, where a
        sequential solver pays a kernel launch for every position.
      axis: the axis along which v is monotone.
      y_min, y_max: bounds on v, scalars or arrays that broadcast to y; no bound if None. The
        bounded fit is the unbounded one, clipped.

    Returns:
      v, of y's shape and float dtype; integers become the default float. float16 and bfloat16
      are solved in float32. A line is NaN where it holds a NaN, or a traced weight that the
      solver cannot take; other lines are not touched by that.

    Raises:
      ValueError: on an unknown solver, an axis that y does not have, weights of the wrong shape,
        and, if the weights are concrete, on negative ones or on zeros that the solver cannot take.

    Derivative, forward and reverse, with B the block of position i and W its weight:
      dv_i = \sum_{j in B} (w_j dy_j + (y_j - v_i) dw_j) / W.
    Where y lies between two sets of blocks, those of the solver are used. In a block without
    weight dv is the plain mean of dy.
    """
    solve = solver_of(solver)
    y, dtype = as_floats(y)
    w = jnp.ones_like(y) if weights is None else _weights(weights, y, solver)
    # Zeros of each are added to the other: in a loop both have to vary over the same devices.
    y, w = y + jnp.zeros_like(w), w + jnp.zeros_like(y)
    y, w = (jnp.moveaxis(a, axis, -1) for a in (y, w))
    if y.size:
        wrong = jnp.isnan(y + w).any(-1, keepdims=True)
        # By powers of two, which round nothing: sums of the largest floats leave their range.
        limit = jnp.finfo(y.dtype).maxexp - 28
        small = _power_of_two(y, -limit, limit)
        # Negating keeps the order of positions, so that both directions share one layout of blocks.
        scale = -small if increasing else small
        jitted = jax.jit(_fit, static_argnums=0)  # so that eager calls do not retrace the loops
        v = on_any_mesh(partial(jitted, solve))(y * scale, w * _power_of_two(w, 0, 0)) / scale
        y = v * jnp.where(wrong, jnp.nan, 1).astype(v.dtype)
    y = jnp.moveaxis(y, -1, axis)
    if y_min is not None or y_max is not None:
        y = jnp.clip(y, y_min, y_max)
    return y.astype(dtype)


def as_floats(x):
    """Returns x as an array of float32 or better, and the float dtype of what comes of it."""
    x = jnp.asarray(x)
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.result_type(float)
    return x.astype(jnp.promote_types(dtype, jnp.float32)), dtype


def known(value):
    """Returns an argument's values as a NumPy array, or None where they are not at hand."""
    traced = isinstance(value, jax.core.Tracer)
    if traced or (isinstance(value, jax.Array) and not value.is_fully_addressable):
        return None
    return np.asarray(value)


def solver_of(name: str | None):
    """Returns the solver of that name in `SOLVERS`, or the one for the platform."""
    if name is None:
        return _automatic
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; known: {', '.join(sorted(SOLVERS))}")
    return SOLVERS[name]


def _automatic(y, w, offset=None) -> Fit:
    def of(solve):
        return lambda y, w, *offset: solve(y, w, Offset(*offset) if offset else None)

    return jax.lax.platform_dependent(y, w, *(offset or ()), cpu=of(pav), default=of(merge))


def _weights(weights, y, solver):
    """Check the weights and return them at each of y's positions, NaN where they cannot be used."""
    given = np.shape(weights)
    fits = zip(given[::-1], y.shape[::-1], strict=False)
    if len(given) > y.ndim or any(a not in (1, b) for a, b in fits):
        raise ValueError(f"weights of shape {given} do not broadcast to y's {y.shape}")
    if (values := known(weights)) is not None:
        if not (values >= 0).all():
            raise ValueError(f"weights must not be negative, got {values.min()}")
        if solver == "dykstra" and (values == 0).any():
            raise ValueError("solver 'dykstra' needs positive weights; use solver='pav' for zeros")
    w = jnp.broadcast_to(jnp.asarray(weights, y.dtype), y.shape)
    return jnp.where(w > 0 if solver == "dykstra" else w >= 0, w, jnp.nan)


def _power_of_two(x, low: int, high: int):
    """Returns what to multiply each row of x by, to have its largest entry in [2^low, 2^high]."""
    size = jnp.where(jnp.isfinite(x), jnp.abs(jax.lax.stop_gradient(x)), 0)
    exponent = jnp.frexp(size.max(-1, keepdims=True))[1]
    limit = jnp.finfo(x.dtype).maxexp - 4  # the factor itself is to be a normal float
    shift = jnp.clip(jnp.clip(exponent, low, high) - exponent, -limit, limit)
    return jnp.ldexp(jnp.ones_like(x[..., :1]), shift)


def _fit(solve, y, w):
    fit = solve(*jax.lax.stop_gradient((y, w)))
    return _differentiable(fit.v, fit.block, y, w)


@jax.custom_jvp
def _differentiable(v, block, y, w):
    """Returns v, the fit of y and w on these blocks, with its derivatives in y and w."""
    return v


@_differentiable.defjvp
def _differentiable_jvp(primals, tangents):
    _, block, y, w = primals
    *_, dy, dw = tangents
    v = _differentiable(*primals)
    total = block_sum(w, block)
    weighted = total > 0
    count = block_sum(jnp.ones_like(w), block)
    total = jnp.where(weighted, total, count)
    share = jnp.where(weighted, w, 1) / total
    # Without weight the fit does not depend on small equal weights.
    pull = jnp.where(weighted, (y - v) / total, 0)
    return v, block_sum(share * dy + pull * dw, block)
