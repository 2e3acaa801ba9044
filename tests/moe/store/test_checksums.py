"""Checksums: what they find, and that they are the same however the arrays lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe.store import checksums as module
from moe.store.checksums import checksums

DTYPES = (jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_)


def arrays():
    rng = np.random.default_rng(0)
    values = {jnp.dtype(d).name: rng.normal(size=(8, 6, 4)).astype(d) for d in DTYPES}
    return values | {"scalar": np.int32(7), "row": rng.normal(size=24).astype(np.float32)}


@pytest.mark.parametrize("spec", [("a", "b"), (("a", "b"),), (), (None, "b")])
def test_the_same_on_every_mesh(spec):
    whole = {name: jnp.asarray(a) for name, a in arrays().items()}
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    spread = {
        name: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*(spec if a.ndim > 1 else ()))))
        for name, a in whole.items()
    }
    assert checksums(spread) == checksums(whole)


def test_parts_add_up():
    whole = arrays()["float32"]
    parts = [((i, 0, 0), whole[i : i + 1]) for i in (3, 0, 2, 1)]
    parts += [((4, j, 0), whole[4:, j : j + 3]) for j in (0, 3)]
    total = sum(module.of_part(np.ascontiguousarray(part), start) for start, part in parts)
    assert total % 2**32 == checksums({"whole": jnp.asarray(whole)})["whole"]


def test_devices_and_hosts_sum_alike():
    values = [jnp.asarray(a) for a in arrays().values()]
    np.testing.assert_array_equal(module._on_devices(values), module._on_hosts(values))


def test_every_bit_of_an_element_counts():
    for name, array in arrays().items():
        good = checksums({name: jnp.asarray(array)})
        for bit in range(1 if name == "bool" else array.dtype.itemsize * 8):
            raw = bytearray(array.tobytes())
            position = (len(raw) // array.dtype.itemsize // 2) * array.dtype.itemsize
            raw[position + bit // 8] ^= 1 << bit % 8
            bad = np.frombuffer(raw, array.dtype).reshape(array.shape)
            assert checksums({name: jnp.asarray(bad)}) != good, (name, bit)


def test_places_count():
    array = arrays()["float32"]
    for other in (array[::-1], array[:, ::-1], array[..., ::-1], np.roll(array, 1, 0)):
        assert checksums({"a": jnp.asarray(other)}) != checksums({"a": jnp.asarray(array)})
