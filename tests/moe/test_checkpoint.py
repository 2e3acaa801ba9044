"""Which checkpoints stay, and what comes back from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.checkpoint import BEST_METRIC, Checkpoints
from moe.errors import UsageError


def state(value: float):
    return {
        "params": {"blocks": {0: {"kernel": jnp.full((2, 3), value)}}},
        "opt_state": (jnp.full(3, -value), {"count": jnp.int32(value)}),
        "step": jnp.int32(value),
    }


def test_the_newest_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    accuracies = {1: 0.5, 2: 0.9, 3: None, 4: 0.7, 5: None, 6: 0.8}
    for step, accuracy in accuracies.items():
        checkpoints.save(step, state(step), {} if accuracy is None else {BEST_METRIC: accuracy})
    checkpoints.close()
    again = Checkpoints(tmp_path / "c", keep=2)
    assert again.steps() == [2, 5, 6] and again.best() == 0.9
    restored, step, damaged = again.restore_newest(state(0))
    assert (step, damaged) == (6, [])
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state(6)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(restored) == jax.tree.structure(state(0))
    only = again.restore(2, {"params": state(0)["params"]})
    np.testing.assert_array_equal(only["params"]["blocks"][0]["kernel"], jnp.full((2, 3), 2.0))
    for later in (7, 8, 9):  # the best outlives a restart
        again.save(later, state(later), {BEST_METRIC: 0.1})
    again.close()
    assert Checkpoints(tmp_path / "c", read_only=True).steps() == [2, 8, 9]


def test_saving_while_the_state_moves_on(tmp_path):
    """The files are written in the background, from a copy: donated buffers are reused at once."""
    advance = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    big = {"params": jnp.zeros((512, 512)), "step": jnp.int32(0)}
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    for step in range(1, 31):
        big = advance(big)
        if step % 10 == 0:
            checkpoints.save(step, big, {})
    checkpoints.close()
    again = Checkpoints(tmp_path / "c", read_only=True)
    for step in (10, 20, 30):
        assert (again.restore(step, big)["params"] == step).all()


def test_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    with pytest.raises(UsageError, match=r"no checkpoint in .* can be read"):
        checkpoints.restore_newest(state(0))
    with pytest.raises(UsageError, match="no checkpoint of step 7"):
        checkpoints.restore_newest(state(0), step=7)
