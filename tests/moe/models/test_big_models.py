"""Tests what big models need on meshes: micro-batches, and a step in place."""

import jax
import numpy as np
import pytest

from moe.train.run import set_up
from tests.moe.conftest import QUICK, open_source
from tests.moe.train.test_mesh import SIZES, losses, meshed


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2)], ids=str)
def test_micro_batches_take_whole_groups_of_every_device(sizes, tiny):
    """The step of four micro-batches, as on one device, where they are other examples."""
    settings = SIZES | {"batch_size": "64", "moe__group_size": "2", "optimizer__accumulate": "4"}
    found, *_ = losses(tiny(**settings, **meshed(*sizes)), steps=5)
    alone, *_ = losses(tiny(**settings), jax.devices()[:1], steps=5)
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_step_works_in_the_buffers_of_its_state(tiny):
    config = tiny(**SIZES, **meshed(1, 2, 4))
    run = set_up(config, open_source(config, "train"))
    state = run.abstract_state()
    layout = jax.tree.map(lambda a: a.sharding, state)
    step = jax.jit(run.train_step, donate_argnums=0, out_shardings=(layout, None))
    with jax.set_mesh(run.mesh):
        memory = step.lower(state, run.abstract_batch()).compile(QUICK).memory_analysis()
    own = sum(
        a.dtype.itemsize * int(np.prod(a.sharding.shard_shape(a.shape)))
        for a in jax.tree.leaves(state)
    )
    assert memory.alias_size_in_bytes >= own
