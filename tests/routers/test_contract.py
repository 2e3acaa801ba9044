"""What every router promises, whatever it computes. A new line in `ROUTERS` joins by itself."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from routers import ROUTERS, RouterState, Tokens
from tests.jaxprs import float32_precisions
from tests.kinds import CONTROLS

G, T, D, E = 2, 8, 6, 4
CAPACITY = 4
MASK = jnp.asarray([[True] * T, [True] * (T - 3) + [False] * 3])
X = jnp.asarray(np.random.default_rng(0).normal(size=(G, T, D)), jnp.float32)

routers = pytest.mark.parametrize("name", ROUTERS)
SETTINGS = [
    (name, loss)
    for name, router in ROUTERS.items()
    for loss in ("importance", "load", "balance", "z", "simbal", "entropy", "sparsity")
    if loss in inspect.signature(router.__init__).parameters
]


def build(name, **settings):
    return ROUTERS[name](D, E, CAPACITY, **settings, rngs=nnx.Rngs(0))


# A few words, some of them twice.
TOKENS = Tokens(*(jnp.arange(G * T).reshape(G, T) * 5 % n for n in (11, T)))


def call(router, x, mask=None, key=None):
    told = {"tokens": TOKENS} if router.reads_tokens else {}
    if router.offers:  # there is one more layer
        offers = jnp.stack([getattr(router, router.offers)[...], jnp.float32(0.1)])
        told["share"] = router.share(offers)[0]
    return router(x, mask=mask, key=key, **told)


@nnx.jit
def route(router, x, mask=None, key=None):
    return call(router, x, mask, key)


def split(name, **settings):
    """Returns a router's structure, its parameters and its memory."""
    graph, parameters, memory = nnx.split(build(name, **settings), nnx.Param, RouterState)
    return graph, parameters, nnx.to_pure_dict(memory)


def assert_all_close(a, b, atol):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, atol=atol)


def weighted_sum(routing):
    """A sum with weights that differ: the plain sum of a softmax has no gradient."""
    total = routing.aux_loss
    for a in (routing.weights, routing.mix):
        if a is not None:
            total += (jnp.cos(1.7 * jnp.arange(a.size)).reshape(a.shape) * a).sum()
    return total


@routers
def test_shapes_types_and_signs(name):
    routing = route(build(name), X)
    shape = (G, T, E) if routing.mix is None else (G, T, E, CAPACITY)
    assert routing.weights.shape == shape and routing.weights.dtype == jnp.float32
    assert jnp.isfinite(routing.weights).all() and (routing.weights >= 0).all()
    assert (routing.weights > 0).any()
    assert jnp.shape(routing.aux_loss) == () and jnp.isfinite(routing.aux_loss)
    if routing.mix is not None:
        assert routing.mix.shape == shape
        np.testing.assert_allclose(routing.mix.sum(1), 1, rtol=1e-5)  # a float32 softmax
    if routing.priority is not None:
        assert routing.priority.shape == shape
        ranked = np.sort(routing.priority, axis=1)
        assert (np.diff(ranked, axis=1) > 0).all()  # no ties: an order of the tokens per expert


@routers
def test_deterministic_without_a_key_and_equal_under_jit(name):
    router = build(name)
    compiled, again = route(router, X), route(router, X)
    assert_all_close(compiled, again, atol=0)
    assert_all_close(compiled, call(router, X), atol=1e-5)  # other fusions


@routers
@pytest.mark.parametrize("noisy", [False, True])
def test_gradients_reach_every_parameter_and_the_tokens(name, noisy):
    key = jax.random.key(0) if noisy else None
    graph, parameters, memory = split(name)

    @jax.jit
    @jax.grad
    def slopes(inputs):
        parameters, x = inputs
        return weighted_sum(call(nnx.merge(graph, parameters, memory), x, key=key))

    leaves = jax.tree.leaves(slopes((parameters, X)))
    if name in CONTROLS:
        assert len(leaves) == 1 and (leaves[0] == 0).all()
        return
    assert len(leaves) > 1
    for slope in leaves:
        assert jnp.isfinite(slope).all() and jnp.abs(slope).max() > 0


@routers
def test_groups_do_not_see_each_other(name):
    router = build(name)
    one, other = route(router, X), route(router, X.at[1].mul(-3.0))
    for field in ("weights", "mix", "priority"):
        a, b = getattr(one, field), getattr(other, field)
        assert (a is None) == (b is None)
        assert a is None or (a[0] == b[0]).all()


@routers
@pytest.mark.parametrize("noisy", [False, True])
def test_looks_ahead_exactly_if_it_says_so(name, noisy):
    router, key = build(name), jax.random.key(0) if noisy else None
    assert "causal" in vars(ROUTERS[name]) and isinstance(router.causal, bool)
    t = T // 2
    one, other = route(router, X, key=key), route(router, X.at[:, t:].multiply(-3.0), key=key)
    unchanged = all(
        (a[:, :t] == b[:, :t]).all()
        for a, b in ((one.weights, other.weights), (one.mix, other.mix), (one.margin, other.margin))
        if a is not None
    )
    assert unchanged == router.causal
    why = router.why_not_causal({})
    assert (why is None) == router.causal
    if why:
        relatives = [other for other in ROUTERS if re.search(rf"\b{other}\b", why)]
        assert relatives and all(ROUTERS[other].causal for other in relatives)


@routers
def test_the_margin_is_that_of_the_last_expert_chosen(name):
    margin = route(build(name), X).margin
    if margin is not None:
        scores = -np.sort(-np.asarray(build(name).logits(X)), axis=-1)
        np.testing.assert_allclose(margin, scores[..., 1] - scores[..., 2], atol=1e-5)
    assert route(build(name, k=E), X).margin is None  # every token has every expert


@routers
def test_padding_is_invisible(name):
    router = build(name)
    one = route(router, X, MASK)
    other = route(router, jnp.where(MASK[..., None], X, 9.0), MASK)
    assert (one.weights[~MASK] == 0).all()
    for field in ("weights", "mix", "aux_loss", "statistics"):
        assert_all_close(getattr(one, field), getattr(other, field), atol=1e-6)
    if one.mix is not None:
        assert (one.mix[~MASK] == 0).all()
    nothing = route(router, X, jnp.zeros_like(MASK))
    assert (nothing.weights == 0).all() and jnp.isfinite(nothing.aux_loss)
    assert not any(a.any() for a in jax.tree.leaves(nothing.statistics))


@routers
def test_bfloat16_tokens_get_float32_weights(name):
    router, rounded = build(name), X.astype(jnp.bfloat16)
    routing = route(router, rounded)
    assert routing.weights.dtype == jnp.float32
    expected = route(router, rounded.astype(jnp.float32))
    np.testing.assert_allclose(routing.weights, expected.weights, atol=1e-6)


@routers
def test_scores_are_not_rounded_to_bfloat16(name):
    """TPUs multiply float32 numbers in one pass of bfloat16 unless they are told, also backward."""
    graph, parameters, memory = split(name)

    def total(parameters, x):
        router = nnx.merge(graph, parameters, memory)
        return weighted_sum(call(router, x, key=jax.random.key(0)))

    for f in (total, jax.grad(total, argnums=(0, 1))):
        precisions = float32_precisions(f, parameters, X)
        assert set(precisions) <= {(jax.lax.Precision.HIGHEST,) * 2}
        assert precisions or name in CONTROLS


@routers
def test_learns_from_sums_over_groups(name):
    """Statistics of a batch are those of its parts added up, and what learns from them is pure."""
    graph, parameters, memory = split(name)
    whole = route(build(name), X, MASK).statistics
    assert (whole is None) == (not memory)
    if whole is None:
        return
    masks = [MASK.at[1 - g].set(False) for g in range(G)]
    parts = [route(build(name), X, mask).statistics for mask in masks]
    assert_all_close(jax.tree.map(jnp.add, *parts), whole, atol=1e-5)
    router = nnx.merge(graph, parameters, memory)
    nothing = jax.tree.map(jnp.zeros_like, whole)
    for seen in (whole, nothing):
        for change in (router.calibrate, lambda *a: router.advance(*a, 0.5)):
            new = jax.jit(change)(memory, seen)
            assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, memory)
            for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(memory), strict=True):
                assert a.dtype == b.dtype and jnp.isfinite(a).all()
    assert_all_close(nnx.to_pure_dict(nnx.state(router, RouterState)), memory, atol=0)


def test_weights_of_a_token_add_up_to_one_where_asked():
    shares = route(build("topk", k=2), X, MASK).weights
    weights = route(build("topk", k=2, renormalise=True), X, MASK).weights
    np.testing.assert_allclose(weights.sum(-1), MASK, atol=1e-6)
    expected = shares / jnp.where(MASK, shares.sum(-1), 1)[..., None]
    np.testing.assert_allclose(weights, expected, atol=1e-6)


@routers
@pytest.mark.parametrize("k", [E + 1, 0, -1])
def test_impossible_k_names_both(name, k):
    with pytest.raises(ValueError, match=re.escape(f"num_experts={E};") + f".*{k}"):
        build(name, k=k)


def test_a_setting_may_look_ahead():
    assert ROUTERS["topk"].why_not_causal({"k": 2, "batch_priority": False}) is None
    why = ROUTERS["topk"].why_not_causal({"k": 2, "batch_priority": True})
    assert "batch_priority=False" in why


@pytest.mark.parametrize(("name", "loss"), SETTINGS)
def test_every_auxiliary_loss_trains_the_router(name, loss):
    others = {other: 0.0 for router, other in SETTINGS if router == name}
    graph, parameters, memory = split(name, **{**others, loss: 1.0})

    @jax.jit
    @jax.value_and_grad
    def aux(parameters):
        router = nnx.merge(graph, parameters, memory)
        return call(router, X, key=jax.random.key(0)).aux_loss

    value, slopes = aux(parameters)
    assert jnp.isfinite(value) and value > 0
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(slopes))
    assert jnp.abs(slopes["kernel"][...]).max() > 1e-6
