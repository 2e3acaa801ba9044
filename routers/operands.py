"""What every operator does with its arguments: check them, and put the items last, in one dtype."""

import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from isotonic.rows import per_row

# Float16 ends at 65504: a row's derivatives are kept some way below it.
STEEPEST_HALF = 2.0**14


class Rows(NamedTuple):
    """Holds the rows of an operator as its solver takes them, and the way back."""

    x: jax.Array  # scores `[..., n]`, float32 or float64
    k: jax.Array  # `[...]`; NaN where a traced k is outside its range
    lam: jax.Array  # `[...]`; NaN where a traced strength is outside its range
    restore: Callable  # `[..., n]` to the shape and the dtype of the scores


def rows(x, k, strength, axis) -> Rows:
    """Takes an operator's arguments apart into rows.

    Args:
      x: scores, as for `as_scores`; solved in float32, and float64 in float64.
      k: real, in (0, n]; a number or an array that broadcasts against x without `axis`. May be
        traced. 1 where an operator selects nothing.
      strength: lam > 0; as k.
      axis: the axis of the items.

    A traced k or strength outside its range is NaN in the rows, and with it all of its row. Of
    float16 scores the derivatives are bounded, to be finite in float16: those of a strength below
    1/STEEPEST_HALF are scaled down to what they are there.

    Raises:
      ValueError: scores that are no real numbers; an axis that they do not have; a k or strength
        of the wrong shape or, where not traced, outside its range.
    """
    x = as_scores(x)
    place = check_axis(axis, x)
    items = jnp.moveaxis(x, place, -1)
    items = items.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    n, floats = items.shape[-1], jnp.finfo(items.dtype)
    k = _number("k", k, items, n, f"above 0 and at most {n}, the length of axis {axis}")
    beyond = f" ({floats.dtype} has {floats.tiny:.2g} to {floats.max:.2g})"
    lam = _number("strength", strength, items, float(floats.max), "above 0", beyond)
    if x.dtype == jnp.float16:
        items = _damped(items, jnp.minimum(lam * STEEPEST_HALF, 1)[..., None])
    return Rows(items, k, lam, lambda y: jnp.moveaxis(y, -1, place).astype(x.dtype))


def nan_rows(x, *numbers):
    """Returns x `[..., n]` with rows of NaN where a score, or one of `numbers` `[...]`, is NaN.

    So are the derivatives there. Other rows keep theirs.
    """
    wrong = jnp.isnan(x).any(-1)
    for number in numbers:
        wrong |= jnp.isnan(number)
    return x * jnp.where(wrong, jnp.nan, 1).astype(x.dtype)[..., None]


def as_scores(x) -> jax.Array:
    """Returns lists, NumPy's or JAX's arrays as one of floats: JAX's default for whole numbers."""
    default = jnp.result_type(float)
    try:
        # NumPy's int64 would lose its upper half on the way.
        x = jnp.asarray(x.astype(default) if _whole_numbers(x) else x)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"scores must be an array of numbers: {error}") from None
    if _whole_numbers(x):
        return x.astype(default)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"scores must be real numbers, not {x.dtype}")
    return x


def check_axis(axis, x) -> int:
    """Returns the place of x's axis, from 0; raises ValueError where x has no such axis."""
    if x.ndim == 0:
        raise ValueError("scores must have an axis of items; got a scalar")
    place = whole(axis, "axis")
    if not -x.ndim <= place < x.ndim:
        range_ = f"from {-x.ndim} to {x.ndim - 1}"
        raise ValueError(f"axis must be {range_} for scores of shape {x.shape}; got {axis}")
    return place % x.ndim


def class_numbers(labels, scores):
    """Returns the labels of scores `[..., V]`, `[...]`, checked; a traced one that is no class
    becomes V."""
    labels, num_classes = jnp.asarray(labels), scores.shape[-1]
    if labels.shape != scores.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        given = f"{labels.dtype} {labels.shape}"
        raise ValueError(f"labels must be whole numbers {scores.shape[:-1]}, not {given}")
    known = (labels >= 0) & (labels < num_classes)
    if not isinstance(known, jax.core.Tracer) and not known.all():
        raise ValueError(f"labels must be from 0 to {num_classes - 1}; got {labels}")
    return jnp.where(known, labels, num_classes)


def check_norm(p, name="p") -> float:
    """Returns p as a Python float; raises ValueError where it is no norm that has a conjugate."""
    try:
        number = math.nan if isinstance(p, str) else float(p)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number above 1, not traced; got {p}") from None
    if not number > 1 or math.isinf(number):
        raise ValueError(f"{name} must be a finite number above 1, not {p}")
    return number


def whole(k, name="k") -> int:
    """Returns k as a Python number, for operators that cannot select a fraction of an item."""
    try:
        return operator.index(k)
    except TypeError:
        rows_ = ", one for all rows" if name == "k" else ""
        message = f"{name} must be a whole number{rows_} and not traced; got {k}"
        raise ValueError(message) from None


def _whole_numbers(x) -> bool:
    dtype = getattr(x, "dtype", np.object_)
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_)


def _number(name, given, items, most, range_, note=""):
    """A number at every row of `items`: in range, or an error, or NaN where it is traced."""
    least = float(jnp.finfo(items.dtype).tiny)
    if len(shape := np.shape(given)) > items.ndim - 1 or any(
        a not in (1, b) for a, b in zip(shape[::-1], items.shape[-2::-1], strict=False)
    ):
        rows_ = f"{items.shape[:-1]}, that of the scores without their axis"
        raise ValueError(f"{name} of shape {shape} does not broadcast to {rows_}")
    traced = isinstance(given, jax.core.Tracer)
    if traced or (isinstance(given, jax.Array) and not given.is_fully_addressable):
        (number,) = per_row(items, given)
        return jnp.where((number >= least) & (number <= most), number, jnp.nan)
    numbers = np.asarray(given)
    real = jnp.issubdtype(numbers.dtype, jnp.floating) or _whole_numbers(numbers)
    if not real or not ((numbers >= least) & (numbers <= most)).all():
        raise ValueError(f"{name} must be {range_}; got {given}{note}")
    return per_row(items, given)[0]


@jax.custom_jvp
def _damped(x, factor):
    """Returns x, with derivatives multiplied by the factor."""
    return x


@_damped.defjvp
def _damped_jvp(primals, tangents):
    (x, factor), (dx, _) = primals, tangents
    return x, dx * factor
