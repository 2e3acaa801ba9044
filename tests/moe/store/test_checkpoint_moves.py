"""A checkpoint of one mesh restored on another, and one by a stranger: arrays, and no code."""

import builtins
import importlib
import pickle
import shutil

import jax
import numpy as np
import pytest

from moe import cli, config
from moe.hosts.mesh import AXES
from moe.store.checkpoint import Checkpoints
from moe.train.run import set_up
from tests.moe.conftest import QUICK, TINY, open_source

SIZES = {"moe__num_experts": "8", "optimizer__ema_decay": "0.9", "optimizer__learning_rate": "0.01"}


def on_mesh(tiny, *sizes):
    """The run on data x fsdp x expert x tensor fake devices, and its source."""
    mesh = {f"mesh__{axis}": str(size) for axis, size in zip(AXES, sizes, strict=True)}
    settings = tiny(**SIZES, **mesh)
    source = open_source(settings, "train")
    return set_up(settings, source, jax.devices()[: int(np.prod(sizes))]), source


def one_step(run, source, state, number):
    layout = jax.tree.map(lambda a: a.sharding, run.abstract_state())
    step = run.jit(run.train_step, out_shardings=(layout, None), compiler_options=QUICK)
    return step(state, run.put(next(run.train_batches(source, number))))


@pytest.fixture(scope="module")
def saved(data_dir, tmp_path_factory):
    """Step 1 on data 2 x expert 4: its directory, its arrays, and the loss of step 2."""

    def tiny(**overrides):
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        return cli.apply(config.default(), TINY | {"data.data_dir": str(data_dir)} | dotted)

    directory = tmp_path_factory.mktemp("moves") / "checkpoints"
    run, source = on_mesh(tiny, 2, 1, 4, 1)
    state, _ = one_step(run, source, run.initial_state(), 0)
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, state, {})
    checkpoints.close()
    _, sums = one_step(run, source, state, 1)
    return directory, jax.device_get(state), float(sums["loss"])


SLOW = [pytest.param(s, marks=pytest.mark.slow) for s in ((1, 1, 8, 1), (1, 8, 1, 1), (1, 1, 1, 1))]


@pytest.mark.parametrize("sizes", [(1, 2, 2, 2), *SLOW])
def test_every_leaf_moves_to_another_mesh(sizes, saved, tiny):
    directory, arrays, loss = saved
    run, source = on_mesh(tiny, *sizes)
    checkpoints = Checkpoints(directory, read_only=True)
    state, step, damaged = checkpoints.restore_newest(run.abstract_state())
    assert (step, damaged) == (1, [])
    assert jax.tree.structure(state) == jax.tree.structure(arrays)
    places = jax.tree.map(lambda a: a.sharding, run.abstract_state())
    for here, there, place in zip(*map(jax.tree.leaves, (state, arrays, places)), strict=True):
        assert here.dtype == there.dtype and here.sharding.is_equivalent_to(place, here.ndim)
        np.testing.assert_array_equal(here, there)
    _, sums = one_step(run, source, state, 1)
    assert float(sums["loss"]) == pytest.approx(loss, rel=1e-5)


class Trap:
    """Unpickling it tells."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle of the checkpoint was loaded",))


def test_restoring_executes_no_code(saved, tiny, tmp_path, monkeypatch):
    """Only arrays and JSON are read, whatever else lies in the directory."""
    directory, arrays, _ = saved
    shutil.copytree(directory, tmp_path / "checkpoints")
    run, _ = on_mesh(tiny, 1, 1, 1, 1)
    like = run.abstract_state()
    untrusted = tmp_path / "checkpoints" / "1"
    folders = [untrusted, *(folder for folder in untrusted.iterdir() if folder.is_dir())]
    for folder in folders:
        for name in ("state.pkl", "data.pickle", "aux.npy"):
            (folder / name).write_bytes(pickle.dumps(Trap()))
        (folder / "__init__.py").write_text("raise SystemExit('imported')")
    Checkpoints(directory, read_only=True).restore_newest(like)  # all that is imported late is now

    def refuse(*arguments, **_):
        pytest.fail(f"restoring executed code: {str(arguments)[:200]}")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(importlib, "import_module", refuse)
    monkeypatch.setattr(builtins, "eval", refuse)
    monkeypatch.setattr(builtins, "exec", refuse)
    state, *_ = Checkpoints(tmp_path / "checkpoints", read_only=True).restore_newest(like)
    monkeypatch.undo()
    for here, there in zip(*map(jax.tree.leaves, (state, arrays)), strict=True):
        np.testing.assert_array_equal(here, there)
