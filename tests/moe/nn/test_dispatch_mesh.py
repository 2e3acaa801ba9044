"""A layer of experts on meshes of eight devices: one device's numbers, and what it exchanges."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from moe.hosts import mesh
from moe.nn import exchange as rows
from moe.nn.layer import MoE
from moe.nn.memory import split
from routers import ROUTERS
from tests.moe.conftest import quick_jit

B, T, D, F, E = 8, 6, 8, 16, 8
MESHES = {
    "data 8": {"data": 8},
    "expert 8": {"expert": 8},
    "data 2, expert 2, tensor 2": {"data": 2, "expert": 2, "tensor": 2},
    "fsdp 2, expert 4": {"fsdp": 2, "expert": 4},
}


@functools.cache
def layer(router: str, dispatch: str, dropout: float = 0.0, receive: float = 8.0):
    """The layer's parameters and its loss; reports and gradients come with it."""
    model = MoE(
        D,
        F,
        T,
        router=ROUTERS[router],
        settings={"k": 2},
        num_experts=E,
        group_size=1,
        capacity_factor=1.0,
        eval_capacity_factor=2.0,
        dispatch=dispatch,
        dropless_bound=4.0,
        dropless_receive=receive,
        dropout=dropout,
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    graphdef, params, memory = split(model)
    for name in ("bias_wide", "bias_narrow"):
        bias = params["experts"][name]
        bias[...] = jax.random.normal(jax.random.key(5), bias.shape)

    def loss(params, x, weight):
        mask = jnp.arange(B) != 3
        model = nnx.merge(graphdef, params, memory)
        y, report = model(x, mask=mask, train=True, key=jax.random.key(3))
        return (y * weight).sum() + report.aux_loss, (y, report)

    return params, jax.value_and_grad(loss, (0, 1), has_aux=True)


def inputs():
    return jax.random.normal(jax.random.key(0), (2, B, T, D))


@functools.cache
def on_one_device(*args):
    params, loss = layer(*args)
    return jax.tree.leaves(quick_jit(loss)(nnx.to_pure_dict(params), *inputs()))


def compile_on(sizes, params, loss):
    """The program on the mesh, and its inputs laid out there."""
    devices = mesh.make_mesh({axis: sizes.get(axis, 1) for axis in mesh.AXES})
    where = mesh.parameter_shardings(devices, params)
    rows = NamedSharding(devices, mesh.spec("batch"))
    arguments = jax.device_put((nnx.to_pure_dict(params), *inputs()), (where, rows, rows))
    with jax.set_mesh(devices):
        program = quick_jit(loss, out_shardings=(None, (where, rows))).lower(*arguments).compile()
    return program, arguments


QUICK_CASES = [("topk", "capacity", name) for name in ("data 8", "expert 8")]
QUICK_CASES += [("topk", "dropless", "data 2, expert 2, tensor 2")]
QUICK_CASES += [("sparse_expert_choice", "dropless", "fsdp 2, expert 4")]
QUICK_CASES += [("soft_moe", "capacity", "data 2, expert 2, tensor 2")]
CASES = itertools.product(ROUTERS, ("capacity", "dropless"), MESHES)
CASES = [pytest.param(*c, marks=[] if c in QUICK_CASES else pytest.mark.slow) for c in CASES]


@pytest.mark.parametrize(("router", "dispatch", "name"), CASES)
def test_a_mesh_computes_the_same(router, dispatch, name):
    sizes = MESHES[name]
    program, arguments = compile_on(sizes, *layer(router, dispatch))
    for ours, reference in zip(
        jax.tree.leaves(program(*arguments)), on_one_device(router, dispatch), strict=True
    ):
        # Sums over tokens and over parts of F in another order.
        np.testing.assert_allclose(ours, reference, rtol=2e-5, atol=2e-5)
    hlo = program.as_text()
    assert "all-gather" not in hlo
    exchanges = len(re.findall(r"all-to-all(?:-start)?\(", hlo))
    there_and_back = 5 if dispatch == "dropless" and router != "soft_moe" else 4  # 5: and counts
    assert exchanges == (there_and_back if sizes.get("expert", 1) > 1 else 0)


def test_rows_beyond_what_a_device_receives_are_dropped_and_reported():
    """An example and an expert a device, 12 rows each: two for each expert, the heaviest."""
    program, arguments = compile_on({"expert": 8}, *layer("topk", "dropless", receive=1.0))
    (_, (_, report)), _ = program(*arguments)
    weights_BTE = np.asarray(report.weights_BTE)
    found = np.minimum((weights_BTE > 0).sum(1), 2).sum(0)
    np.testing.assert_array_equal(report.load_E, found)
    lost = np.sort(weights_BTE, axis=1)[:, :-2].sum() / weights_BTE.sum()
    assert lost > 0.1
    np.testing.assert_allclose(report.dropped, lost, rtol=1e-5)


def emulated(a, out, starts_P, sizes_P, there_P, came_P):
    """`jax.lax.ragged_all_to_all` for CPU, which has none: every device looks at all slices."""
    every = [jax.lax.all_gather(x, "expert") for x in (a, starts_P, sizes_P, there_P)]
    own, row = jax.lax.axis_index("expert"), jnp.arange(len(out))
    for a, starts, sizes, there in zip(*every, strict=True):
        place = row - there[own]
        mine = ((place >= 0) & (place < sizes[own])).reshape(-1, *[1] * (a.ndim - 1))
        out = jnp.where(mine, a[jnp.clip(starts[own] + place, 0, len(a) - 1)], out)
    return out


@pytest.mark.parametrize("router", ["topk", "sparse_expert_choice"])
def test_the_ragged_exchange_of_a_tpu_is_the_padded_one(router, monkeypatch):
    def branch(*args, default=None, cpu=None, tpu=None):
        return (tpu or cpu or default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", branch)
    monkeypatch.setattr(rows, "_ragged", emulated)
    fresh = layer.__wrapped__(router, "dropless")  # not traced before
    program, arguments = compile_on(MESHES["fsdp 2, expert 4"], *fresh)
    for ours, reference in zip(
        jax.tree.leaves(program(*arguments)), on_one_device(router, "dropless"), strict=True
    ):
        np.testing.assert_allclose(ours, reference, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_dropout_does_not_depend_on_the_mesh(dispatch):
    arguments = ("topk", dispatch, 0.5)
    program, inputs = compile_on(MESHES["data 2, expert 2, tensor 2"], *layer(*arguments))
    for ours, reference in zip(
        jax.tree.leaves(program(*inputs)), on_one_device(*arguments), strict=True
    ):
        np.testing.assert_allclose(ours, reference, rtol=2e-5, atol=2e-5)
