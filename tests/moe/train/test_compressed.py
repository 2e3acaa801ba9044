"""Gradients that are sent in part: the workers against loops, on meshes, stopped and moved."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe.errors import UsageError
from moe.hosts.mesh import AXES, make_mesh
from moe.store.checkpoint import Checkpoints, named
from moe.train.compressed import Compressor
from moe.train.run import set_up
from moe.train.step import make_gradient, make_train_step, root_key, step_key
from moe.train.trainer import train
from routers import compression
from tests.moe import launch
from tests.moe.conftest import QUICK, open_source
from tests.routers.test_compression import kept_by_sorting

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
# Without a loss of the whole batch, and without noise: there workers compute something else.
SMALL = {"router__name": "sparse_expert_choice", "model__depth": "1", "moe__layers": "0"}
KEEP = {"optimizer__compress__keep": "0.1"}
SMALL |= KEEP | {"moe__num_experts": "2"}


def meshed(*sizes):
    return {f"mesh__{axis}": str(size) for axis, size in zip(AXES, sizes, strict=True)}


def prepared(config, devices=None):
    """The run, its compiled step, its first state, and a function of a step's batch."""
    source = open_source(config, "train")
    run = set_up(config, source, devices)
    layout = jax.tree.map(lambda a: a.sharding, run.abstract_state())
    step = run.jit(run.train_step, out_shardings=(layout, None), compiler_options=QUICK)
    return run, step, run.initial_state(), lambda i: next(run.train_batches(source, i))


def plain(run):
    """The gradient of a step as it is without compression."""
    config = run.config
    sums = functools.partial(run.task.sums, config)
    return make_gradient(sums, run.graphdef, config.optimizer.accumulate, config.moe.group_size)


def test_workers_have_the_gradients_of_their_own_examples(tiny):
    """Eight devices against a loop over eight workers on one."""
    run, _, state, batch = prepared(tiny(**SMALL | {"moe__layers": "none"}))
    images, key = batch(0), step_key(root_key(0), 0)
    local = run.jit(run.compressor.local(plain(run)), compiler_options=QUICK)
    found, sums = local(state["params"], run.put(images), key, {})
    alone = jax.jit(plain(run), compiler_options=QUICK)
    params = jax.device_get(state["params"])
    loss = 0.0
    for worker in range(8):
        own = {name: a[2 * worker : 2 * worker + 2] for name, a in images.items()}
        expected, seen = alone(params, own, jax.random.fold_in(key, worker), {})
        loss += float(seen["loss"])
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a[worker], b, rtol=1e-4, atol=1e-6)
    assert float(sums["loss"]) == pytest.approx(loss, rel=1e-6)


class Workers:
    """The methods in numpy: a loop over workers and over the parts of an array."""

    def __init__(self, method, keep, workers):
        self.method, self.keep, self.workers, self.own, self.mean = method, keep, workers, {}, {}

    def exchange(self, gradients, parts):
        """The gradient that all use, of {name: [W, *shape]} and {name: an array's parts}."""
        return {name: self._array(name, g, parts[name]) for name, g in gradients.items()}

    def _array(self, name, g, parts):
        own = self.own.setdefault(name, np.zeros_like(g))
        sent = np.zeros_like(g)
        for w in range(self.workers):
            x = {"ef": g[w] + own[w], "ef21": g[w] - own[w], "": g[w]}[self.method]
            for part in parts:
                k = compression.count(x[part].size, self.keep)
                sent[w][part] = kept_by_sorting(x[part].reshape(1, -1), k).reshape(x[part].shape)
            own[w] = {"ef": x - sent[w], "ef21": own[w] + sent[w], "": own[w]}[self.method]
        d = functools.reduce(np.add, sent) / np.float32(self.workers)
        if self.method == "ef21":
            d = self.mean[name] = self.mean.get(name, 0) + d
        return d


SHAPES = {
    "bias": ((10,), P()),
    "head": ((8, 10), P("fsdp", None)),
    "stack": ((3, 8, 12), P(None, "fsdp", "tensor")),  # of layers
}


def small(method, sizes=(8, 1, 1, 1), keep=0.1):
    """A compressor of three arrays on a mesh."""
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), devices)
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, where))
        for name, (shape, where) in SHAPES.items()
    }
    return Compressor(keep, method, params, {name: name == "stack" for name in SHAPES}), mesh


def zeros(shapes):
    return jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), shapes)


def parts_of(compressor):
    """{name: the index of each device's part of each layer of an array}."""

    def parts(name, p):
        indices = {str(i): i for i in p.sharding.devices_indices_map(p.shape).values()}.values()
        if not compressor.stacked[name]:
            return list(indices)
        return [(turn, *index[1:]) for index in indices for turn in range(p.shape[0])]

    return {name: parts(name, p) for name, p in compressor.params.items()}


def gradients(rng, workers):
    return {
        name: rng.normal(size=(workers, *shape)).astype(np.float32)
        for name, (shape, _) in SHAPES.items()
    }


PARTS = (2, 2, 1, 2)
LOOPS = [("ef", (8, 1, 1, 1)), ("ef21", PARTS), slow("", PARTS), slow("ef", PARTS)]


@pytest.mark.parametrize(("method", "sizes"), [*LOOPS, slow("ef21", (8, 1, 1, 1))])
def test_what_workers_send_against_a_loop_in_numpy(method, sizes):
    """Three steps to the bit; what `fsdp` and `tensor` split, and layers, are sent part by part."""
    compressor, mesh = small(method, sizes)
    parts, rng = parts_of(compressor), np.random.default_rng(0)
    loop, kept = Workers(method, 0.1, sizes[0]), zeros(compressor.kept())
    exchange = jax.jit(compressor.exchange, compiler_options=QUICK)
    with jax.set_mesh(mesh):
        for _ in range(3):
            g = gradients(rng, sizes[0])
            found, kept = exchange(g, kept)
            expected = loop.exchange(g, parts)
            for name in SHAPES:
                np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    for name, a in kept.get("own", {}).items():
        np.testing.assert_array_equal(a, loop.own[name], err_msg=name)


def linear(params, batch, key, memory):
    """The gradient of the mean of <batch, params>, and sums; examples have weights."""
    weight = batch["weight"].sum()
    grads = {
        name: (batch[name] * batch["weight"].reshape(-1, *[1] * p.ndim)).sum(0) / weight
        for name, p in params.items()
    }
    return grads, {"loss": batch["loss"].sum(), "weight": weight}


@pytest.mark.parametrize("method", ["ef", slow("ef21")])
def test_steps_of_eight_devices_against_a_loop_over_workers(method):
    """Plain descent with examples of unequal weight; then a step that is refused."""
    compressor, mesh = small(method)
    own = compressor.gradient(linear)
    gradient = lambda *args: own(*args[:4], *args[5:])  # noqa: E731 - without the step's number
    step = make_train_step(gradient, optax.sgd(0.5), 0, None, skip=True)
    rng, loop = np.random.default_rng(1), Workers(method, 0.1, 8)
    params = {name: np.ones(shape, np.float32) for name, (shape, _) in SHAPES.items()}
    start = {"step": jnp.int32(0), "params": zeros(compressor.params)}
    start["params"] = jax.tree.map(lambda a: a + 1, start["params"])
    state = start | {"opt_state": optax.sgd(0.5).init(params), "compress": zeros(compressor.kept())}
    with jax.set_mesh(mesh):
        step = jax.jit(step, compiler_options=QUICK)
        for _ in range(3):
            weight = rng.uniform(0.5, 2, 8).astype(np.float32)
            batch = gradients(rng, 8) | {"weight": weight, "loss": np.ones(8, np.float32)}
            state, sums = step(state, batch)
            share = 8 * weight / weight.sum()
            g = {n: batch[n] * share.reshape(-1, *[1] * (batch[n].ndim - 1)) for n in SHAPES}
            for name, d in loop.exchange(g, parts_of(compressor)).items():
                params[name] -= 0.5 * d
        assert float(sums["loss"]) == 8 and float(sums["weight"]) == pytest.approx(weight.sum())
        for name in SHAPES:
            np.testing.assert_allclose(state["params"][name], params[name], rtol=1e-5, atol=1e-6)
            own = state["compress"]["own"][name]
            np.testing.assert_allclose(own, loop.own[name], rtol=1e-5, atol=1e-6)
        bad = batch | {"bias": np.full_like(batch["bias"], np.inf)}
        refused, sums = step(state, bad)
    assert float(sums["skipped"]) == 1 and int(refused.pop("step")) == 4
    for name, a in named(refused).items():
        np.testing.assert_array_equal(a, named(state)[name], err_msg=name)


EVERY = {"moe__layers": "0,1", "model__depth": "2", "moe__num_experts": "8"}
TEXT = {"moe__layers": "0,1", "moe__capacity_factor": "4"}
TEXT |= {f"router__topk__{loss}": "0" for loss in ("noise", "balance", "z", "load", "importance")}
LOOPED = {"model__scan": "True", "model__remat": "full", "optimizer__accumulate": "2"}
MESHES = [
    meshed(2, 2, 2, 1) | EVERY | LOOPED,
    meshed(2, 1, 2, 2) | EVERY | {"moe__dispatch": "dropless", "model__remat": "exchange"},
    meshed(4, 1, 1, 2) | EVERY | {"moe__dispatch": "dense", "router__name": "loss_free"},
    meshed(2, 1, 4, 1) | EVERY | {"router__name": "soft_moe"},
    meshed(2, 1, 2, 2) | TEXT | {"router__name": "topk"},
    meshed(2, 4, 1, 1) | TEXT | {"router__name": "topk", "moe__dispatch": "dropless"},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", MESHES)
def test_the_mean_of_the_workers_is_the_gradient(settings, tiny, tiny_text):
    text = settings.get("router__name") == "topk"
    config = tiny_text(**settings | KEEP) if text else tiny(**SMALL | settings)
    run, _, state, batch = prepared(config)
    key = step_key(root_key(0), 0)
    arguments = state["params"], run.put(batch(0)), key, state.get("routers", {})
    local = run.jit(run.compressor.local(plain(run)), compiler_options=QUICK)
    found, sums = local(*arguments)
    expected, seen = run.jit(plain(run), compiler_options=QUICK)(*arguments)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a.mean(0), b, rtol=1e-4, atol=1e-6)
    for name, a in named(sums).items():
        np.testing.assert_allclose(a, named(seen)[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_all_entries_are_no_compression(tiny):
    run = set_up(tiny(**SMALL | {"optimizer__compress__keep": "1"}), open_source(tiny(), "train"))
    assert run.compressor is None and "compress" not in run.abstract_state()


def test_one_shard_has_nobody_to_send_to(tiny):
    source = open_source(tiny(), "train")
    with pytest.raises(UsageError, match=r"compress.keep=0.1 with feedback needs several shards"):
        set_up(tiny(**SMALL), source, jax.devices()[:1])
    alone = SMALL | {"optimizer__compress__feedback": "False"}
    assert set_up(tiny(**alone), source, jax.devices()[:1]).compressor.workers == 1


@pytest.mark.parametrize("sizes", [(4, 2, 1, 1), slow((2, 1, 1, 2)), slow((3, 1, 1, 1))])
def test_what_workers_keep_moves_to_other_workers(sizes, tmp_path):
    compressor, other = small("ef21")[0], small("ef21", sizes)[0]
    rng = np.random.default_rng(1)
    kept = jax.tree.map(
        lambda a: jax.device_put(rng.normal(size=a.shape).astype(a.dtype), a.sharding),
        compressor.kept(),
    )
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"compress": kept}, {})
    checkpoints.close()
    like = {"compress": other.kept()}
    found, step, damaged = Checkpoints(tmp_path, read_only=True).restore_newest(like)
    assert (step, damaged) == (1, [])
    for name, a in named(found["compress"]).items():
        assert a.sharding.is_equivalent_to(named(like["compress"])[name].sharding, a.ndim), name
        saved = np.float64(named(kept)[name])
        if name.startswith("own"):
            mean = np.broadcast_to(saved.mean(0), a.shape)
            np.testing.assert_allclose(a, mean, rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(a, saved, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ef", "ef21"])
def test_a_run_goes_on_to_the_bit_and_on_other_workers(method, tiny, tmp_path):
    settings = SMALL | {"optimizer__compress__method": method, "optimizer__schedule": "constant"}
    whole, half = (tiny(**settings, num_steps=steps) for steps in ("8", "4"))
    train(whole, tmp_path / "whole")
    train(half, tmp_path / "parts")
    shutil.copytree(tmp_path / "parts", tmp_path / "moved")
    train(whole, tmp_path / "parts", extend=True)
    expected, found = (launch.arrays(tmp_path / name, 8) for name in ("whole", "parts"))
    assert any(name.startswith("compress.own") for name in expected)
    for name, a in expected.items():
        np.testing.assert_array_equal(found[name], a, err_msg=name)
    results = train(tiny(**settings, **meshed(4, 2, 1, 1), num_steps="8"), tmp_path / "moved", True)
    assert np.isfinite(results["eval/loss"])
