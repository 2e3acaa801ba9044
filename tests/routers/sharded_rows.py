"""Run by test_sharding.py with eight devices: the axis of the items spread over all of them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from routers import lapsum_topk_mask, sparse_topk_magnitude, sparse_topk_mask

ROWS, N, K = 4, 128, 9
COLLECTIVE = re.compile(
    r"= (.*?) (all-\w+|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
)


def value_and_cotangent(operator):
    def both(x, k, c):
        y, pull = jax.vjp(lambda x: operator(x, k), x)
        return y, pull(c)[0]

    return jax.jit(both)


def main():
    rng = np.random.default_rng(0)
    x, c = (jnp.asarray(rng.normal(size=(ROWS, N)), jnp.float32) for _ in range(2))
    mesh = jax.make_mesh((8,), ("items",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec(None, "items"))
    operators = {
        "mask, p = 2": sparse_topk_mask,
        "mask, p = 4/3": lambda x, k: sparse_topk_mask(x, k, p=4 / 3),
        "mask, narrow": lambda x, k: sparse_topk_mask(x, k, strength=1e-3),
        "magnitude": sparse_topk_magnitude,
        "LapSum": lapsum_topk_mask,
    }
    for name, operator in operators.items():
        f = value_and_cotangent(operator)
        expected = f(x, jnp.float32(K), c)
        args = jax.device_put(x, spread), jnp.float32(K), jax.device_put(c, spread)
        program = f.lower(*args).compile()
        for a, b in zip(program(*args), expected, strict=True):
            assert a.sharding.is_equivalent_to(spread, 2), (name, a.sharding)
            np.testing.assert_allclose(a, b, atol=2e-6, err_msg=name)
        found = COLLECTIVE.findall(program.as_text())
        shapes = {
            (kind, shape) for result, kind in found for shape in re.findall(r"\[.*?\]", result)
        }
        assert found and shapes <= {("all-reduce", f"[{ROWS}]"), ("all-reduce", "[]")}, shapes
        print(f"{name}: {len(found)} collectives, {sorted(shapes)}")


if __name__ == "__main__":
    main()
