"""What routers remember from step to step: the same however a run is laid out, cut or looked at."""

import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from moe.evaluate.evaluation import evaluate_run
from moe.nn import memory
from moe.store.checkpoint import named
from moe.train.calibration import calibrate
from moe.train.run import set_up
from moe.train.trainer import train
from routers import ROUTERS, RouterState
from tests.moe.conftest import open_source

ANNEALED = {
    "router.sparse_topk.final_strength": "0.1",
    "router.sparse_budget.final_strength": "0.1",
}
# The losses of a batch's statistics are micro-batches' own, and noise has another key in each.
PLAIN = {"router.topk.noise": "0", "router.topk.load": "0"}
for name in ("topk", "sparse_topk", "sparse_budget", "lapsum_budget", "exactly_k"):
    PLAIN[f"router.{name}.importance"] = "0"
PLAIN |= {"router.top_p.balance": "0", "router.threshold.sparsity": "0"}
# Small steps: with ten times as large ones 20 of them carry roundings of the parameters past 1e-6.
DEEP = {"model.depth": "4", "moe.layers": "every-2", "optimizer.learning_rate": "0.001"}


def remembers(name, settings=ANNEALED):
    own = {k.rpartition(".")[2]: float(v) for k, v in settings.items() if f".{name}." in k}
    router = ROUTERS[name](4, 4, 2, rngs=nnx.Rngs(0), **own)
    return bool(jax.tree.leaves(nnx.state(router, RouterState)))


REMEMBER = [name for name in ROUTERS if remembers(name)]
SAME = {"step": None, "split": None, "overrides": {}}  # evaluation as it is
QUICK = ("sparse_threshold",)


def each(names):
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


def configured(tiny, name, **settings):
    settings = PLAIN | ANNEALED | DEEP | {"router.name": name} | settings
    return tiny(**{key.replace(".", "__"): value for key, value in settings.items()})


def after(config, steps, devices=None):
    """Returns what the routers remember after some steps, by single blocks."""
    source = open_source(config, "train")
    run = set_up(config, source, devices)
    state = calibrate(run, run.initial_state(), source)
    step, batches = run.jit(run.train_step), run.train_batches(source, 0)
    for _ in range(steps):
        state, _ = step(state, run.put(next(batches)))
    found = {}
    for router in memory.routers(nnx.merge(run.graphdef, run.variables)):
        values = state["routers"]
        for key in router.path:
            values = values[key]
        for turn, number in enumerate(router.numbers):
            for key, value in values.items():
                value = np.asarray(value)
                found[number, key] = value[turn] if len(router.numbers) > 1 else value
    return found


@pytest.mark.parametrize("name", each(REMEMBER))
def test_is_the_same_on_every_mesh_in_micro_batches_and_in_loops(name, tiny):
    one = jax.devices()[:1]
    steps = 20 if name not in QUICK else 5
    start, plain = (after(configured(tiny, name), n, one) for n in (0, steps))
    assert len({number for number, _ in plain}) == 2
    learns = name not in ("hash", "random")  # which only keep their salt
    assert learns == any((plain[key] != start[key]).any() for key in plain)
    loop, parts = {"model.scan": "true", "model.remat": "full"}, {"optimizer.accumulate": "4"}
    others = {"all": loop | parts | {"mesh.expert": "2"}}
    if name not in QUICK:
        others |= {"loop": loop, "parts": parts, "mesh": {"mesh.expert": "2"}}
    for layout, settings in others.items():
        devices = jax.devices()[:4] if "mesh.expert" in settings else one
        other = after(configured(tiny, name, **settings), steps, devices)
        assert other.keys() == plain.keys()
        for key in plain:
            message = f"{layout} {key}"
            np.testing.assert_allclose(
                other[key], plain[key], rtol=1e-6, atol=1e-6, err_msg=message
            )


@pytest.mark.slow
@pytest.mark.parametrize("name", REMEMBER)
def test_a_refused_step_leaves_it_as_it_was(name, tiny):
    config = configured(tiny, name)
    source = open_source(config, "train")
    run = set_up(config, source)
    batch, state = run.put(next(run.train_batches(source, 0))), run.initial_state()
    new, _ = run.jit(run.train_step)(state, batch, True)
    for before, now in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
        np.testing.assert_array_equal(before, now)


@pytest.mark.slow
@pytest.mark.parametrize("name", REMEMBER)
def test_a_run_goes_on_with_it_to_the_bit_and_evaluation_leaves_it(name, tiny, tmp_path):
    settings = {"num_steps": "8", "checkpoint.every": "3", "checkpoint.keep": "9"}
    settings |= {"eval.every": "4", "optimizer.ema_decay": "0.9"}
    config = configured(tiny, name, **settings)
    train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / str(step))
    train(config, tmp_path / "cut")
    whole, cut = (saved(tmp_path / name) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and any(key.startswith("routers.") for key in whole)
    for key in whole:
        np.testing.assert_array_equal(whole[key], cut[key], err_msg=key)

    one, two = (evaluate_run(tmp_path / "whole", **SAME) for _ in range(2))
    assert one["loss"] == two["loss"]
    again = saved(tmp_path / "whole")
    assert all(again[key].tobytes() == whole[key].tobytes() for key in whole)


def saved(workdir):
    """Returns the arrays of a run's last checkpoint."""
    from moe.config import from_json
    from moe.store.checkpoint import Checkpoints

    run = set_up(from_json((workdir / "config.json").read_text()))
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    state, _, damaged = checkpoints.restore_newest(run.abstract_state())
    assert not damaged
    return {key: np.asarray(value) for key, value in named(state).items()}


@pytest.mark.slow
def test_a_run_from_another_takes_what_the_same_router_remembers(tiny, tmp_path):
    settings = {"num_steps": "4", "optimizer.warmup_steps": "0"}
    train(configured(tiny, "loss_free", **settings), tmp_path / "first")
    start = {"init.workdir": str(tmp_path / "first"), **settings, "num_steps": "1"}
    zero = {"router.loss_free.rate": "0"}
    train(configured(tiny, "loss_free", **start, **zero), tmp_path / "same")
    first, same = saved(tmp_path / "first"), saved(tmp_path / "same")
    biases = [key for key in first if key.startswith("routers.")]
    assert len(biases) == 2
    for key in biases:
        assert first[key].any() and (first[key] == same[key]).all()
    train(configured(tiny, "quantile", **start), tmp_path / "other")
    other = saved(tmp_path / "other")
    assert all((other[key] != first[key]).any() for key in biases)
