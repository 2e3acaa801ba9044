"""Dispatch by capacity against the dense reference, and its bookkeeping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.nn.dispatch import (
    DISPATCHES,
    Limits,
    Network,
    by_capacity,
    dense,
    dropless,
    slots_per_expert,
)
from moe.nn.grouped import grouped_matmul
from routers import ROUTERS, RouterState, Routing, Tokens
from tests.kinds import each_kind
from tests.moe.conftest import quick_jit

G, T, E, D = 3, 12, 4, 8


def experts(kernel_EDD):
    return Network(
        on_slots=lambda x: jnp.tanh(jnp.einsum("egcd,edf->egcf", x, kernel_EDD)),
        on_rows=lambda kernels, x, sizes, _: jnp.tanh(grouped_matmul(x, kernels[0], sizes)),
        parameters=(kernel_EDD,),
        axes=(("expert", None, None),),
    )


# Experts that do nothing.
TOKENS_THEMSELVES = Network(lambda x: x, lambda _, x, sizes, ids: x, (), ())


def call(router, x, mask=None):
    place = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    told = {"tokens": Tokens(place, place)} if router.reads_tokens else {}
    return router(x, mask=mask, **told)


@pytest.fixture
def inputs():
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.normal(keys[0], (G, T, D)), jax.random.normal(keys[1], (E, D, D))


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
@pytest.mark.parametrize("name", each_kind(ROUTERS))
def test_equals_dense_when_nothing_overflows(name, dispatch, inputs):
    x, kernel = inputs
    dispatch = DISPATCHES[dispatch]
    limits = Limits(capacity=T, rows=T * E)  # no expert can overflow
    mask = jnp.ones((G, T), bool).at[1, 5:].set(False).at[2].set(False)
    router = ROUTERS[name](D, E, capacity=5, rngs=nnx.Rngs(0))
    weight = jax.random.normal(jax.random.key(3), (G, T, D))

    def loss(dispatch):
        def of(x, kernel, params):
            routing = call(nnx.merge(graphdef, params, memory), x, mask=mask)
            return (dispatch(x, routing, experts(kernel), limits).y_GTD * weight).sum()

        return quick_jit(jax.value_and_grad(of, (0, 1, 2)))(x, kernel, params)

    graphdef, params, memory = nnx.split(router, nnx.Param, RouterState)
    for ours, reference in zip(
        jax.tree.leaves(loss(dispatch)), jax.tree.leaves(loss(dense)), strict=True
    ):
        # Two orders of summation of about T * E float32 terms of size 1.
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)
    assert dispatch(x, call(router, x), experts(kernel), limits).dropped == 0


def test_keeps_the_heaviest_and_reports_the_dropped_mass():
    weights = jnp.array([0.5, 0.0, 0.9, 0.1]).reshape(1, 4, 1)
    x = jnp.arange(4.0).reshape(1, 4, 1) + 1
    out = by_capacity(x, Routing(weights), lambda x: x, Limits(2))
    np.testing.assert_allclose(out.y_GTD[0, :, 0], [0.5, 0, 2.7, 0], rtol=1e-6)
    np.testing.assert_allclose(out.dropped, 0.1 / 1.5, rtol=1e-5)
    assert out.load_E.tolist() == [2]


def test_priority_decides_who_is_kept():
    weights = jnp.array([0.5, 0.2, 0.9]).reshape(1, 3, 1)
    routing = Routing(weights, priority=jnp.array([0, -1, -2]).reshape(1, 3, 1))
    out = by_capacity(jnp.ones((1, 3, 1)), routing, lambda x: x, Limits(2))
    np.testing.assert_allclose(out.y_GTD[0, :, 0], [0.5, 0.2, 0], rtol=1e-6)


def test_in_order_the_first_are_kept_whatever_the_weight_and_the_priority():
    weights = jnp.array([0.1, 0.0, 0.5, 0.9]).reshape(1, 4, 1)
    routing = Routing(weights, priority=weights)
    x = jnp.arange(4.0).reshape(1, 4, 1) + 1
    out = by_capacity(x, routing, lambda x: x, Limits(2, in_order=True))
    np.testing.assert_allclose(out.y_GTD[0, :, 0], [0.1, 0, 1.5, 0], rtol=1e-6)
    np.testing.assert_allclose(out.dropped, 0.9 / 1.5, rtol=1e-5)
    weights = jnp.array([[0.5, 0.01], [0.0, 0.9], [0.1, 0.3]])[None]
    out = quick_jit(
        lambda x: dropless(x, Routing(weights), TOKENS_THEMSELVES, Limits(0, 4, in_order=True))
    )(jnp.ones((1, 3, 1)))
    np.testing.assert_allclose(out.y_GTD[0, :, 0], [0.51, 0.9, 0.3], rtol=1e-6)
    np.testing.assert_allclose(out.dropped, 0.1 / 1.81, rtol=1e-5)


def test_an_expert_without_tokens_is_harmless():
    weights = jnp.zeros((1, 4, 2)).at[..., 0].set(1)
    out = by_capacity(jnp.ones((1, 4, 1)), Routing(weights), lambda x: x, Limits(4))
    np.testing.assert_array_equal(out.y_GTD, jnp.ones((1, 4, 1)))
    assert out.load_E.tolist() == [4, 0]
    none = by_capacity(jnp.ones((1, 4, 1)), Routing(0 * weights), lambda x: x, Limits(4))
    assert none.dropped == 0 and not none.y_GTD.any()


def test_dropless_keeps_the_heaviest_rows_of_a_group_and_reports_the_rest():
    weights = jnp.array([[0.5, 0.2], [0.0, 0.9], [0.3, 0.1]])[None]
    x = jnp.ones((1, 3, 1))
    out = dropless(x, Routing(weights), TOKENS_THEMSELVES, Limits(0, rows=3))
    np.testing.assert_allclose(out.y_GTD[0, :, 0], [0.5, 0.9, 0.3], rtol=1e-6)
    np.testing.assert_allclose(out.dropped, 0.3 / 2.0, rtol=1e-5)
    assert out.load_E.tolist() == [2, 1]


def test_dropless_with_experts_that_get_nothing():
    weights = jnp.zeros((1, 4, 2)).at[..., 1].set(1)
    for factor, load in ((1, [0, 4]), (0, [0, 0])):
        routing = Routing(factor * weights)
        out = dropless(jnp.ones((1, 4, 1)), routing, TOKENS_THEMSELVES, Limits(0, rows=6))
        np.testing.assert_array_equal(out.y_GTD, factor * jnp.ones((1, 4, 1)))
        assert out.load_E.tolist() == load and out.dropped == 0


def test_capacity_of_a_group():
    assert slots_per_expert(400, 2, 32, 1.05) == 27  # 26.25
    assert slots_per_expert(10, 1, 1, 1.1) == 10  # never more than the tokens
    assert slots_per_expert(100, 1, 10, 1.1) == 11  # 11.000000000000002 in floating point
    assert slots_per_expert(4, 1, 64, 1.0) == 1
    with pytest.raises(ValueError, match="capacity_factor must be above 0; got 0"):
        slots_per_expert(4, 1, 4, 0)
