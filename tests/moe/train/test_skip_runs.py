"""Runs whose tokens skip blocks: the same on every mesh, in loops, in parts, and after a stop."""

import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from moe.evaluate.evaluation import evaluate_run
from moe.nn import memory
from moe.train.run import set_up
from moe.train.trainer import train
from tests.moe.conftest import QUICK, open_source
from tests.moe.train.test_memory import SAME, saved

pytestmark = pytest.mark.slow
STEPS = 6
DEEP = {"moe__layers": "none", "model__depth": "4", "depth__layers": "every-2"}
DEEP |= {"optimizer__learning_rate": "0.01"}
# The relaxed one anneals, which it remembers; gates close for some tokens, of whom slots are few.
KINDS = {
    "sparse": {"depth__router": "sparse", "depth__capacity": "0.4", "depth__final_strength": "0.1"},
    "topk": {"depth__router": "topk", "depth__capacity": "0.4", "depth__gated": "true"},
    "threshold": {"depth__router": "threshold", "depth__bound": "0.6", "depth__gain": "2"},
}
LAYOUTS = {
    "loop": {"model__scan": "true"},
    "loop, computed again": {"model__scan": "true", "model__remat": "full"},
    "computed again": {"model__remat": "dots"},
    "data": {"mesh__data": "4"},
    "fsdp": {"mesh__fsdp": "4"},
    "expert": {"mesh__expert": "4"},
    "tensor": {"mesh__tensor": "2", "mesh__data": "2"},
    "all": {"mesh__tensor": "2", "mesh__fsdp": "2", "model__scan": "true"},
}


def course(config, devices):
    """The losses of some steps, what is dropped, and what routers remember."""
    source = open_source(config, "train[:2%]" if config.task == "text" else "train")
    run = set_up(config, source, devices)
    layout = jax.tree.map(lambda a: a.sharding, run.abstract_state())
    step = run.jit(run.train_step, out_shardings=(layout, None), compiler_options=QUICK)
    state, batches, found = run.initial_state(), run.train_batches(source, 0), []
    assert memory.routers(nnx.merge(run.graphdef, run.variables))
    for _ in range(STEPS):
        state, sums = step(state, run.put(next(batches)))
        loss = float(sums["loss"] / sums["weight"])
        found.append([loss, float(sums["aux_loss"]), *map(float, sums["dropped"].values())])
    # One array for each block, or one for all turns of a loop.
    found.append([sum(float(np.sum(a)) for a in jax.tree.leaves(state.get("routers", {})))])
    return np.concatenate([np.ravel(row) for row in found])


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_computes_the_same(kind, tiny):
    plain = course(tiny(**DEEP, **KINDS[kind]), jax.devices()[:1])
    for name, settings in LAYOUTS.items():
        count = 4 if any(key.startswith("mesh") for key in settings) else 1
        other = course(tiny(**DEEP, **KINDS[kind], **settings), jax.devices()[:count])
        np.testing.assert_allclose(other, plain, rtol=1e-4, atol=1e-4, err_msg=name)


def test_every_layout_of_a_text_computes_the_same(tiny_text):
    settings = DEEP | KINDS["threshold"] | {"model__window": "9", "model__global_every": "2"}
    plain = course(tiny_text(**settings), jax.devices()[:1])
    for name, layout in LAYOUTS.items():
        count = 4 if any(key.startswith("mesh") for key in layout) else 1
        other = course(tiny_text(**settings, **layout), jax.devices()[:count])
        np.testing.assert_allclose(other, plain, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_are_the_batch(kind, tiny):
    """The loss of gates is a product of two means, and so each micro-batch's own: left out here."""
    settings = DEEP | KINDS[kind] | {"depth__alpha": "0"}
    plain = course(tiny(**settings), jax.devices()[:1])
    parts = course(tiny(**settings, optimizer__accumulate="4"), jax.devices()[:1])
    # The share dropped is weighted by micro-batches' own weights: a mean of the same.
    np.testing.assert_allclose(parts, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_to_the_bit(kind, tiny, tmp_path):
    settings = {"num_steps": "8", "checkpoint__every": "3", "checkpoint__keep": "9"}
    config = tiny(**DEEP, **KINDS[kind], **settings, eval__every="4", model__dropout="0.1")
    train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / str(step))
    train(config, tmp_path / "cut")
    whole, cut = (saved(tmp_path / name) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for key in whole:
        np.testing.assert_array_equal(whole[key], cut[key], err_msg=key)
    result = evaluate_run(tmp_path / "whole", **SAME)
    assert result["layers"].keys() == {1, 3}
    assert all(row["drop_rate"] == 0 for row in result["layers"].values())
    assert (tmp_path / "whole" / "pictures" / "patches.png").exists()
