"""Causality of a layer of experts: no output depends on a later token, nor on another row.

Bit for bit: routing is discrete, so a gradient or a tolerance would not see every look ahead. It
takes matrix products whose rows do not depend on one another's place (`moe.nn.grouped`).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from moe.hosts import mesh
from moe.nn.layer import MoE
from routers import ROUTERS
from tests.kinds import CONTROLS, FIXED_K, each_kind
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
    """Returns x [B, T, D], mask -> the outputs and the report."""
    graphdef, state = nnx.split(model)
    key = jax.random.key(1) if train else None

    @quick_jit
    def apply(state, x, mask):
        return nnx.merge(graphdef, state)(x, mask=mask, train=train, key=key)

    return functools.partial(apply, state)


def leaks(apply, *, drops, x=X, rows=slice(None)):
    """The positions t at which some output up to t changes with the tokens after t."""
    found, (y, report) = [], apply(x, None)
    assert jnp.isfinite(y).all() and (report.dropped > 0) == drops
    for t in POSITIONS:
        other = 3 * jax.random.normal(jax.random.key(2 + t), x.shape)
        again, _ = apply(x.at[rows, t + 1 :].set(other[rows, t + 1 :]), None)
        assert t > 0 or (again != y).any()
        if (again[:, : t + 1] != y[:, : t + 1]).any():
            found.append(t)
    return found


@pytest.mark.parametrize(("dispatch", "train"), CASES)
@pytest.mark.parametrize("name", each_kind(CAUSAL))
def test_later_tokens_change_nothing(name, dispatch, train):
    """Whatever the training's dispatch, nothing is dropped in evaluation."""
    # On one device `dropless` has room for all that K experts a token are.
    fixed = name in FIXED_K and dispatch == "dropless"
    drops = train and dispatch != "dense" and not fixed
    apply = compiled(layer(name, dispatch), train=train)
    assert leaks(apply, drops=drops) == []
    assert leaks(apply, drops=drops, rows=slice(1, 2)) == []
    # Nor does another row.
    (y, _), (other, _) = (apply(x, MASK) for x in (X, X.at[1:].mul(-2)))
    assert (y[0] == other[0]).all() and not y[~MASK].any()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", each_kind(OTHERS))
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


@pytest.mark.parametrize("dispatch", ["capacity", pytest.param("dense", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", each_kind(CAUSAL))
def test_in_evaluation_a_row_or_its_beginning_alone_is_the_same(name, dispatch):
    apply = compiled(layer(name, dispatch), train=False)
    y, report = apply(X, MASK)
    for b, length in ((0, T), (1, 9)):
        alone, own = apply(X[b : b + 1, :length], None)
        # To rounding: the tiles of a matrix product depend on the number of its rows.
        np.testing.assert_allclose(alone[0], y[b, :length], rtol=1e-5, atol=1e-6)
        chosen = report.weights_BTE[b, :length] > 0
        np.testing.assert_array_equal(own.weights_BTE[0] > 0, chosen)


@pytest.mark.parametrize("name", each_kind(ROUTERS))
def test_padding_has_no_slot_no_loss_and_no_load(name):
    apply = compiled(layer(name, "capacity", force=True), train=True)
    begins = jnp.zeros((B, T), bool).at[2].set(True).at[1, :7].set(True)
    for mask in (MASK, ~begins):
        y, report = apply(X, mask)
        again = apply(jnp.where(mask[..., None], X, 50.0), mask)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves((y, report)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        assert not y[~mask].any() and not report.weights_BTE[~mask].any()
        assert report.tokens == mask.sum() and report.chosen == (report.weights_BTE > 0).sum()
        if name != "soft_moe":
            assert 0 < report.load_E.sum() <= report.chosen
        # Sums of parts add up.
        parts = [apply(X[half], mask[half])[1] for half in (slice(0, 2), slice(2, 4))]
        for field in ("tokens", "chosen", "margin"):
            if (whole := getattr(report, field)) is not None:
                assert whole > 0
                total = sum(getattr(part, field) for part in parts)
                # The noise of the second half is that of the first.
                np.testing.assert_allclose(total, whole, rtol=0.3 if field == "margin" else 1e-6)
    rows = jnp.array([True, False, True, True])
    (y, report), (other, _) = apply(X, rows), apply(X, jnp.repeat(rows[:, None], T, 1))
    assert (y == other).all() and report.tokens == 3 * T


def on_mesh(model, sizes):
    """As `compiled` in training, on the first devices."""
    devices = jax.devices()[: math.prod(sizes.values())]
    grid = mesh.make_mesh({axis: sizes.get(axis, 1) for axis in mesh.AXES}, devices)
    graphdef, state = nnx.split(model)
    where = mesh.parameter_shardings(grid, state), NamedSharding(grid, mesh.spec("batch"))
    state = jax.device_put(nnx.to_pure_dict(state), where[0])

    @functools.partial(quick_jit, in_shardings=where)
    def program(state, x):
        return nnx.merge(graphdef, state)(x, train=True, key=jax.random.key(1))

    def apply(x, mask):
        with jax.set_mesh(grid):
            return program(state, jax.device_put(x, where[1]))

    return apply


def first(weights_TE, count):
    """What is left of the weights if the first `count` are kept, of a token the heaviest first."""
    order = sorted((t, -w, e) for (t, e), w in np.ndenumerate(weights_TE) if w > 0)
    kept = np.zeros_like(weights_TE)
    for t, w, e in order[:count]:
        kept[t, e] = -w
    return kept


@pytest.mark.parametrize("name", each_kind(CAUSAL, quick=("topk", "sparse_topk", "hash")))
def test_rows_for_other_devices_are_cut_in_order_and_row_by_row(name):
    """Two rows on each of four devices; of its T rows at most a row sends 0.7 T/2 each way."""
    x = jax.random.normal(jax.random.key(7), (8, T, D))
    model, sizes = layer(name, "dropless"), {"data": 2, "expert": 2}
    apply = on_mesh(model, sizes)
    assert leaks(apply, drops=True, x=x) == []
    (y, report), (other, _) = apply(x, None), apply(x.at[1].mul(-2), None)
    assert (np.delete(y, 1, 0) == np.delete(other, 1, 0)).all()
    bound = 2 * T if name in FIXED_K else T
    load_E, total = np.zeros(E), 0
    for weights_TE in np.asarray(report.weights_BTE):
        kept = first(weights_TE, bound)
        for half in (kept[:, :2], kept[:, 2:]):
            half[...] = first(half, math.ceil(0.7 * bound / 2))
        load_E, total = load_E + (kept > 0).sum(0), total + kept.sum()
    np.testing.assert_array_equal(report.load_E, load_E)
    np.testing.assert_allclose(1 - report.dropped, total / report.weights_BTE.sum(), rtol=1e-5)
    if name not in CONTROLS:  # whose weights are all equal, and so kept in order
        model.limits = model.limits._replace(in_order=False)
        assert leaks(on_mesh(model, sizes), drops=True, x=x)
