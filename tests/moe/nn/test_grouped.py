"""Grouped products against a loop over groups: values, derivatives, rows past the last group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.nn import grouped
from moe.nn.grouped import grouped_matmul, grouped_rows
from tests.moe.conftest import quick_jit

D, F = 5, 7
SIZES = {
    "uneven": ([3, 0, 70, 1, 0, 130], 210),  # 210 rows hold 204
    "one takes all": ([0, 0, 12], 12),
    "fewer rows than a block": ([2, 1], 3),
    "nothing": ([0, 0], 4),
}


def loop(x, kernel, bias, sizes):
    """The reference: every group by itself."""
    out, start = jnp.zeros((len(x), kernel.shape[-1])), 0
    for e, size in enumerate(sizes):
        rows = slice(start, start + size)
        out = out.at[rows].set(x[rows] @ kernel[e] + bias[e])
        start += size
    return out


def inputs(groups, rows):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (rows, D), (groups, D, F), (groups, F), (rows, F)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("sizes, rows", SIZES.values(), ids=SIZES)
def test_equals_a_loop_over_groups(sizes, rows):
    x, kernel, bias, weight = inputs(len(sizes), rows)

    def ours(x, kernel, bias):
        n = jnp.array(sizes)
        return grouped_matmul(x, kernel, n) + grouped_rows(bias, n, rows)

    def both(f):
        def loss(x, kernel, bias):
            out = f(x, kernel, bias)
            return (out * weight).sum(), out

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)

    found = quick_jit(both(ours))(x.at[sum(sizes) :].set(jnp.nan), kernel, bias)
    expected = quick_jit(both(lambda *a: loop(*a, sizes)))(x, kernel, bias)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    (_, out), (dx, _, _) = found
    assert not out[sum(sizes) :].any() and not dx[sum(sizes) :].any()


@pytest.mark.parametrize("transposed", [False, True])
def test_the_kernel_of_accelerators_is_the_same_function(transposed, monkeypatch):
    sizes, rows = SIZES["uneven"]
    x, kernel, _, g = inputs(len(sizes), rows)
    n, left = jnp.array(sizes), g if transposed else x
    blocks = grouped.times(left, kernel, n, transposed), grouped.outer(x, g, n)
    branch = lambda *args, cpu, default: default(*args)  # noqa: E731
    monkeypatch.setattr(grouped.lax, "platform_dependent", branch)
    kernels = grouped.times(left, kernel, n, transposed), grouped.outer(x, g, n)
    for a, b in zip(blocks, kernels, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_sums_of_bfloat16_rows_are_float32():
    rows = 300
    ones = jnp.ones((rows, 1), jnp.bfloat16)
    total = jax.grad(lambda k: grouped_matmul(ones, k, jnp.array([rows])).sum())(ones[None, :1])
    assert total.dtype == jnp.bfloat16 and float(total[0, 0, 0]) == 300
