"""Experts on sorted rows against a loop over experts: values, derivatives, rows past the last."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.nn import expert_rows, expert_slots
from moe.nn.expert_rows import Parameters, mlp_rows
from moe.nn.mlp import activate
from tests.moe.conftest import quick_jit
from tests.moe.nn.test_grouped import SIZES, D, F

SIZES = SIZES | {"large blocks and small ones": ([301, 0, 128, 33], 470)}
SIZES |= {"few rows": ([5, 0, 3], 9)}
SLOTS = {  # slots of an expert where these are the fastest way: some have rows beyond theirs
    "slots, an expert empty": ([30, 0, 21, 22, 25], 100, 29),
    "slots for all rows but one": ([30, 19, 21, 22, 9], 103, 29),
    "slots where half of the rows are an expert's": ([30, 0, 21, 22, 25], 200, 29),
}
SIZES |= {name: case[:2] for name, case in SLOTS.items()}
KINDS = {"plain": (False, True), "gated": (True, False), "gated with biases": (True, True)}
QUICK = {("plain", "uneven"), ("gated", "slots, an expert empty")}
QUICK |= {("gated with biases", name) for name in SIZES}
CASES = [
    pytest.param(kind, *case, id=f"{kind}, {name}", marks=[] if quick else pytest.mark.slow)
    for kind in KINDS
    for name, case in SIZES.items()
    for quick in [(kind, name) in QUICK]
]


def inputs(experts, rows, gated, bias):
    keys = iter(jax.random.split(jax.random.key(0), 8))
    draw = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    kernels = {"wide": draw(experts, D, F), "narrow": draw(experts, F, D)}
    if gated:
        kernels["gate"] = draw(experts, D, F)
    if bias:
        kernels |= {"bias_wide": draw(experts, F), "bias_narrow": draw(experts, D)}
    if gated and bias:
        kernels["bias_gate"] = draw(experts, F)
    return draw(rows, D), Parameters(**kernels), draw(rows, D)


def loop(sizes, exact, x, parameters):
    """The reference: every expert by itself."""
    out, start = jnp.zeros_like(x), 0
    add = lambda y, bias: y if bias is None else y + bias  # noqa: E731
    for e, size in enumerate(sizes):
        own = jax.tree.map(lambda a, e=e: a[e], parameters)
        rows = slice(start, start + size)
        hidden = [add(x[rows] @ own.wide, own.bias_wide)]
        if own.gate is not None:
            hidden.append(add(x[rows] @ own.gate, own.bias_gate))
        out = out.at[rows].set(add(activate(*hidden, exact=exact) @ own.narrow, own.bias_narrow))
        start += size
    return out


def both(f, weight):
    def loss(x, parameters):
        out = f(x, parameters)
        return (out * weight).sum(), out

    return quick_jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # Sums of some hundred float32 terms of size 1 to 30.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize(("kind", "sizes", "rows"), CASES)
def test_equals_a_loop_over_experts(kind, sizes, rows):
    x, parameters, weight = inputs(len(sizes), rows, *KINDS[kind])
    n, past = jnp.array(sizes), slice(sum(sizes), None)
    ours = both(lambda x, p: mlp_rows(x, p, n, kind == "plain"), weight)
    found = ours(x.at[past].set(jnp.nan), parameters)
    assert_close(
        found, both(functools.partial(loop, sizes, kind == "plain"), weight)(x, parameters)
    )
    (_, out), (dx, _) = found
    assert not out[past].any() and not dx[past].any()
    # Without derivatives nothing is kept, and few rows pass all experts: the same values.
    alone = quick_jit(mlp_rows, static_argnums=3)
    assert_close(alone(x.at[past].set(jnp.nan), parameters, n, kind == "plain"), out)


@pytest.mark.parametrize("kind", KINDS)
def test_the_products_of_accelerators_are_the_same_function(kind, monkeypatch):
    sizes, rows = SIZES["uneven"]
    x, parameters, weight = inputs(len(sizes), rows, *KINDS[kind])
    blocks = both(lambda x, p: mlp_rows(x, p, jnp.array(sizes)), weight)(x, parameters)
    branch = lambda *args, cpu, default: default(*args)  # noqa: E731
    monkeypatch.setattr(expert_rows.lax, "platform_dependent", branch)
    whole = both(lambda x, p: mlp_rows(x, p, jnp.array(sizes)), weight)(x, parameters)
    assert_close(whole, blocks)


@pytest.mark.parametrize("case", SIZES)
def test_slots_are_for_rows_spread_over_all_experts(case):
    sizes, rows = SIZES[case]
    counts = expert_slots.counts(rows, len(sizes))
    chosen = [0, *counts][int(expert_slots.best(jnp.array(sizes), counts))]
    uneven = 26 if case == "uneven" else 0  # three experts need no visit then
    assert chosen == (SLOTS[case][2] if case in SLOTS else uneven)


def test_nan_rows_stay_in_their_expert():
    sizes, rows, _ = SLOTS["slots, an expert empty"]
    x, parameters, weight = inputs(len(sizes), rows, True, True)
    x = x.at[jnp.array([0, 50])].set(jnp.nan)  # in a slot of expert 0, and beyond those of 2
    ours = both(lambda x, p: mlp_rows(x, p, jnp.array(sizes)), weight)
    (_, out), (dx, slopes) = ours(x, parameters)
    for a in (out, dx):
        assert np.flatnonzero(np.isnan(a).any(1)).tolist() == [0, 50]
    for a in (slopes.wide, slopes.gate, slopes.narrow):
        assert np.flatnonzero(np.isnan(a).any((1, 2))).tolist() == [0, 2]


@pytest.mark.parametrize("sizes", [[300], [300, *[130] * 5]])  # of these 300, 183 have slots
def test_sums_of_bfloat16_rows_are_float32(sizes):
    rows, one = sum(sizes), jnp.ones((len(sizes), 1, 1), jnp.bfloat16)
    ones = jnp.ones((rows, 1), jnp.bfloat16)
    parameters = Parameters(wide=37 * one, narrow=one, bias_narrow=one[:, 0])

    def total(parameters):
        return mlp_rows(ones, parameters, jnp.array(sizes)).sum()

    slopes = jax.grad(total)(parameters)
    assert float(slopes.bias_narrow[0, 0]) == 300 and slopes.wide.dtype == jnp.bfloat16
    # 300 times 37 to eight bits; 183 times 37 to eight bits and then the rest would be 11,136.
    assert float(slopes.narrow[0, 0, 0]) == 11_072
