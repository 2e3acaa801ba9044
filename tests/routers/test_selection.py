"""Hard selections against sorts, ties included, and where they compute on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from routers.selection import ROUNDS, largest, ranks


@pytest.fixture(params=["distinct", "ties"])
def x(request):
    x = np.random.default_rng(0).normal(size=(6, 5, 20)).astype(np.float32)
    return x if request.param == "distinct" else x.round()


@pytest.mark.parametrize("k", [1, 3, ROUNDS, ROUNDS + 1, 20])
def test_equal_to_a_stable_sort(x, k):
    place = np.argsort(np.argsort(-x, axis=-1, kind="stable"), axis=-1, kind="stable")
    np.testing.assert_array_equal(ranks(x, k), np.minimum(place, k))
    np.testing.assert_array_equal(largest(x, k), place < k)


@pytest.mark.parametrize("select", [ranks, largest])
def test_rows_stay_on_their_devices(select):
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((16, 4, 20), jnp.float32, sharding=rows)
    assert "all-" not in jax.jit(lambda x: select(x, 3)).lower(x).compile().as_text()
