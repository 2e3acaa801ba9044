"""Which checkpoints stay, and what comes back from them."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from moe.errors import UsageError
from moe.store.checkpoint import Checkpoints, DamagedError, named
from moe.tasks import Metric

ACCURACY = Metric("accuracy", higher=True, form=".2%")


def state(value: float):
    return {
        "params": {"blocks": {0: {"kernel": jnp.full((2, 3), value)}}},
        "opt_state": (jnp.full(3, -value), {"count": jnp.int32(value)}),
        "step": jnp.int32(value),
    }


def test_the_newest_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2, best=ACCURACY)
    accuracies = {1: 0.5, 2: 0.9, 3: None, 4: 0.7, 5: None, 6: 0.8}
    for step, accuracy in accuracies.items():
        checkpoints.save(step, state(step), {} if accuracy is None else {ACCURACY.key: accuracy})
    checkpoints.close()
    again = Checkpoints(tmp_path / "c", keep=2, best=ACCURACY)
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
        again.save(later, state(later), {ACCURACY.key: 0.1})
    again.close()
    assert Checkpoints(tmp_path / "c", read_only=True).steps() == [2, 8, 9]


def test_saving_while_the_state_moves_on(tmp_path):
    """The files are written in the background, from a copy: donated buffers are reused at once."""
    advance = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    big = {"params": jnp.zeros((512, 512)), "step": jnp.int32(0)}
    checkpoints = Checkpoints(tmp_path / "c", keep=3, best=ACCURACY)
    for step in range(1, 31):
        big = advance(big)
        if step % 10 == 0:
            checkpoints.save(step, big, {})
    checkpoints.close()
    again = Checkpoints(tmp_path / "c", read_only=True)
    for step in (10, 20, 30):
        assert (again.restore(step, big)["params"] == step).all()


def test_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", best=ACCURACY)
    with pytest.raises(UsageError, match=r"no checkpoint in .* can be read"):
        checkpoints.restore_newest(state(0))
    with pytest.raises(UsageError, match="no checkpoint of step 7"):
        checkpoints.restore_newest(state(0), step=7)


@pytest.fixture
def three(tmp_path):
    """Checkpoints of steps 1 to 3, the second with an accuracy, and what they hold."""
    rng = np.random.default_rng(0)
    states = {}
    checkpoints = Checkpoints(tmp_path / "c", keep=3, best=ACCURACY)
    for step in (1, 2, 3):
        matrix = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
        states[step] = state(step) | {"ema": {"kernel": matrix}, "totals": {"loss": jnp.ones(())}}
        checkpoints.save(step, states[step], {ACCURACY.key: 0.5} if step == 2 else {})
    checkpoints.close()
    return tmp_path / "c", states


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_flipped_byte_anywhere_is_found_or_changes_nothing(three):
    directory, states = three
    checkpoints = Checkpoints(directory, read_only=True)
    damaged = {}
    for file in sorted((directory / "3").rglob("*")):
        if not file.is_file():
            continue
        good = file.read_bytes()
        for position in sorted({int(i) for i in np.linspace(0, len(good) - 1, 8)}):
            bad = bytearray(good)
            bad[position] ^= 0x10
            file.write_bytes(bad)
            for like in (states[3], {"ema": states[3]["ema"]}):  # as training and evaluation read
                try:
                    assert_equal(checkpoints.restore(3, like), like)
                except DamagedError:
                    damaged[file] = damaged.get(file, 0) + 1
        file.write_bytes(good)
    assert_equal(checkpoints.restore(3, states[3]), states[3])
    largest = max((directory / "3").rglob("*"), key=lambda file: file.stat().st_size)
    assert largest.stat().st_size > 64 * 32 * 3 and damaged[largest] >= 2 * 6


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_damaged_checkpoint_is_passed_over_in_silence(tmp_path, capfd):
    many = {"params": {str(i): jnp.full((300, 30), float(i)) for i in range(60)}}
    checkpoints = Checkpoints(tmp_path / "c", keep=2, best=ACCURACY)
    for step in (1, 2):
        checkpoints.save(step, many, {})
    checkpoints.close()
    for file in (tmp_path / "c" / "2").rglob("d/*"):
        file.unlink()
    restored, step, damaged = Checkpoints(tmp_path / "c", keep=2, best=ACCURACY).restore_newest(
        many
    )
    assert (step, damaged) == (1, [2])
    assert_equal(restored, many)
    gc.collect()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "text", ["", "{}", '"x"', "[1]", "null", '{"eval/accuracy": "x"}', '{"eval/accuracy": NaN}']
)
def test_damaged_metrics_are_no_metrics(text, three):
    directory, states = three
    (directory / "2" / "metrics" / "metrics").write_text(text)
    checkpoints = Checkpoints(directory, keep=2, best=ACCURACY)
    assert checkpoints.steps() == [1, 2, 3] and checkpoints.best() == -np.inf
    checkpoints.reload()
    checkpoints.save(4, states[3], {ACCURACY.key: 0.4})
    for step in (5, 6):
        checkpoints.save(step, states[3], {})
    checkpoints.close()
    assert Checkpoints(directory, read_only=True).steps() == [4, 5, 6]


def test_sums_of_other_quantities_are_left_out(three):
    directory, states = three
    checkpoints = Checkpoints(directory, read_only=True)
    like = states[1] | {"totals": {"loss": jnp.ones(()), "new": jnp.ones(())}}
    restored, step, damaged = checkpoints.restore_newest(like)
    assert (step, damaged, "totals" in restored) == (3, [], False)
    assert_equal(restored, {key: states[3][key] for key in restored})
    like = states[1] | {"totals": {"loss": jnp.ones(2)}}
    assert "totals" not in checkpoints.restore(3, like)


@pytest.mark.parametrize("names", [["loss"], ["loss", "gone"], ["gone"]])
def test_a_checkpoint_of_the_first_version_is_read(names, tmp_path):
    """Its totals are with the rest, and it has no checksums."""
    now = state(3) | {"totals": {"loss": jnp.float32(0.5)}}
    totals = {f"totals.{name}": jnp.float32(0.5) for name in names}
    manager = ocp.CheckpointManager(tmp_path / "c")
    items = {
        "params": ocp.args.StandardSave(named({"params": now["params"]})),
        "training": ocp.args.StandardSave(
            named({key: now[key] for key in ("opt_state", "step")}) | totals
        ),
    }
    manager.save(3, args=ocp.args.Composite(**items))
    manager.close()
    restored, step, damaged = Checkpoints(tmp_path / "c").restore_newest(now)
    assert (step, damaged) == (3, [])
    assert ("totals" in restored) == ("loss" in names)
    assert_equal(restored, {key: now[key] for key in restored})
