"""Every operator on rows that are spread over devices: in `shard_map`, and on an explicit mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.routers.operators import REAL, SIMPLEX, WHOLE

pytestmark = pytest.mark.slow  # many compilations

X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
K = np.float32([2, 1.5, 3, 8])
OPERATORS = REAL | WHOLE | SIMPLEX
SPREAD = PartitionSpec("d")


def value_and_gradient(operator):
    def both(x, k, strength):
        def weighted(x):
            y = operator(x, k, strength)
            weights = jnp.cos(1.7 * jnp.arange(y.size // y.shape[0])).reshape(y.shape[1:])
            return (weights * y).sum(), y

        gradient, y = jax.grad(weighted, has_aux=True)(x)
        return y, gradient

    return both


@pytest.mark.parametrize("name", OPERATORS)
def test_rows_may_lie_on_several_devices(name):
    """With k at each row, spread too, and one traced strength, which every device has."""
    both = value_and_gradient(OPERATORS[name])
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    mapped = jax.shard_map(
        both, mesh=mesh, in_specs=(SPREAD, SPREAD, PartitionSpec()), out_specs=SPREAD
    )
    x, k = (jax.device_put(a, NamedSharding(mesh, SPREAD)) for a in (X, K))
    found = jax.jit(lambda *rows: (both(*rows), mapped(*rows)))(x, k, np.float32(0.7))
    if name.startswith("perturbed"):  # each device draws its own noise
        found = found[:1]
    expected = jax.jit(both)(X, K, np.float32(0.7))
    for way in found:
        for a, b in zip(way, expected, strict=True):
            assert a.sharding.spec[0] == "d"
            np.testing.assert_allclose(a, b, atol=2e-5)
