"""A step that is not finite is never applied: the run stops and says why, or goes on without it."""

import jax
import numpy as np
import pytest

import moe.run
from moe.checkpoint import Checkpoints
from moe.errors import UsageError
from moe.evaluate import training_scalars
from moe.progress import Progress
from moe.records import read
from moe.run import open_source, set_up
from moe.trainer import train
from tests.moe.conftest import QUICK

BAD = 7  # the step, counted from 1, whose images are broken


@pytest.fixture
def broken_batch(monkeypatch):
    real = moe.run.train_batches

    def batches(source, *, start_step, **settings):
        for step, batch in enumerate(
            real(source, start_step=start_step, **settings), start_step + 1
        ):
            if step == BAD:
                batch = batch | {"image": np.full_like(batch["image"], np.nan)}
            yield batch

    monkeypatch.setattr(moe.run, "train_batches", batches)


def test_stops_and_says_why(broken_batch, tiny, tmp_path):
    with pytest.raises(UsageError) as error:
        train(tiny(), tmp_path / "run")
    text = str(error.value)
    assert f"step {BAD} is not finite, and was not applied: gradients of blocks.0." in text
    assert "more (of" in text and "the last good checkpoint is of step 4" in text
    assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps() == [4]
    assert [row["step"] for row in read(tmp_path / "run" / "metrics.jsonl")] == [5]


def test_skips_and_counts(broken_batch, tiny, tmp_path):
    """Also a run that had stopped there goes on, by the one key."""
    with pytest.raises(UsageError):
        train(tiny(), tmp_path / "run")
    train(tiny(nonfinite="skip"), tmp_path / "run")
    rows = [row for row in read(tmp_path / "run" / "metrics.jsonl") if "train/loss" in row]
    assert [row["train/skipped"] for row in rows] == [0, 1, 0, 0, 0]
    assert all(np.isfinite(row["train/loss"]) for row in rows)


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
    with pytest.raises(UsageError, match="expected stop or skip"):
        train(tiny(nonfinite="ignore"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_row_of_skipped_steps_has_no_other_number(capsys):
    row = training_scalars({"steps": np.zeros(()), "skipped": np.float32(5)}, 16)
    assert row == {"train/skipped": 5.0}
    Progress(0, 10, 16).update(5, row)
    assert "every step skipped" in capsys.readouterr().out
