"""Runs of a text on other meshes and processes, killed and resumed: the same tokens and losses."""

import itertools
import random
import time

import jax
import numpy as np
import pytest

from moe.errors import UsageError
from moe.hosts.mesh import AXES
from moe.train.origins import start_from_checkpoint
from moe.train.run import set_up
from moe.train.trainer import train
from tests.moe import launch
from tests.moe.conftest import QUICK, open_source

pytestmark = pytest.mark.slow
STEPS = 20
FACTORS = [s for s in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(s) == 8]
SIZES = {"moe__num_experts": "8", "optimizer__learning_rate": "0.01", "model__num_heads": "4"}
# So many rows for one device that none is dropped there that one device alone would keep.
SIZES |= {"model__kv_heads": "2", "model__width": "32", "moe__dropless_receive": "8"}
LONG = {"num_steps": "60", "checkpoint__every": "7", "log__every": "1", "eval__every": "30"}


def losses(settings, devices=None):
    source = open_source(settings, settings.data.train_split)
    run = set_up(settings, source, devices)
    layout = jax.tree.map(lambda a: a.sharding, run.abstract_state())
    step = run.jit(run.train_step, out_shardings=(layout, None), compiler_options=QUICK)
    state, batches, found = run.initial_state(), run.train_batches(source, 0), []
    for _ in range(STEPS):
        state, sums = step(state, run.put(next(batches)))
        found.append(float(sums["loss"] / sums["weight"]))
    return np.array(found)


@pytest.fixture(scope="module")
def single():
    from moe import cli, config
    from tests.moe.conftest import TINY_TEXT

    found = {}

    def make(dispatch):
        if dispatch not in found:
            settings = {k.replace("__", "."): v for k, v in SIZES.items()}
            settings["moe.dispatch"] = dispatch
            one = cli.apply(config.default("text"), TINY_TEXT | settings)
            found[dispatch] = losses(one, jax.devices()[:1])
        return found[dispatch]

    return make


def test_a_loop_of_blocks_on_a_mesh_is_dropless_too(single, tiny_text):
    mesh = {"mesh__data": "2", "mesh__expert": "4", "model__scan": "true"}
    found = losses(tiny_text(**SIZES, **mesh, moe__dispatch="dropless"))
    np.testing.assert_allclose(found, single("dropless"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dispatch", "sizes"),
    [("capacity", (*factors, 1)) for factors in FACTORS]
    + [("capacity", (1, 2, 2, 2)), ("dropless", (2, 1, 4, 1)), ("dropless", (1, 2, 2, 2))],
)
def test_the_same_losses_on_every_mesh(dispatch, sizes, single, tiny_text):
    mesh = {f"mesh__{axis}": str(size) for axis, size in zip(AXES, sizes, strict=True)}
    found = losses(tiny_text(**SIZES, **mesh, moe__dispatch=dispatch))
    assert found[-1] < found[0] - 0.5  # something is learned
    np.testing.assert_allclose(found, single(dispatch), rtol=0, atol=1e-5)


def kill_at_random(run, workdir, rng):
    """Kills a run after a random step; returns the last one of its log."""
    run.wait_for(workdir, rng.randrange(3, 25))
    time.sleep(rng.random() / 4)
    for process in run.processes:
        process.kill()
    run.finish()
    return launch.rows(workdir)[-1]["step"] if launch.rows(workdir) else 0


def test_a_killed_run_goes_on_to_the_bit(tmp_path):
    rng = random.Random(0)
    unbroken, workdir = tmp_path / "unbroken", tmp_path / "killed"
    launch.succeed(launch.train_text(1, unbroken, **LONG))
    assert 0 < kill_at_random(launch.train_text(1, workdir, **LONG), workdir, rng) < 60
    launch.succeed(launch.train_text(1, workdir, **LONG))
    assert launch.rows(workdir) == launch.rows(unbroken)
    ours, theirs = launch.arrays(workdir, 60), launch.arrays(unbroken, 60)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


def test_a_killed_run_goes_on_with_two_processes(tmp_path):
    rng = random.Random(1)
    unbroken, workdir = tmp_path / "unbroken", tmp_path / "killed"
    launch.succeed(launch.train_text(1, unbroken, **LONG))
    kill_at_random(launch.train_text(1, workdir, **LONG), workdir, rng)
    kill_at_random(launch.train_text(2, workdir, **LONG), workdir, rng)
    launch.succeed(launch.train_text(2, workdir, **LONG))
    ours, theirs = launch.rows(workdir), launch.rows(unbroken)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key in ("train/loss", "train/bits_per_byte", "eval/loss", "eval/bits_per_byte"):
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=0, abs=1e-5), (a["step"], key)


def test_a_dense_text_run_becomes_experts(tmp_path, tiny_text, tiny):
    """Each expert starts as its block's SwiGLU; another vocabulary only makes the embedding new."""
    few = {"num_steps": "2", "moe__expert_dim": "32", "moe__shared_experts": "0"}
    train(tiny_text(**few, moe__layers="none"), tmp_path / "dense")
    settings = tiny_text(**few, init__workdir=str(tmp_path / "dense"))
    run = set_up(settings, open_source(settings, "train[:2%]"))
    state, origin = start_from_checkpoint(run, run.initial_state())
    new = {name for name, source in origin["parameters"].items() if source == "new"}
    assert {name.split(".", 2)[2] for name in new} == {"feed_forward.router.kernel"}
    experts = state["params"]["blocks"]["1"]["feed_forward"]["experts"]
    dense = launch.arrays(tmp_path / "dense", 2)
    for part in ("wide", "gate", "narrow"):
        expected = dense[f"params.blocks.1.feed_forward.{part}.kernel"]
        for expert in np.asarray(experts[f"kernel_{part}"]):
            np.testing.assert_array_equal(expert, expected)
    wider = tiny_text(**few, init__workdir=str(tmp_path / "dense"), data__vocabulary="300")
    run = set_up(wider, open_source(wider, "train[:2%]"))
    origins = start_from_checkpoint(run, run.initial_state())[1]["parameters"]
    assert origins["embedding"] == "new"
    other = tiny(init__workdir=str(tmp_path / "dense"))
    with pytest.raises(UsageError, match="a run of the task 'text', not 'images'"):
        start_from_checkpoint(set_up(other, open_source(other, "train")), None)
