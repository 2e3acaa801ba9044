"""Pruning of one kernel and of a tree of parameters: the known numbers, and who is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe.hosts.mesh import make_mesh
from moe.nn.pruning import Pruning, nonzero_share

# Shares of entries that are not 0, and that are unchanged, of 10 % of normal ones, by strength.
SHARES = {0.01: (0.102, 0.098), 0.1: (0.117, 0.085), 0.3: (0.150, 0.061), 1: (0.247, 0.021)}
SHARES |= {3: (0.424, 0.001)}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def fixed(strength, **settings):
    return Pruning(**({"keep": 0.1, "final_strength": 0.0} | settings), strength=strength)


def effective(pruning, kernel, progress=0.0):
    return pruning.effective({"wide": {"kernel": kernel}}, progress)["wide"]["kernel"]


def sorted_top(kernel, k):
    """Top-k in magnitude by NumPy's sort, stable: the first of equal ones."""
    flat = np.asarray(kernel).ravel()
    order = np.argsort(-np.abs(flat), kind="stable")
    out = np.zeros_like(flat)
    out[order[:k]] = flat[order[:k]]
    return out.reshape(kernel.shape)


def test_shares_of_normal_weights():
    kernel = normal(400, 500)
    for strength, (nonzero, same) in SHARES.items():
        pruned = effective(fixed(strength), kernel)  # eager: one compilation for all
        assert float((pruned != 0).mean()) == pytest.approx(nonzero, abs=0.01 * 0.1)
        assert float((pruned == kernel).mean()) == pytest.approx(same, abs=0.01 * 0.1)


def test_hardened_and_narrow_are_the_sorted_top():
    kernel = normal(20, 30)
    expected = sorted_top(kernel, 60)
    params = {"wide": {"kernel": kernel}}
    np.testing.assert_array_equal(Pruning(keep=0.1).hardened(params)["wide"]["kernel"], expected)
    np.testing.assert_array_equal(effective(fixed(1e-6), kernel), expected)
    np.testing.assert_array_equal(effective(fixed(0.0), kernel), expected)
    ties = jnp.round(kernel)
    hard = Pruning(keep=0.1).hardened({"wide": {"kernel": ties}})["wide"]["kernel"]
    np.testing.assert_array_equal(hard, sorted_top(ties, 60))


def test_twice_the_weights_have_to_the_bit_twice_the_pruned_ones():
    kernel = normal(20, 30)
    for strength in (0.01, 0.3, 3):
        once, twice = (effective(fixed(strength), a) for a in (kernel, 2 * kernel))
        np.testing.assert_array_equal(twice, 2 * once)


def test_gradients_reach_what_is_kept_or_everything():
    kernel, weights = normal(20, 30), normal(20, 30, seed=1)

    def gradient(pruning):
        pruned, pull = jax.vjp(lambda w: effective(pruning, w), kernel)
        return pruned, pull(weights)[0]

    for pruning in (fixed(0.3), fixed(0.0)):
        pruned, slope = gradient(pruning)
        assert (slope[pruned == 0] == 0).all() and (slope[pruned != 0] != 0).mean() > 0.9
        straight, through = gradient(fixed(pruning.strength, straight_through=True))
        np.testing.assert_array_equal(straight, pruned)
        np.testing.assert_array_equal(through, weights)
    np.testing.assert_array_equal(gradient(fixed(0.0))[1], jnp.where(pruned != 0, weights, 0))


def test_the_strength_goes_evenly_in_its_logarithm_without_compiling_again():
    pruning, kernel, traces = Pruning(keep=0.1), normal(20, 30), []

    @jax.jit
    def compute(kernel, progress):
        traces.append(1)
        return effective(pruning, kernel, progress)

    for progress, strength in ((0.0, 3.0), (0.5, 0.3**0.5 * 0.1**0.5), (1.0, 0.01)):
        expected = effective(fixed(strength), kernel)
        np.testing.assert_allclose(compute(kernel, progress), expected, rtol=1e-4, atol=2e-6)
    assert len(traces) == 1


def test_each_matrix_is_pruned_by_itself_and_others_are_left_alone():
    params = {
        "embed": {"kernel": normal(2, 2, 1, 8)},
        "blocks": {
            "0": {"attention": {"query": {"kernel": normal(8, 2, 4), "bias": normal(2, 4)}}},
            "1": {
                "experts": {"kernel_wide": normal(3, 4, 8, 10), "bias_wide": normal(3, 4, 1, 10)}
            },
            "2": {"router": {"kernel": normal(8, 4)}, "out": {"kernel": jnp.zeros((2, 4, 8))}},
        },
        "head": {"kernel": normal(8, 10)},
    }
    hard = Pruning(keep=0.05).hardened(params)
    query = hard["blocks"]["0"]["attention"]["query"]
    assert (query["kernel"] != 0).sum() == 3
    wide = hard["blocks"]["1"]["experts"]["kernel_wide"]
    np.testing.assert_array_equal((wide != 0).sum((-2, -1)), np.full((3, 4), 4))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), params, hard)
    assert sum(jax.tree.leaves(changed)) == 2
    assert float(nonzero_share(hard)) == pytest.approx((3 + 48) / (64 + 960 + 64))
    soft = Pruning(keep=0.05).effective(params, 0.0)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(soft))  # also of zeros alone
    assert Pruning().effective(params, 0.0) is params and Pruning().hardened(params) is params
    assert Pruning(keep=0.5, one_shot=True).effective(params, 0.0) is params


@pytest.mark.slow
def test_matrices_stay_where_their_devices_are():
    """Of a kernel that is spread along both sides, counts and sums cross, nothing else."""
    mesh = make_mesh({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2})
    specs = {
        "experts": {"kernel_wide": PartitionSpec("expert", None, "tensor")},
        "query": {"kernel": PartitionSpec("fsdp", "tensor")},
    }
    params = {"experts": {"kernel_wide": normal(2, 6, 8)}, "query": {"kernel": normal(8, 2, 5)}}
    like = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, s)),
        params,
        specs,
    )
    there = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), params, like)
    layout = jax.tree.map(lambda s: s.sharding, like)
    for pruning in (Pruning(keep=0.2), Pruning(keep=0.2, strength=0.0)):

        def compute(params, like, pruning=pruning):
            pruned, pull = jax.vjp(lambda p: pruning.effective(p, 0.25, like), params)
            return pruned, pull(params)[0]

        with jax.set_mesh(mesh):
            spread = jax.jit(lambda p: compute(p, like), out_shardings=(layout, layout))
            program = spread.lower(there).compile()
        for a, b in zip(
            jax.tree.leaves(program(there)), jax.tree.leaves(compute(params, None)), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=2e-6)
        if pruning.strength:
            text = program.as_text()
            assert " all-reduce(" in text
            assert not any(name in text for name in (" all-gather(", " all-to-all(", "permute("))
