"""Hard selections against sorts, ties included, and where they compute on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from routers.selection import ROUNDS, kth_value, largest, ranks


@pytest.fixture(params=["distinct", "ties", "tiny and huge"])
def x(request):
    x = np.random.default_rng(0).normal(size=(6, 5, 20)).astype(np.float32)
    if request.param == "tiny and huge":
        x *= np.float32(10) ** np.linspace(-34, 37, 20, dtype=np.float32)
    return x.round() if request.param == "ties" else x


@pytest.mark.parametrize("k", [1, 3, ROUNDS, ROUNDS + 1, 20])
def test_equal_to_a_stable_sort(x, k):
    place = np.argsort(np.argsort(-x, axis=-1, kind="stable"), axis=-1, kind="stable")
    np.testing.assert_array_equal(ranks(x, k), np.minimum(place, k))
    np.testing.assert_array_equal(largest(x, k), place < k)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_other_types(x, dtype):
    with jax.enable_x64(dtype == np.float64):
        x = jnp.asarray(x).astype(dtype)
        place = np.argsort(np.argsort(-np.float64(x), axis=-1, kind="stable"), axis=-1)
        np.testing.assert_array_equal(largest(x, 7), place < 7)


def test_all_of_a_row_are_found_when_scores_are_computed_beside():
    a, b, c = jax.random.normal(jax.random.key(0), (3, 2048, 64))
    for k in (1, 10):
        found = jax.jit(lambda a, b, c, k=k: largest(jnp.sin(a * b + c) / (1 + a * c), k))(a, b, c)
        assert (found.sum(-1) == k).all()


@pytest.mark.parametrize("select", [ranks, largest])
def test_rows_stay_on_their_devices(select):
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((16, 4, 20), jnp.float32, sharding=rows)
    assert "all-" not in jax.jit(lambda x: select(x, 3)).lower(x).compile().as_text()


@pytest.mark.parametrize("k", [1, 6, 9])  # maxima one by one, and a sort; some entries are equal
def test_the_kth_value(k):
    x = np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32).round(1)
    x[0, :10], x[1, 3], x[2] = -np.inf, np.inf, -np.inf
    x[3] = np.nan
    value, slope = jax.vmap(jax.value_and_grad(lambda row: kth_value(row, k)))(x)
    np.testing.assert_array_equal(value, -np.sort(-x, -1)[:, k - 1])
    real = np.isfinite(value)
    order = np.argsort(-x, -1, kind="stable")[:, k - 1]
    np.testing.assert_array_equal(slope[real], np.eye(12)[order[real]])
    assert np.isfinite(slope).all()
