"""The routers' formulas against plain loops over tokens, and what they learn from step to step."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from routers import ROUTERS, RouterState, Tokens, histogram, lapsum_topk_mask, sparse_topk_mask
from tests.derivatives import check_derivatives

G, T, D, E, K = 2, 64, 6, 4, 2
X = jnp.asarray(np.random.default_rng(1).normal(size=(G, T, D)), jnp.float32)
PLACES = Tokens(*(jnp.broadcast_to(jnp.arange(T), (G, T)),) * 2)


def build(name, **settings):
    return ROUTERS[name](D, E, T * K // E, **{"k": K} | settings, rngs=nnx.Rngs(0))


def remembered(router):
    return nnx.to_pure_dict(nnx.state(router, RouterState))


def learned(router, steps=1, x=X, change="advance"):
    """Returns the router after so many steps on the same tokens, and its last routing."""
    for step in range(steps):
        routing = router(x)
        arguments = ((step + 1) / steps,) if change == "advance" else ()
        new = getattr(router, change)(remembered(router), routing.statistics, *arguments)
        nnx.update(router, nnx.State(new))
    return router, router(x)


def test_the_kth_largest_of_counts_is_that_of_the_scores():
    x = jax.random.normal(jax.random.key(0), (G, 500, E)) * jnp.array([1, 2, 0.5, 3.0])
    mask = jnp.arange(500)[None] < jnp.array([500, 300])[:, None]
    counts = histogram.count(x, -16, 16, mask)
    np.testing.assert_allclose(counts.sum(-1), 800, rtol=1e-5)
    scores = -np.sort(-np.asarray(x)[np.asarray(mask)], axis=0)
    for k in (1, 20, 200, 799):
        found = histogram.kth_largest(counts, k, -16, 16)
        # Between its two places of the grid, whose distance is 1/16.
        np.testing.assert_allclose(found, scores[k - 1], atol=1 / 16)
    tau = histogram.threshold(counts, 200.0, -16, 16, lambda u: jnp.clip(u / 0.5, 0, 1))
    total = np.clip((np.asarray(x)[np.asarray(mask)] - tau) / 0.5, 0, 1).sum(0)
    np.testing.assert_allclose(total, 200, rtol=5e-3)


def test_loss_free_chooses_by_score_and_bias_and_weighs_by_score():
    router = build("loss_free", rate=0.25, scale=2.5)
    router.bias[...] = jnp.array([0.3, -0.2, 0.0, 0.1])
    routing, scores = router(X), np.asarray(jax.nn.sigmoid(router.logits(X)))
    for g, t in itertools.product(range(G), range(T)):
        best = np.argsort(-(scores[g, t] + np.asarray(router.bias[...])))[:K]
        expected = np.zeros(E)
        expected[best] = 2.5 * scores[g, t, best] / scores[g, t, best].sum()
        np.testing.assert_allclose(routing.weights[g, t], expected, rtol=1e-5)
    load = np.asarray((routing.weights > 0).sum((0, 1)))
    np.testing.assert_array_equal(routing.statistics["load"], load)
    new = router.advance(remembered(router), routing.statistics, 1.0)["bias"]
    expected = np.asarray(router.bias[...]) + 0.25 * np.sign(load.mean() - load)
    np.testing.assert_allclose(new, expected, rtol=1e-6)


@pytest.mark.parametrize(("name", "settings"), [("loss_free", {"rate": 0.01}), ("quantile", {})])
def test_a_bias_balances(name, settings):
    x = X + 0.7 * jnp.arange(D)  # so that a few experts are everybody's first choice
    before = (build(name)(x).weights > 0).sum((0, 1))
    _, routing = learned(build(name, **settings), steps=80, x=x)
    after = (routing.weights > 0).sum((0, 1))
    fair = G * T * K / E
    assert before.max() > 1.5 * fair and after.max() < 1.1 * fair


def test_quantile_is_the_published_rule():
    router = build("quantile")
    router.bias[...] = jnp.array([0.2, -0.1, 0.0, -0.1])
    scores = np.asarray(jax.nn.sigmoid(router.logits(X))).reshape(-1, E)
    alpha = -np.sort(-(scores + np.asarray(router.bias[...])), axis=-1)[:, K]
    bias = np.quantile(alpha[:, None] - scores, K / E, axis=0)
    new = router.advance(remembered(router), router(X).statistics, 1.0)["bias"]
    np.testing.assert_allclose(new, bias - bias.mean(), atol=0.02)  # the sample is small


def test_relu_holds_the_number_of_experts_by_its_penalty():
    router = build("relu", coefficient=0.5, factor=2.0)
    routing, gates = router(X), np.maximum(np.asarray(router.logits(X)), 0)
    np.testing.assert_allclose(routing.weights, gates, rtol=1e-6)
    share = (gates > 0).mean((0, 1))
    expected = 0.5 * (E / K * share * gates.mean((0, 1))).sum()
    np.testing.assert_allclose(routing.aux_loss, expected, rtol=1e-5)
    for k, factor in ((0.5, 2.0), (3.9, 0.5)):
        router = build("relu", k=k, coefficient=0.5, factor=2.0)
        new = router.advance(remembered(router), router(X).statistics, 1.0)
        np.testing.assert_allclose(new["coefficient"], 0.5 * factor)


@pytest.mark.parametrize("mass", [0.1, 0.6, 0.95, 1.0])
def test_top_p_is_the_smallest_set(mass):
    router = build("top_p", mass=mass)
    probs, weights = np.asarray(jax.nn.softmax(router.logits(X))), router(X).weights
    for g, t in itertools.product(range(G), range(T)):
        order = np.argsort(-probs[g, t])
        size = min(int(np.searchsorted(np.cumsum(probs[g, t, order]), mass)) + 1, E)
        expected = np.zeros(E)
        expected[order[:size]] = probs[g, t, order[:size]]
        np.testing.assert_allclose(weights[g, t], expected, rtol=1e-6)


def test_threshold_takes_the_gates_above_it():
    router = build("threshold", p=0.6, sparsity=0.5)
    gate = np.asarray(jax.nn.sigmoid(router.logits(X)))
    routing = router(X)
    np.testing.assert_allclose(routing.weights, np.where(gate >= 0.6, gate, 0), rtol=1e-6)
    loss = 0.5 * ((gate >= 0.6).mean((0, 1)) * gate.mean((0, 1))).sum()
    np.testing.assert_allclose(routing.aux_loss, loss, rtol=1e-5)
    assert (build("threshold", bias=50.0)(X).weights > 0).all()  # at first every token passes


def test_expert_threshold_takes_the_kth_largest_score_of_each_expert():
    router, routing = learned(build("expert_threshold"), change="calibrate")
    logits = np.asarray(router.logits(X)).reshape(-1, E)
    kth = -np.sort(-logits, axis=0)[G * T * K // E - 1]
    np.testing.assert_allclose(router.threshold[...], kth, atol=1 / 16)  # the grid's distance
    chosen = np.asarray(router.logits(X)) >= np.asarray(router.threshold[...])
    scores = jax.nn.sigmoid(router.logits(X))
    np.testing.assert_allclose(routing.weights, np.where(chosen, scores, 0), rtol=1e-6)
    old = {"threshold": jnp.zeros(E)}
    new = router.advance(old, routing.statistics, 1.0)["threshold"]
    np.testing.assert_allclose(new, 0.1 * router.threshold[...], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("p", [2.0, 4 / 3, 3.0])
def test_sparse_threshold_is_the_papers_router_at_its_own_threshold(p):
    """Calibrated on one group, it is the relaxed expert choice of that group."""
    x = X[:1]
    router, routing = learned(build("sparse_threshold", p=p, strength=0.8), x=x, change="calibrate")
    logits = router.logits(x)
    select = sparse_topk_mask(logits, T * K / E, p=p, strength=0.8, axis=1)
    expected = select * jax.nn.softmax(logits, axis=-1)
    np.testing.assert_allclose(routing.weights, expected, atol=0.02)  # the grid's distance
    mass = (routing.weights / jax.nn.softmax(logits, axis=-1)).sum(1)
    np.testing.assert_allclose(mass, T * K / E, rtol=0.02)
    slope = jax.grad(lambda x: router(x).weights.sum())(x.at[0, 0].set(0.0))
    assert jnp.isfinite(slope).all() and jnp.abs(slope).max() > 0


def test_sparse_threshold_may_hold_the_number_of_experts():
    settings = {"by_number": True, "strength": 2.0}
    _, routing = learned(build("sparse_threshold", **settings), change="calibrate")
    assert abs(float((routing.weights > 0).sum(-1).mean()) - K) < 0.05 * K
    _, routing = learned(build("sparse_threshold", strength=2.0), change="calibrate")
    assert float((routing.weights > 0).sum(-1).mean()) > 1.3 * K


@pytest.mark.parametrize("name", ["sparse_topk", "sparse_expert_choice", "sparse_threshold"])
def test_a_strength_follows_its_schedule(name):
    router = build(name, strength=2.0, final_strength=0.02)
    values = []
    for progress in (0.0, 0.5, 1.0):
        new = router.advance(remembered(router), router(X).statistics, progress)
        values.append(float(new["now"]))
    np.testing.assert_allclose(values, [2.0, 0.2, 0.02], rtol=1e-5)
    soft, hard = (build(name, strength=strength)(X) for strength in (2.0, 0.02))
    np.testing.assert_array_equal(router(X).weights, soft.weights)
    router, routing = learned(router)
    if name != "sparse_threshold":  # whose thresholds have moved too
        np.testing.assert_allclose(routing.weights, hard.weights, atol=1e-6)
        assert (hard.weights > 0).sum() < (soft.weights > 0).sum()


def test_a_budget_is_spent_in_full_and_within_its_bounds():
    router = build("sparse_budget", least=0.5)
    np.testing.assert_allclose(router.share(jnp.zeros(6)), K, rtol=1e-6)
    np.testing.assert_allclose(router.share(jnp.full(3, 700.0)), K, rtol=1e-6)
    for offers in ([0.0, 1.0, -1.0, 0.3], [9.0, 9.0, 0.0, 0.0], [100.0, 0.0, 0.0], [-50.0, 0.0]):
        share = np.asarray(router.share(jnp.array(offers)))
        np.testing.assert_allclose(share.mean(), K, rtol=1e-5)
        assert (share >= 0.5 - 1e-6).all() and (share <= E + 1e-5).all()
        assert (np.argsort(share, kind="stable") == np.argsort(offers, kind="stable")).all()
    weigh = jnp.array([0.3, -1.0, 2.0, 0.7])
    with jax.enable_x64(True):
        wide = jnp.array([0.2, 1.0, -1.0, 3.0], jnp.float64)
        check_derivatives(lambda a: (router.share(a) * weigh).sum(), (wide,))


def test_a_fixed_budget_is_sparse_topk_and_its_gradient_in_k_is_right():
    budget, plain = build("sparse_budget"), build("sparse_topk")
    np.testing.assert_array_equal(budget.kernel[...], plain.kernel[...])
    for share in (None, jnp.float32(K)):
        a, b = budget(X, share=share), plain(X)
        np.testing.assert_array_equal(a.weights, b.weights)
        np.testing.assert_array_equal(a.aux_loss, b.aux_loss)
    weigh = jnp.cos(jnp.arange(X.size // D * E)).reshape(G, T, E)
    logits = budget.logits(X)
    with jax.enable_x64(True):
        wide = jnp.asarray(logits, jnp.float64)
        loss = lambda k: (budget.select(wide, k) * weigh).sum()  # noqa: E731
        check_derivatives(loss, (jnp.float64(2.13),))


def test_lapsum_budget_cuts_its_mask():
    router = build("lapsum_budget", cutoff=0.2)
    logits = router.logits(X)
    mask = lapsum_topk_mask(logits, K, strength=0.3)
    expected = jnp.where(mask >= 0.2, mask, 0) * jax.nn.softmax(logits, axis=-1)
    np.testing.assert_allclose(router(X).weights, expected, rtol=1e-6)
    assert (expected == 0).any()


def test_exactly_k_samples_in_training_and_takes_the_best_in_evaluation():
    router = build("exactly_k")
    probs = jax.nn.softmax(router.logits(X))
    draws = [router(X, key=jax.random.key(i)).weights for i in range(2)]
    for weights in (*draws, router(X).weights):
        assert ((weights > 0).sum(-1) == K).all()
        np.testing.assert_allclose(weights, jnp.where(weights > 0, probs, 0), rtol=1e-5)
    assert (draws[0] != draws[1]).any()
    assert ((router(X).weights > 0) == (probs >= jnp.sort(probs)[..., -K:][..., :1])).all()


def test_hash_is_a_function_of_the_id_alone_and_random_of_the_draw():
    router = build("hash")
    ids = jnp.arange(T)[None] * jnp.array([[1], [0]]) % 13
    weights = router(X, tokens=Tokens(ids, PLACES.positions)).weights
    again = router(2 * X, tokens=Tokens(ids, 5 * PLACES.positions)).weights
    np.testing.assert_array_equal(weights, again)
    assert ((weights > 0).sum(-1) == K).all() and set(np.unique(weights)) == {0.0, 1 / K}
    assert (weights[1] == weights[1, :1]).all() and (weights[0, :13] == weights[0, 13:26]).all()
    many = Tokens(*(jnp.arange(20_000).reshape(2, -1),) * 2)
    load = router(jnp.zeros((2, 10_000, D)), tokens=many).weights.mean((0, 1))
    np.testing.assert_allclose(load, 1 / E, rtol=0.03)
    other = ROUTERS["hash"](D, E, T, k=K, rngs=nnx.Rngs(1))
    assert (other(X, tokens=PLACES).weights != router(X, tokens=PLACES).weights).any()
    drawn = build("random")
    one, two = (drawn(X, key=jax.random.key(i), tokens=PLACES).weights for i in range(2))
    assert (one != two).any() and ((one > 0).sum(-1) == K).all()
    fixed = [drawn(x, tokens=PLACES).weights for x in (X, 3 * X)]
    np.testing.assert_array_equal(*fixed)


@pytest.mark.parametrize("name", ["topk", "sparse_topk", "loss_free", "quantile"])
def test_null_experts_cost_nothing_and_return_nothing(name):
    router = build(name, null_experts=3)
    assert router.logits(X).shape == (G, T, E + 3)
    routing = router(X)
    chosen = (routing.weights > 0).sum(-1)
    assert routing.weights.shape == (G, T, E) and chosen.min() < K
    assert name == "sparse_topk" or chosen.max() == K
    if name == "topk":
        probs = jax.nn.softmax(router.logits(X))
        best = probs >= jnp.sort(probs)[..., -K:][..., :1]
        np.testing.assert_allclose(routing.weights, jnp.where(best, probs, 0)[..., :E], rtol=1e-6)


def test_groups_limit_the_choice_and_simbal_measures_the_kernel():
    router = ROUTERS["topk"](D, 8, T, k=2, groups=4, best_groups=2, noise=0.0, rngs=nnx.Rngs(0))
    probs, weights = np.asarray(jax.nn.softmax(router.logits(X))), router(X).weights
    for g, t in itertools.product(range(G), range(T)):
        pairs = probs[g, t].reshape(4, 2)
        best = np.argsort(-pairs.sum(-1))[:2]
        among = np.where(np.isin(np.arange(8) // 2, best), probs[g, t], -1)
        chosen = np.argsort(-among)[:2]
        assert set(np.flatnonzero(weights[g, t])) == set(chosen)
    plain = build("topk", importance=0.0, load=0.0)(X).aux_loss
    router = build("topk", importance=0.0, load=0.0, simbal=0.5)
    gram = np.asarray(router.kernel[...]).T @ np.asarray(router.kernel[...])
    expected = 0.5 * np.abs(gram - np.eye(E)).sum()
    np.testing.assert_allclose(router(X).aux_loss - plain, expected, rtol=1e-5)
    for settings in ({"groups": 3}, {"groups": 2, "best_groups": 3}, {"groups": 4}):
        with pytest.raises(ValueError, match="groups"):
            build("topk", **settings)
