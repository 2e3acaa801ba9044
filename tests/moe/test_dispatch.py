"""Dispatch by capacity against the dense reference, and its bookkeeping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.dispatch import by_capacity, dense, slots_per_expert
from routers import ROUTERS, Routing

G, T, E, D = 3, 12, 4, 8


def experts(kernel_EDD):
    return lambda x_EGCD: jnp.tanh(jnp.einsum("egcd,edf->egcf", x_EGCD, kernel_EDD))


@pytest.fixture
def inputs():
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.normal(keys[0], (G, T, D)), jax.random.normal(keys[1], (E, D, D))


@pytest.mark.parametrize("name", ROUTERS)
def test_capacity_equals_dense_when_nothing_overflows(name, inputs):
    x, kernel = inputs
    capacity = T  # no expert can overflow
    router = ROUTERS[name](D, E, capacity=5, rngs=nnx.Rngs(0))
    weight = jax.random.normal(jax.random.key(3), (G, T, D))

    def loss(dispatch):
        def of(x, kernel, params):
            routing = nnx.merge(graphdef, params)(x)
            return (dispatch(x, routing, experts(kernel), capacity).y_GTD * weight).sum()

        return jax.value_and_grad(of, (0, 1, 2))(x, kernel, params)

    graphdef, params = nnx.split(router)
    for ours, reference in zip(
        jax.tree.leaves(loss(by_capacity)), jax.tree.leaves(loss(dense)), strict=True
    ):
        # Two orders of summation of about T * E float32 terms of size 1.
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=2e-5)
    assert by_capacity(x, router(x), experts(kernel), capacity).dropped == 0


def test_keeps_the_heaviest_and_reports_the_dropped_mass():
    weights = jnp.array([0.5, 0.0, 0.9, 0.1]).reshape(1, 4, 1)
    x = jnp.arange(4.0).reshape(1, 4, 1) + 1
    out = by_capacity(x, Routing(weights), lambda x: x, 2)
    np.testing.assert_allclose(out.y_GTD[0, :, 0], [0.5, 0, 2.7, 0], rtol=1e-6)
    np.testing.assert_allclose(out.dropped, 0.1 / 1.5, rtol=1e-5)
    assert out.load_E.tolist() == [2]


def test_priority_decides_who_is_kept():
    weights = jnp.array([0.5, 0.2, 0.9]).reshape(1, 3, 1)
    routing = Routing(weights, priority=jnp.array([0, -1, -2]).reshape(1, 3, 1))
    out = by_capacity(jnp.ones((1, 3, 1)), routing, lambda x: x, 2)
    np.testing.assert_allclose(out.y_GTD[0, :, 0], [0.5, 0.2, 0], rtol=1e-6)


def test_an_expert_without_tokens_is_harmless():
    weights = jnp.zeros((1, 4, 2)).at[..., 0].set(1)
    out = by_capacity(jnp.ones((1, 4, 1)), Routing(weights), lambda x: x, 4)
    np.testing.assert_array_equal(out.y_GTD, jnp.ones((1, 4, 1)))
    assert out.load_E.tolist() == [4, 0]
    none = by_capacity(jnp.ones((1, 4, 1)), Routing(0 * weights), lambda x: x, 4)
    assert none.dropped == 0 and not none.y_GTD.any()


def test_capacity_of_a_group():
    assert slots_per_expert(400, 2, 32, 1.05) == 27  # 26.25
    assert slots_per_expert(10, 1, 1, 1.1) == 10  # never more than the tokens
    assert slots_per_expert(100, 1, 10, 1.1) == 11  # 11.000000000000002 in floating point
    assert slots_per_expert(4, 1, 64, 1.0) == 1
    with pytest.raises(ValueError, match="capacity_factor must be above 0; got 0"):
        slots_per_expert(4, 1, 4, 0)
