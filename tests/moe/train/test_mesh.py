"""Any mesh computes the same run: losses over 20 steps, and where every array lies."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe.errors import UsageError
from moe.hosts.mesh import AXES, make_mesh, to_experts, to_groups
from moe.train.run import set_up
from routers import ROUTERS
from tests.moe.conftest import QUICK, open_source

STEPS = 20
FACTORS = [s for s in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(s) == 8]
SIZES = {"moe__num_experts": "8", "moe__layers": "0,1", "optimizer__learning_rate": "0.01"}


def losses(config, devices=None, steps=STEPS):
    source = open_source(config, "train")
    run = set_up(config, source, devices)
    layout = jax.tree.map(lambda a: a.sharding, run.abstract_state())
    step = run.jit(run.train_step, out_shardings=(layout, None), compiler_options=QUICK)
    state, found = run.initial_state(), []
    batches = run.train_batches(source, 0)
    for _ in range(steps):
        state, sums = step(state, run.put(next(batches)))
        found.append(float(sums["loss"]) / config.batch_size)
    return np.array(found), state, run


def meshed(data, fsdp, expert, tensor=1):
    sizes = (data, fsdp, expert, tensor)
    return {f"mesh__{axis}": str(size) for axis, size in zip(AXES, sizes, strict=True)}


@pytest.fixture(scope="module")
def single(data_dir):
    """Losses on one device, by router."""
    from moe import cli, config
    from tests.moe.conftest import TINY

    found = {}

    def make(router):
        if router not in found:
            settings = {k.replace("__", "."): v for k, v in SIZES.items()}
            settings |= {"router.name": router, "data.data_dir": str(data_dir)}
            one = cli.apply(config.default(), TINY | settings)
            found[router] = losses(one, jax.devices()[:1])[0]
        return found[router]

    return make


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
CASES = [slow("sparse_expert_choice", (2, 2, 2)), ("topk", (1, 2, 2, 2))]
CASES += [slow("topk", factors) for factors in FACTORS]
CASES += [slow(router, (2, 2, 2)) for router in ROUTERS if "topk" in router or "soft" in router]
CASES += [slow("topk", (1, 2, 1, 4)), slow("expert_choice", (1, 1, 8))]


@pytest.mark.parametrize(("router", "sizes"), CASES)
def test_the_same_losses_on_every_mesh(router, sizes, single, tiny):
    found, *_ = losses(tiny(**SIZES, router__name=router, **meshed(*sizes)))
    assert found[-1] < found[0] - 0.1  # something is learned
    np.testing.assert_allclose(found, single(router), rtol=0, atol=1e-5)


def test_where_parameters_and_moments_lie(tiny):
    run = set_up(tiny(**SIZES, **meshed(1, 2, 2, 2)), open_source(tiny(), "train"))
    state = run.abstract_state()

    def specs(tree):
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): a.sharding.spec
            for path, a in jax.tree.leaves_with_path(tree)
        }

    params = specs(state["params"])
    assert params["blocks.1.feed_forward.experts.kernel_wide"] == P("expert", None, "tensor")
    assert params["blocks.1.feed_forward.experts.kernel_narrow"] == P("expert", "tensor", None)
    assert params["blocks.1.attention.query.kernel"] == P("fsdp", "tensor", None)
    assert params["blocks.1.attention.out.kernel"] == P("tensor", None, "fsdp")
    assert params["head.kernel"] == P("fsdp", "tensor")
    assert params["blocks.1.feed_forward.router.kernel"] == P(None, None)
    moments = specs(state["opt_state"])
    for name, spec in params.items():
        for moment in ("mu", "nu"):
            (found,) = [s for n, s in moments.items() if n.endswith(f"{moment}.{name}")]
            assert found == spec, name


@pytest.mark.parametrize("name", ["sgd", "adafactor"])
def test_other_optimizers_keep_the_experts_apart(name, tiny):
    config = tiny(**SIZES, optimizer__name=name, **meshed(1, 1, 8))
    run = set_up(config, open_source(config, "train"))
    for path, a in jax.tree.leaves_with_path(run.abstract_state()["opt_state"]):
        if "kernel_wide" in jax.tree_util.keystr(path) and a.ndim > 1:
            assert a.sharding.spec[0] == "expert", path


@pytest.mark.parametrize("dispatch", ["capacity"])
def test_only_slots_cross_between_experts(dispatch, tiny):
    """Experts: four all-to-alls a layer, forward and backward, and nothing gathered."""
    config = tiny(**SIZES, router__name="sparse_expert_choice", **meshed(1, 1, 8))
    run = set_up(config, open_source(config, "train"))
    with jax.set_mesh(run.mesh):
        lowered = jax.jit(run.train_step).lower(run.abstract_state(), run.abstract_batch())
    text = lowered.compile(QUICK).as_text()
    assert len(re.findall(r" all-to-all\(", text)) == 2 * 4
    assert not re.findall(r" (all-gather|collective-permute|reduce-scatter)\(", text)


def test_there_and_back():
    x = jnp.arange(16 * 8 * 3 * 2.0).reshape(16, 8, 3, 2)
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 1, "expert": 4, "tensor": 1})):
        there, back = jax.jit(lambda x: (to_experts(x), to_groups(to_experts(x))))(x)
    np.testing.assert_array_equal(there, x.swapaxes(0, 1))
    np.testing.assert_array_equal(back, x)
    assert there.sharding.spec[:2] == ("expert", "data")


def test_rows_of_a_process_and_their_places(tiny):
    config = tiny(**SIZES, **meshed(2, 1, 2, 2))
    source = open_source(config, "train")
    run = set_up(config, source)
    np.testing.assert_array_equal(run.rows(16), np.arange(16))  # one process holds them all
    batch = next(run.train_batches(source, 3))
    placed = run.put(batch)
    for key, a in placed.items():
        np.testing.assert_array_equal(a, batch[key])
    assert placed["image"].addressable_shards[0].data.shape[0] == 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"asks for 3 devices \(data=3, .*and there are 8; --config.mesh.data=-1"),
        ({"expert": 3}, "asks for a multiple of 3 devices"),
        ({"expert": -1}, "-1 at most once"),
        ({"expert": 0}, "expected 1 or more each"),
    ],
)
def test_meshes_that_do_not_fit(sizes, message):
    with pytest.raises(UsageError, match=message):
        make_mesh({"data": -1, "fsdp": 1, "expert": 1, "tensor": 1} | sizes)


def test_experts_that_do_not_divide(tiny):
    config = tiny(moe__num_experts="4", **meshed(1, 1, 8))
    with pytest.raises(UsageError, match=r"mesh.expert=8 must divide moe.num_experts=4"):
        set_up(config, open_source(config, "train"))
