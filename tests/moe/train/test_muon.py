"""Tests Muon: each matrix is made orthogonal by itself, wherever it lies, however it is stacked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe.hosts.mesh import make_mesh
from moe.plan.memory import chip_bytes
from moe.store.checkpoint import Checkpoints, named
from moe.store.records import read
from moe.train.muon import RMS, matrix, muon, orthogonal
from moe.train.run import set_up
from moe.train.trainer import train
from tests.moe.conftest import QUICK, quick_jit
from tests.moe.train.test_mesh import SIZES, losses, meshed

D, F, H, d, E, L = 12, 8, 2, 3, 4, 3
SHAPES = {  # of a parameter, and of its matrix
    ("experts", "kernel_wide"): ((E, D, F), (D, F)),
    ("experts", "kernel_narrow"): ((E, F, D), (F, D)),
    ("experts", "kernel_gate"): ((L, E, D, F), (D, F)),
    ("wide", "kernel"): ((D, F), (D, F)),
    ("gate", "kernel"): ((L, D, F), (D, F)),
    ("query", "kernel"): ((L, D, H, d), (D, H * d)),
    ("out", "kernel"): ((H, d, D), (H * d, D)),
}


def reference(gradient, momentum=0.95, steps=3):
    """Returns the direction of one matrix in float64, after so many equal gradients."""
    trace = np.zeros_like(gradient)
    for _ in range(steps):
        trace = gradient + momentum * trace
    x = gradient + momentum * trace
    x = x / np.sqrt((x**2).sum())
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return 0.2 * np.sqrt(max(x.shape)) * x


def directions(grads, steps=3):
    """Returns the direction after so many equal gradients."""
    optimizer = muon(0.95, optax.scale_by_adam())

    @quick_jit
    def walk(grads):
        state = optimizer.init(grads)
        for _ in range(steps):
            out, state = optimizer.update(grads, state)
        return out

    return walk(grads)


def test_each_matrix_as_in_numpy():
    rng = np.random.default_rng(0)
    grads: dict = {}
    for (parent, name), (shape, _) in SHAPES.items():
        grads.setdefault(parent, {})[name] = rng.normal(size=shape)
    found = directions(jax.tree.map(jnp.float32, grads))
    for (parent, name), (shape, one) in SHAPES.items():
        direction = found[parent][name]
        expected = np.stack([reference(g) for g in grads[parent][name].reshape(-1, *one)])
        np.testing.assert_allclose(direction, expected.reshape(shape), rtol=1e-3, atol=1e-4)
        rms = np.sqrt(np.mean(np.square(direction)))
        assert 0.6 * RMS < rms < 1.3 * RMS  # learning rates of AdamW carry over


def test_a_matrix_becomes_nearly_orthogonal():
    made = quick_jit(orthogonal)
    values = np.linalg.svd(made(np.random.default_rng(0).normal(size=(64, 32))))[1]
    assert values.min() > 0.6 and values.max() < 1.3
    np.testing.assert_array_equal(made(jnp.zeros((4, 8))), 0)


@pytest.mark.parametrize("layers", [(), (L,)])
def test_an_expert_does_not_depend_on_the_others(layers):
    """Another expert's gradient, or its absence, changes not a bit of an expert's step."""
    rng = np.random.default_rng(1)
    first = jnp.float32(rng.normal(size=(*layers, E, D, F)))
    other = first.at[..., 1:, :, :].set(1e3 * rng.normal(size=(*layers, E - 1, D, F)))
    none = first.at[..., 1:, :, :].set(0)

    expected, *others = (
        directions({"experts": {"kernel_wide": gradient}})["experts"]["kernel_wide"]
        for gradient in (first, other, none)
    )
    for found in others:
        np.testing.assert_array_equal(found[..., 0, :, :], expected[..., 0, :, :])
        assert bool((found[..., 1, :, :] != expected[..., 1, :, :]).any())


def test_what_is_a_matrix(tiny, tiny_text):
    """Kernels of attention, MLPs and experts are; all else goes to Adam."""
    sizes = {"data__image_size": "8", "data__channels": "1", "data__num_classes": "10"}
    for config in (tiny(**sizes), tiny_text(data__vocabulary="300", model__scan="true")):
        leaves = jax.tree_util.tree_leaves_with_path(set_up(config).params)
        parents = {True: set(), False: set()}
        for path, leaf in leaves:
            if "kernel" in str(path[-1].key):
                parents[matrix(path) is not None].add(path[-2].key)
            else:
                assert matrix(path) is None, path
            assert leaf.ndim >= sum(matrix(path) or ()), path
        attention = {"query", "key", "value", "out"}
        assert attention < parents[True] <= attention | {"experts", "wide", "narrow", "gate"}
        assert "experts" in parents[True]
        assert parents[False] <= {"router", "head", "embed"}


@pytest.mark.slow
def test_scanned_or_not_is_the_same_step(tiny_text):
    def after(scan):
        config = tiny_text(
            model__scan=scan, optimizer__name="muon", optimizer__warmup_steps="0", batch_size="8"
        )
        _, state, _ = losses(config, jax.devices()[:1], steps=2)
        return named(state["params"])

    looped, single = after("true"), after("false")
    for name, value in single.items():
        parts = name.split(".")
        whole = looped[".".join([parts[0], "0", *parts[2:]]) if parts[0] == "blocks" else name]
        mine = whole[int(parts[1])] if parts[0] == "blocks" else whole
        np.testing.assert_allclose(mine, value, rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 1, 2, 2), (1, 2, 4)])
def test_the_same_losses_on_a_mesh(sizes, tiny, tmp_path):
    """And a checkpoint gives back the state to the bit, each moment where it lay."""
    settings = SIZES | {"optimizer__name": "muon"}
    found, trained, run = losses(tiny(**settings, **meshed(*sizes)), steps=12)
    alone, *_ = losses(tiny(**settings), jax.devices()[:1], steps=12)
    assert found[-1] < found[0] - 0.1  # something is learned
    np.testing.assert_allclose(found, alone, rtol=0, atol=2e-5)
    state = run.abstract_state()
    moments = named(state["opt_state"])
    for name, parameter in named(state["params"]).items():
        kept = [a for n, a in moments.items() if n.endswith("." + name)]
        # Of a matrix its momentum, where it lies itself; of all else both of Adam's moments.
        path = [jax.tree_util.DictKey(part) for part in name.split(".")]
        assert len(kept) == (1 if matrix(path) else 2), name
        assert {a.sharding.spec for a in kept} == {parameter.sharding.spec}, name
    matrices, others = (
        chip_bytes([a for n, a in moments.items() if trace in n and a.ndim])
        for trace in ("trace", "u.")
    )
    assert matrices + others == pytest.approx(chip_bytes(state["opt_state"]), abs=64)
    checkpoints = Checkpoints(tmp_path / "c", keep=1, best=run.task.best)
    checkpoints.save(12, trained, {})
    checkpoints.close()
    restored = Checkpoints(tmp_path / "c", read_only=True).restore(12, state)
    assert jax.tree.structure(restored) == jax.tree.structure(trained)
    for name, value in named(restored).items():
        np.testing.assert_array_equal(value, named(trained)[name], err_msg=name)


def test_experts_stay_where_they_are():
    """Layers and experts are not merged: no device needs another's experts."""
    mesh = make_mesh({"data": 2, "fsdp": 1, "expert": 4, "tensor": 1})
    where = NamedSharding(mesh, PartitionSpec(None, "expert"))
    kernel = jax.ShapeDtypeStruct((L, 8, D, F), jnp.float32, sharding=where)
    text = jax.jit(orthogonal).lower(kernel).compile(QUICK).as_text()
    assert not any(name in text for name in ("all-", "collective", "reduce-scatter"))


@pytest.mark.slow
def test_a_run_resumes_to_the_bit(tiny, tmp_path):
    settings = {"optimizer__name": "muon", "optimizer__schedule": "constant"}
    settings |= {"optimizer__warmup_steps": "2", "log__every": "1", "eval__every": "8"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny(**settings, num_steps="8"), whole)
    train(tiny(**settings, num_steps="4"), parts)
    train(tiny(**settings, num_steps="8"), parts, extend=True)

    def found(workdir):
        return {
            record["step"]: record["train/loss"]
            for record in read(workdir / "metrics.jsonl")
            if "train/loss" in record
        }

    assert found(whole) == found(parts) and found(whole)[8] < found(whole)[1]
