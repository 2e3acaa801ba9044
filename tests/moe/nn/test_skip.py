"""Blocks that tokens may skip: against the block on the taken tokens alone, and bit by bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.models.decoder import build_decoder
from moe.nn.blocks import Block
from moe.nn.mlp import Mlp
from moe.nn.skip import Skip, rows
from routers import sparse_topk_mask
from tests.moe.conftest import quick_jit

B, T, D, V = 3, 16, 8, 17
X = jax.random.normal(jax.random.key(0), (B, T, D))
SOME = {"router": "threshold", "threshold": 0.6}


def block(**settings) -> Block:
    """A block of images; its parameters are the same whatever its skip is."""
    rngs = nnx.Rngs(0)
    mlp = Mlp(D, 16, dtype=jnp.float32, rngs=rngs)
    skip = functools.partial(Skip, D, T, **settings) if settings else None
    made = Block(D, 2, mlp, dropout=0.0, skip=skip, dtype=jnp.float32, rngs=rngs)
    if settings:
        made.skip.router.kernel.set_value(jax.random.normal(jax.random.key(5), (D, 1)))
    return made


def fresh(**settings) -> Block:
    """The same with a gate as it begins."""
    made = block(router="threshold", **settings)
    made.skip.router.kernel.set_value(
        Skip(D, T, router="threshold", rngs=nnx.Rngs(1)).router.kernel[...]
    )
    return made


def apply(module, x=X, *, train=True, mask=None):
    graphdef, state = nnx.split(module)

    @quick_jit
    def run(state, x, mask):
        return nnx.merge(graphdef, state)(x, mask=mask, train=train, key=None)

    return run(state, x, mask)


def by_formula(p, x):
    """A block on the tokens [T, D] of one row, in numpy."""

    def norm(x, p):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * p["scale"] + p["bias"]

    h, a = norm(x, p["norm_attention"]), p["attention"]
    q, k, v = (np.einsum("td,dhi->hti", h, a[name]["kernel"]) for name in ("query", "key", "value"))
    weights = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))
    heads = weights / weights.sum(-1, keepdims=True) @ v
    x = x + np.einsum("hti,hid->td", heads, a["out"]["kernel"])
    f = p["feed_forward"]
    h = norm(x, p["norm_feed_forward"]) @ f["wide"]["kernel"]
    h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return x + h @ f["narrow"]["kernel"]  # biases begin at 0


def scores(x=X):
    return np.asarray(x @ jax.random.normal(jax.random.key(5), (D, 1)))[..., 0]


def best(k):
    """The weights of the hard choice."""
    return np.stack([np.isin(np.arange(T), np.argsort(-row)[:k]) for row in scores()]) * 1.0


def gates(threshold, gain=1.0):
    bias = np.log(threshold / (1 - threshold))
    gate = 1 / (1 + np.exp(-scores() - bias))
    return np.where(scores() >= 0, gain * gate, 0)


def heaviest(weights, count):
    kept = np.stack([np.isin(np.arange(T), np.argsort(-row)[:count]) for row in weights])
    return np.where(kept, weights, 0)


RELAXED = np.asarray(sparse_topk_mask(jnp.asarray(scores()), 4, strength=2.0))
CASES = {
    "topk": ({"router": "topk", "capacity": 0.25}, best(4), 4),
    "gated": (
        {"router": "topk", "capacity": 0.25, "gated": True, "gain": 2.0},
        best(4) * 2 / (1 + np.exp(-scores())),
        4,
    ),
    "sparse": ({"router": "sparse", "capacity": 0.25, "strength": 2.0}, RELAXED, 4),
    "sparse in half": ({"capacity": 0.25, "strength": 2.0, "bound": 0.5}, RELAXED, 8),
    "threshold": (SOME, gates(0.6), T),
    "threshold in a quarter": (SOME | {"bound": 0.25, "gain": 2.0}, gates(0.6, 2.0), 4),
}


QUICK = ("topk", "sparse in half", "threshold in a quarter")


def each(names):
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", each(CASES))
def test_it_is_the_block_on_the_taken_tokens_and_nothing_for_the_others(name):
    settings, weights, slots = CASES[name]
    kept = heaviest(weights, slots)
    y, report, _ = apply(block(**settings))
    parameters = nnx.to_pure_dict(nnx.state(block()))
    for row in range(B):
        taken = np.flatnonzero(kept[row])
        out = by_formula(parameters, np.asarray(X[row, taken], np.float64))
        moved = X[row, taken] + kept[row, taken][:, None] * (out - X[row, taken])
        np.testing.assert_allclose(y[row, taken], moved, rtol=1e-5, atol=1e-5)
        others = np.delete(np.arange(T), taken)
        assert (np.asarray(y[row, others]) == np.asarray(X[row, others])).all()
    assert report.tokens == B * T
    np.testing.assert_allclose(report.weights_BTE[..., 0], weights, rtol=1e-5, atol=1e-6)
    assert report.load_E == (kept > 0).sum() and report.chosen == (weights > 0).sum()
    lost = 1 - kept.sum() / weights.sum()
    np.testing.assert_allclose(report.dropped, lost, atol=1e-6)
    assert (report.dropped > 0) == ((weights > 0).sum(1) > slots).any()


@pytest.mark.parametrize("name", each(["sparse", "threshold in a quarter"]))
def test_evaluation_drops_nothing(name):
    settings, weights, _ = CASES[name]
    _, report, _ = apply(block(**settings), train=False)
    assert report.dropped == 0 and report.load_E == (weights > 0).sum()
    _, report, _ = apply(block(**settings, eval_bound=0.25), train=False)
    assert report.dropped > 0 and report.load_E <= 4 * B


def test_a_gate_takes_all_tokens_at_the_start():
    """At its threshold to the bit, and of weight g; with the gain 1 / p that is the plain block."""
    plain, _, _ = apply(block())
    for threshold in (0.5, 0.55, 0.9):
        y, report, _ = apply(fresh(threshold=threshold, gain=1 / threshold))
        assert report.load_E == report.chosen == B * T and report.dropped == 0
        np.testing.assert_allclose(report.weights_BTE, 1, rtol=1e-6)
        np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-5)
    y, report, _ = apply(fresh(start=-1e-3))
    assert report.chosen == 0 and (y == X).all()


def test_gradients_reach_who_is_taken_but_not_from_a_hard_choice():
    def gradient(**settings):
        graphdef, state = nnx.split(block(**settings))

        def loss(state):
            y, report, _ = nnx.merge(graphdef, state)(X, mask=None, train=True, key=None)
            return (y * jax.random.normal(jax.random.key(1), y.shape)).sum() + report.aux_loss

        return quick_jit(jax.grad(loss))(state)["skip"]["router"]["kernel"][...]

    assert not gradient(router="topk", capacity=0.25).any()
    for settings in ({"strength": 2.0}, SOME):
        found = gradient(**settings)
        assert jnp.isfinite(found).all() and jnp.abs(found).max() > 1e-3


def test_the_loss_of_gates_is_the_share_taken_times_the_mean_gate():
    made = block(**SOME, alpha=0.5)
    _, report, _ = apply(made)
    gate = gates(0.6) + np.where(scores() < 0, 1 / (1 + np.exp(-scores() - np.log(1.5))), 0)
    expected = 0.5 * (scores() >= 0).mean() * gate.mean()
    np.testing.assert_allclose(report.aux_loss, expected, rtol=1e-5)


@pytest.mark.parametrize("name", each(["gated", "sparse", "threshold in a quarter"]))
def test_padding_passes_no_block(name):
    made = block(**CASES[name][0])
    mask = jnp.arange(T)[None] < jnp.array([T, 9, 0])[:, None]
    y, report, _ = apply(made, mask=mask)
    again, other, _ = apply(made, jnp.where(mask[..., None], X, 9.0), mask=mask)
    assert (again[mask] == y[mask]).all() and (y[~mask] == X[~mask]).all()
    assert report.tokens == mask.sum() and not report.weights_BTE[~mask].any()
    assert report.load_E == other.load_E and report.aux_loss == other.aux_loss


def test_shares_of_a_row():
    share = functools.partial(rows, 16, capacity=0.3, eval_bound=1.0)
    assert share(router="topk", bound=0.0) == (5, 5, 5)
    assert share(router="sparse", bound=0.0) == (5, 5, 16)
    assert share(router="sparse", bound=0.5) == (5, 8, 16)
    assert share(router="threshold", bound=0.0) == (5, 16, 16)


# Decoders.

SIZES = {"vocab": V, "width": D, "depth": 4, "heads": 4, "kv_heads": 2, "head_dim": 6}
SIZES |= {"mlp_dim": 10, "tokens": T, "window": 5, "global_every": 2, "embed_scale": 1.0}
SIZES |= {"skip_layers": (1, 2), "scan": False}


@functools.cache
def decoder(scan=False, **settings):
    """The parts of a decoder of which about half of the tokens skip blocks 1 and 2."""
    skip = {"router": "threshold"} | settings
    layers = (0, 1, 2) if scan else (1, 2)
    build = lambda: build_decoder(  # noqa: E731
        **SIZES | {"scan": scan, "skip_layers": layers}, skip=skip, rngs=nnx.Rngs(0)
    )
    graphdef, _ = nnx.split(nnx.eval_shape(build))
    state = quick_jit(lambda: nnx.state(build()))()
    for path, variable in nnx.to_flat_state(state):
        if path[-3:] == ("skip", "router", "kernel"):
            shape = variable.get_value().shape
            variable.set_value(jax.random.normal(jax.random.key(int(path[1])), shape))
    return graphdef, state


def forward(graphdef, train=False):
    @quick_jit
    def run(state, tokens, **places):
        model = nnx.merge(graphdef, state)
        out = model(tokens, train=train, **places)
        return model.logits(out.hidden_BTD), out

    return run


TOKENS = np.random.default_rng(0).integers(V, size=(B, T), dtype=np.int32)


def leaks(graphdef, state, train) -> bool:
    run = forward(graphdef, train)
    before, out = run(state, TOKENS)
    for t in (0, 4, 9, 14):
        other = TOKENS.copy()
        other[:, t + 1 :] = (other[:, t + 1 :] + 3) % V
        after, _ = run(state, other)
        assert (after != before).any()
        if (after[:, : t + 1] != before[:, : t + 1]).any():
            return True
    assert all(0 < report.chosen < report.tokens for report in out.reports.values())
    return False


@pytest.mark.parametrize("train", [True, False])
def test_no_bit_depends_on_a_later_token(train):
    """Also where tokens are dropped: the first by position are kept."""
    graphdef, state = decoder(bound=0.25)
    assert not leaks(graphdef, state, train)
    _, out = forward(graphdef, train)(state, TOKENS)
    dropped = [float(report.dropped) for report in out.reports.values()]
    assert all(dropped) if train else not any(dropped)


@pytest.mark.parametrize("router", each(["topk", "sparse"]))
def test_the_same_test_catches_a_choice_along_the_row(router, monkeypatch):
    with pytest.raises(ValueError, match="causal model needs router='threshold'"):
        build_decoder(**SIZES, skip={"router": router}, rngs=nnx.Rngs(0))
    monkeypatch.setattr("moe.nn.skip._must_be_causal", lambda router: None)
    assert leaks(*decoder(router=router, capacity=0.5), train=True)


def test_gathered_tokens_see_what_they_see_in_place():
    """Documents, windows and positions are those of the row: to rounding, one sum of another."""
    graphdef, state = decoder()
    lengths = (7, 6, 3)
    segment = np.repeat([1, 2, 0], lengths)[None].repeat(B, 0).astype(np.int32)
    position = np.concatenate([np.arange(n) for n in lengths])[None].repeat(B, 0)
    told = {"segments": segment, "positions": position}
    whole, out = forward(graphdef, True)(state, TOKENS, **told)
    most = max(int((r.weights_BTE > 0).sum(1).max()) for r in out.reports.values())
    assert most < T
    other, _ = decoder(bound=most / T)
    slots, gathered = forward(other, True)(state, TOKENS, **told)
    assert all(report.dropped == 0 for report in gathered.reports.values())
    np.testing.assert_allclose(slots[:, :13], whole[:, :13], rtol=1e-5, atol=1e-5)
    alone = np.roll(TOKENS, -7, 1)
    ones = np.where(np.arange(T) < 6, 1, 0)[None].repeat(B, 0).astype(np.int32)
    expected, _ = forward(other, True)(
        state, alone, segments=ones, positions=np.roll(position, -7, 1)
    )
    np.testing.assert_allclose(slots[:, 7:13], expected[:, :6], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_prefill_and_decode_are_the_full_forward_pass(scan):
    """A token that skipped a block has no keys there; prompts have different lengths."""
    graphdef, state = decoder(scan)
    run = forward(graphdef)
    expected, out = run(state, TOKENS)
    assert all(0 < report.chosen < report.tokens for report in out.reports.values())
    lengths = np.array([3, 7, 1])
    caches = nnx.merge(graphdef, state).init_cache(B, T + 4)
    prompt = np.arange(7)[None].repeat(B, 0)
    segment = (prompt < lengths[:, None]).astype(np.int32)
    told = {"segments": segment, "positions": prompt, "caches": caches}
    logits, out = run(state, TOKENS[:, :7], **told)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], atol=1e-5)
    for step in range(8):
        at = (lengths + step)[:, None]
        one = np.take_along_axis(TOKENS, at, 1)
        logits, out = run(state, one, positions=at, caches=out.caches)
        there = expected[np.arange(B), lengths + step]
        np.testing.assert_allclose(logits[:, 0], there, atol=1e-5, err_msg=str(step))
