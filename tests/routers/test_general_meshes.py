"""The general solvers on meshes, inside `jax.shard_map`, and called without jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from isotonic import isotonic_pnorm, isotonic_regression
from routers import (
    permutahedron_projection,
    soft_rank,
    soft_sort,
    sparse_topk_magnitude,
    sparse_topk_mask,
)

pytestmark = pytest.mark.slow  # many compilations

X = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
OPERATORS = {
    "regression, pav": lambda x: isotonic_regression(x, solver="pav"),
    "mask, merge": lambda x: sparse_topk_mask(x, 2, solver="merge"),
    "rank, p=3": lambda x: soft_rank(x, p=3.0),
}
MORE = {
    "regression, merge": lambda x: isotonic_regression(x, solver="merge"),
    "regression, weights": lambda x: isotonic_regression(x, jnp.arange(1.0, 8)),
    "rank, pav": lambda x: soft_rank(x, solver="pav"),
    "mask, dykstra": lambda x: sparse_topk_mask(x, 2, solver="dykstra"),
    "magnitude, pav, p=4/3": lambda x: sparse_topk_magnitude(x, 2, p=4 / 3, solver="pav"),
    "magnitude, merge, p=3": lambda x: sparse_topk_magnitude(x, 2, p=3.0, solver="merge"),
    "mask, pav, p=3": lambda x: sparse_topk_mask(x, 2, p=3.0, solver="pav"),
    "sort": soft_sort,
    "projection": lambda x: permutahedron_projection(x, jnp.arange(7.0), p=1.5),
    "pnorm": lambda x: isotonic_pnorm(-jnp.sort(-x), jnp.ones(7), p=1.5),
}
every = pytest.mark.parametrize(
    "name", [*OPERATORS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)


def value_and_slope(name):
    f = (OPERATORS | MORE)[name]

    def both(x):
        y, pull = jax.vjp(f, x)
        return y, pull(jnp.cos(1.7 * y))[0]

    return both


@every
def test_rows_on_a_mesh_are_those_of_one_device(name):
    """Axes of a mesh are explicit by default, and a shard_map checks what varies over them."""
    both = value_and_slope(name)
    expected = jax.jit(both)(X)
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2])
    rows = PartitionSpec("d")
    x = jax.device_put(X, NamedSharding(mesh, rows))
    mapped = jax.shard_map(both, mesh=mesh, in_specs=rows, out_specs=rows)
    for result in (jax.jit(both)(x), jax.jit(mapped)(x)):
        for a, b in zip(result, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6)


lowered = []  # once for each program that is compiled
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: lowered.append(event) if "jaxpr_to_mlir" in event else None
)


@every
def test_the_second_call_without_jit_compiles_nothing(name):
    f, x, other = (OPERATORS | MORE)[name], jnp.asarray(X), jnp.asarray(2 * X)
    f(x)
    assert lowered  # they are heard at all
    before = len(lowered)
    f(other)
    assert len(lowered) == before
