"""Causality of a layer of experts: no output depends on a later token, nor on another row.

Bit for bit: routing is discrete, so a gradient or a tolerance would not see every look ahead. It
takes matrix products whose rows do not depend on one another's place (`moe.nn.grouped`).
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moe.nn.layer import MoE
from routers import ROUTERS
from tests.moe.conftest import quick_jit

B, T, D, F, E = 4, 16, 8, 16, 4
CAUSAL = [name for name, router in ROUTERS.items() if router.causal]
OTHERS = [name for name, router in ROUTERS.items() if not router.causal]
POSITIONS = (0, 5, 14)
CASES = [("capacity", True), ("dropless", True), ("dense", True), ("capacity", False)]
X = jax.random.normal(jax.random.key(0), (B, T, D))
MASK = jnp.arange(T)[None] < jnp.array([T, 9, 0, 13])[:, None]


def layer(name, dispatch, *, force=False, **settings):
    """A causal layer in which slots and bounds are too few; `force` calls any router causal."""
    router = ROUTERS[name]
    if force:
        router = type("Forced", (router,), {"why_not_causal": classmethod(lambda *_: None)})
    return MoE(
        D,
        F,
        T,
        router=router,
        settings={"k": 2} | settings,
        num_experts=E,
        group_size=1,
        capacity_factor=0.5,
        eval_capacity_factor=0.5,
        dispatch=dispatch,
        dropless_bound=0.5,
        dropless_receive=0.7,
        causal=True,
        dropout=0.1,
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )


def compiled(model, *, train):
    """Returns x, mask -> the outputs and the report."""
    graphdef, state = nnx.split(model)
    key = jax.random.key(1) if train else None

    @quick_jit
    def apply(state, x, mask):
        return nnx.merge(graphdef, state)(x, mask=mask, train=train, key=key)

    return functools.partial(apply, state)


def leaks(apply, *, drops, mask=None, rows=slice(None)):
    """The positions t at which some output up to t changes with the tokens after t."""
    found, (y, report) = [], apply(X, mask)
    assert jnp.isfinite(y).all() and (report.dropped > 0) == drops
    for t in POSITIONS:
        other = 3 * jax.random.normal(jax.random.key(2 + t), X.shape)
        again, _ = apply(X.at[rows, t + 1 :].set(other[rows, t + 1 :]), mask)
        assert t > 0 or (again != y).any()
        if (again[:, : t + 1] != y[:, : t + 1]).any():
            found.append(t)
    return found


@pytest.mark.parametrize(("dispatch", "train"), CASES)
@pytest.mark.parametrize("name", CAUSAL)
def test_later_tokens_change_nothing(name, dispatch, train):
    """Whatever the training's dispatch, nothing is dropped in evaluation."""
    # On one device `dropless` has room for all that `topk` chooses.
    drops = train and dispatch != "dense" and (name, dispatch) != ("topk", "dropless")
    apply = compiled(layer(name, dispatch), train=train)
    assert leaks(apply, drops=drops) == []
    assert leaks(apply, drops=drops, rows=slice(1, 2)) == []
    # Nor does another row.
    (y, _), (other, _) = (apply(x, MASK) for x in (X, X.at[1:].mul(-2)))
    assert (y[0] == other[0]).all() and not y[~MASK].any()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_the_same_test_catches_routers_that_look_ahead(name, train):
    drops = train and name == "sparse_expert_choice"
    assert leaks(compiled(layer(name, "capacity", force=True), train=train), drops=drops)


@pytest.mark.parametrize(
    ("name", "dispatch", "settings"),
    [
        ("topk", "capacity", {}),  # by order: first choices first
        ("topk", "capacity", {"batch_priority": True}),
        ("sparse_topk", "capacity", {}),  # by weight
        ("sparse_topk", "dropless", {}),
    ],
)
def test_the_same_test_catches_another_order_of_slots(name, dispatch, settings):
    model = layer(name, dispatch, force=True, **settings)
    model.limits = model.limits._replace(in_order=False)
    assert leaks(compiled(model, train=True), drops=True)
