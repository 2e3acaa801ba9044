"""A step that is not finite is never applied: the run stops and says why, or goes on without it."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import moe.train.run
from moe.errors import UsageError
from moe.store.checkpoint import Checkpoints
from moe.store.records import read
from moe.tasks import TASKS
from moe.train.measure import training_scalars
from moe.train.nonfinite import state_check
from moe.train.progress import Progress
from moe.train.run import set_up
from moe.train.trainer import train
from tests.moe import launch
from tests.moe.conftest import QUICK, open_source

BAD = 7  # the step, counted from 1, whose images are broken


@pytest.fixture
def broken_batch(monkeypatch):
    """Returns a list: a step in it gets a SIGTERM too."""
    real, stops = moe.train.run.Run.train_batches, []

    def batches(self, source, start_step):
        for step, batch in enumerate(real(self, source, start_step), start_step + 1):
            if step == BAD:
                batch = batch | {"image": np.full_like(batch["image"], np.nan)}
            if step in stops:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(moe.train.run.Run, "train_batches", batches)
    return stops


def test_stops_and_says_why(broken_batch, tiny, tmp_path):
    with pytest.raises(UsageError) as error:
        train(tiny(), tmp_path / "run")
    text = str(error.value)
    assert f"step {BAD} is not finite, and was not applied: gradients of blocks.0." in text
    assert "more (of" in text and "the last good checkpoint is of step 4" in text
    assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps() == [4]
    assert [row["step"] for row in read(tmp_path / "run" / "metrics.jsonl")] == [5]


@pytest.mark.slow
def test_each_setting_goes_on_after_the_other(broken_batch, tiny, tmp_path):
    """With the skipped step among those whose record is still to be written."""
    with pytest.raises(UsageError):
        train(tiny(), tmp_path / "stop")
    train(tiny(nonfinite="skip"), tmp_path / "stop")
    broken_batch.append(BAD + 1)
    with pytest.raises(SystemExit):
        train(tiny(nonfinite="skip"), tmp_path / "skip")
    broken_batch.clear()
    train(tiny(nonfinite="stop"), tmp_path / "skip")
    rows = [row for row in launch.rows(tmp_path / "stop") if "train/loss" in row]
    assert [row["train/skipped"] for row in rows] == [0, 1, 0, 0, 0]
    assert all(np.isfinite(row["train/loss"]) for row in rows)
    assert launch.rows(tmp_path / "skip") == launch.rows(tmp_path / "stop")
    ours, theirs = (launch.arrays(tmp_path / name, 24) for name in ("stop", "skip"))
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), name


@pytest.mark.slow
def test_an_update_that_is_not_finite(tiny, tmp_path, monkeypatch):
    """Although the gradients are: the optimizer divides by zero at step 3."""
    real = moe.train.run.build_optimizer

    def broken(section, steps):
        def update(updates, count, params=None):
            return jax.tree.map(lambda u: jnp.where(count == 2, u / 0, u), updates), count + 1

        bad = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
        return optax.chain(real(section, steps), bad)

    monkeypatch.setattr(moe.train.run, "build_optimizer", broken)
    with pytest.raises(
        UsageError, match=r"step 3 is not finite.*: the new params.*, though all grad"
    ):
        train(tiny(checkpoint__every="2"), tmp_path)
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == [2]
    for name, array in launch.arrays(tmp_path, 2).items():
        assert np.isfinite(array).all(), name


@pytest.mark.slow
def test_what_is_not_finite_is_not_saved(tiny, tmp_path):
    config = tiny()
    run = set_up(config, open_source(config, "train"), jax.devices()[:1])
    check, checkpoints = state_check(run), Checkpoints(tmp_path)
    state = {"step": jnp.int32(3), "ema": {"a": jnp.ones(2), "b": jnp.ones(3)}}
    check(3, state, checkpoints)
    state["ema"]["b"] = state["ema"]["b"].at[1].set(jnp.nan)
    with pytest.raises(UsageError, match=r"step 3 is not finite and is not saved: ema.b \(of 3\)"):
        check(3, state, checkpoints)


@pytest.mark.slow
def test_a_last_evaluation_that_is_not_finite(tiny, tmp_path, monkeypatch):
    def batches(self, source):
        for batch in real(self, source):
            yield batch | {"image": np.full_like(batch["image"], np.nan)}

    real = moe.train.run.Run.eval_batches
    monkeypatch.setattr(moe.train.run.Run, "eval_batches", batches)
    with pytest.raises(UsageError, match="the loss of the evaluation is nan"):
        train(tiny(num_steps="3"), tmp_path)
    assert [list(row) for row in launch.rows(tmp_path) if "eval/loss" in row] == []


@pytest.mark.slow
@pytest.mark.parametrize("what", ["stop", "skip"])
def test_a_refused_step_leaves_the_state_as_it_was(what, tiny):
    config = tiny(nonfinite=what, optimizer__ema_decay="0.9")
    source = open_source(config, "train")
    run = set_up(config, source, jax.devices()[:1])
    step = run.jit(run.train_step, compiler_options=QUICK)
    batches = run.train_batches(source, 0)
    state, sums = step(run.initial_state(), run.put(next(batches)))
    assert float(sums["skipped"]) == 0 and float(sums["steps"]) == 1
    bad = next(batches)
    bad["image"] = np.full_like(bad["image"], np.inf)
    refused, sums = step(state, run.put(bad))
    assert int(refused.pop("step")) == (2 if what == "skip" else 1)
    old = {key: state[key] for key in refused}
    for a, b in zip(jax.tree.leaves(refused), jax.tree.leaves(old), strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(sums.pop("skipped")) == 1
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(sums))


def test_the_key_is_checked(tiny, tmp_path):
    with pytest.raises(UsageError, match="expected stop, skip"):
        train(tiny(nonfinite="ignore"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_row_of_skipped_steps_has_no_other_number(capsys):
    row = training_scalars(TASKS["images"], {"steps": np.zeros(()), "skipped": np.float32(5)})
    assert row == {"train/skipped": 5.0}
    Progress(0, 10, TASKS["images"], 16).update(5, row)
    assert "every step skipped" in capsys.readouterr().out
