"""PAV and the block sums, against scipy and against loops over rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from isotonic.blocks import block_starts, block_sum
from isotonic.pav import _pav_row, pav

N = 12


def museum(n=N):
    """Rows that have broken isotonic solvers."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=n)
    return {
        "noise": noise,
        "decreasing": np.sort(noise)[::-1].copy(),
        "increasing": np.sort(noise),
        "constant": np.full(n, 0.1),
        "ties": np.round(noise),
        "duplicates of the minimum": np.maximum(noise, 0.0),
        "far from zero": 1e4 + noise,
        "one step up": (np.arange(n) >= n // 2).astype(float),
    }


def weights_for(name, n=N):
    rng = np.random.default_rng(1)
    return {
        "equal": np.ones(n),
        "random": rng.uniform(0.1, 3, n),
        "uneven": 10.0 ** rng.integers(-4, 4, n),
    }[name]


def reference(y, w):
    return optimize.isotonic_regression(y, weights=w, increasing=False).x


solve = jax.jit(pav)


@pytest.mark.parametrize("weights", ["equal", "random", "uneven"])
@pytest.mark.parametrize("name", museum())
def test_equals_scipy_and_names_its_blocks(name, weights):
    y, w = museum()[name], weights_for(weights)
    with jax.enable_x64(True):
        v, block = (np.asarray(a) for a in solve(y, w))
    np.testing.assert_allclose(v, reference(y, w), rtol=1e-13, atol=1e-13)
    assert (block == np.maximum.accumulate(np.where(block == np.arange(N), block, 0))).all()
    for start in np.unique(block):
        inside = block == start
        np.testing.assert_allclose(v[inside], np.average(y[inside], weights=w[inside]), rtol=1e-12)


def test_ties_stay_separate_blocks():
    row = jnp.asarray([3.0, 2, 2, 1])
    assert (pav(row, jnp.ones(4)).block == jnp.arange(4)).all()


def test_float32_on_a_long_row():
    rng = np.random.default_rng(2)
    y = np.sort(rng.normal(size=100_000)).astype(np.float32)  # a single pool
    v = pav(y, np.ones_like(y)).v
    # 1e5 merges each round the running mean once.
    np.testing.assert_allclose(v, reference(y, None), atol=3e-5)


def test_zero_weights_are_the_limit_of_small_ones():
    rng = np.random.default_rng(3)
    y, w = rng.normal(size=(50, N)), rng.integers(0, 2, size=(50, N)).astype(float)
    with jax.enable_x64(True):
        v = solve(y, w).v
    for row, weights, got in zip(y, w, v, strict=True):
        np.testing.assert_allclose(got, reference(row, weights + 1e-9), atol=1e-7)


def test_batches_equal_rows_whatever_the_nesting():
    rng = np.random.default_rng(4)
    y = jnp.asarray(rng.normal(size=(3, 4, N)), jnp.float32)
    w = jnp.asarray(rng.uniform(0.1, 2, size=(3, 4, N)), jnp.float32)
    rows = [solve(y[i, j], w[i, j]) for i in range(3) for j in range(4)]
    ways = {
        "batch": solve(y, w),
        "vmap": jax.jit(jax.vmap(jax.vmap(pav)))(y, w),
        "vmap of a middle axis": jax.jit(jax.vmap(pav, in_axes=1, out_axes=1))(y, w),
        "scan": jax.lax.scan(lambda _, row: (0, pav(*row)), 0, (y, w))[1],
        # The path of accelerators, where rows advance in lockstep.
        "lockstep": jax.jit(jax.vmap(jax.vmap(_pav_row)))(y, w),
    }
    for way, fit in ways.items():
        for got, expected in zip(fit, zip(*rows, strict=True), strict=True):
            # Compilers may fuse a multiply and an add differently.
            expected = jnp.stack(expected).reshape(3, 4, N)
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6, err_msg=way)
    shared = jax.vmap(pav, in_axes=(0, None))(y[0], w[0, 0])
    np.testing.assert_allclose(shared.v[0], rows[0].v, rtol=1e-6)


def test_single_positions_and_empty_batches():
    assert pav(jnp.asarray([[2.0], [3.0]]), jnp.ones((2, 1))).v.tolist() == [[2.0], [3.0]]
    assert pav(jnp.zeros((0, 5)), jnp.ones((0, 5))).v.shape == (0, 5)


def test_block_sum_is_the_sum_over_each_block():
    block = jnp.asarray([[0, 0, 2, 3, 3, 3], [0, 1, 1, 1, 1, 5]], jnp.int32)
    x = jnp.asarray(np.random.default_rng(5).normal(size=(2, 6)), jnp.float32)
    total = jax.jit(block_sum)
    same = (block[:, :, None] == block[:, None, :]).astype(x.dtype)
    np.testing.assert_allclose(
        total(x, block), jnp.einsum("bij,bj->bi", same, x), rtol=1e-5, atol=1e-6
    )
    _, pull = jax.vjp(lambda x: total(x, block), x)
    np.testing.assert_allclose(pull(x)[0], total(x, block), rtol=1e-5, atol=1e-6)
    assert (block_starts(block[:, 1:] == block[:, :-1]) == block).all()
