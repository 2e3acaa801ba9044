"""Clients with steps of their own: limits in closed form, and the example's table and picture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import local_updates
from examples.clients import Method, descend, fedavg_limit, quadratics
from moe.errors import UsageError

A, C, RATE, STEPS = np.array([1.0, 10.0]), np.array([0.0, 1.0]), 0.02, 5
BEST = 10 / 11


def path_of(method, rounds, x=0.0):
    with jax.enable_x64(True):
        gradients = quadratics(jnp.asarray(A), jnp.asarray(C))
        return np.asarray(descend(gradients, jnp.full(1, x), 2, method, rounds))[:, 0]


def test_fedavg_ends_elsewhere():
    limit = fedavg_limit(A, C, STEPS, RATE)
    assert limit == pytest.approx(0.87496, abs=5e-6)
    assert path_of(Method("", STEPS, RATE), 200)[-1] == pytest.approx(limit, abs=1e-12)
    assert fedavg_limit(A, C, 1, RATE) == pytest.approx(BEST)
    assert path_of(Method("", 1, RATE), 500)[-1] == pytest.approx(BEST, abs=1e-12)


def test_fedlin_ends_at_the_minimiser():
    """Each round leaves 1 - mean(a) mean(q/a) of the error."""
    errors = np.abs(path_of(Method("", STEPS, RATE, True), 41) - BEST)
    q = 1 - (1 - RATE * A) ** STEPS
    factor = 1 - A.mean() * (q / A).mean()
    np.testing.assert_allclose(errors, BEST * factor ** np.arange(42), rtol=1e-3, atol=1e-15)
    assert errors[21] == pytest.approx(3.3e-6, rel=0.01)
    assert errors[41] == pytest.approx(2.2e-11, rel=0.01)


def test_the_minimiser_has_no_gradient():
    data = local_updates.split_by_class(0, 5)
    with jax.enable_x64(True):
        w = local_updates.minimiser(data.x, data.y)
        each = jax.vmap(jax.grad(local_updates.loss), in_axes=(None, 0, 0))(w, data.x, data.y)
        assert np.abs(each.mean(0)).max() < 1e-12 < 1e-3 < np.abs(each).max()


def distance(method, rounds):
    """From the minimiser, of three clients on quadratics of nine unknowns."""
    rng = np.random.default_rng(0)
    m = rng.normal(size=(3, 9, 9)) / 3
    a, b = m @ m.swapaxes(1, 2) + np.eye(9) / 4, rng.normal(size=(3, 9))
    best = np.linalg.solve(a.sum(0), b.sum(0))
    with jax.enable_x64(True):
        gradients = lambda y: jnp.einsum("wij,wj->wi", a, y) - b  # noqa: E731
        path = descend(gradients, jnp.zeros(9), 3, method, rounds)
        return np.linalg.norm(np.asarray(path[-1]) - best)


def test_a_part_of_the_gradients_is_enough_with_ef21():
    """Error feedback ends near, the nearer the lower the rate; without a memory it is far off."""

    def sent(memory, rate=0.02, rounds=1000):
        return distance(Method("", 5, rate, True, 0.3, memory), rounds)

    assert distance(Method("", 5, 0.02, True), 1000) < 1e-10
    assert sent("ef21") < 1e-10
    assert 0.01 < sent("ef") < 0.2 and sent("ef", 0.002, 10000) < 0.2 * sent("ef")
    assert sent("") > 0.3


def test_all_entries_are_the_whole_gradient():
    np.testing.assert_array_equal(
        path_of(Method("", STEPS, RATE, True, 1.0), 9), path_of(Method("", STEPS, RATE, True), 9)
    )


def test_numbers_that_a_client_sends():
    assert Method("", 5, RATE).numbers(650) == 650
    assert Method("", 5, RATE, True).numbers(650) == 1300
    assert Method("", 5, RATE, True, 0.1).numbers(650) == 650 + 2 * 65


def test_clients_have_their_own_classes():
    data = local_updates.split_by_class(0, 2)
    assert data.x.shape == (*data.y.shape, 65) and len(data.x) == 5 and len(data.x_test) == 360
    held = [set(own.tolist()) for own in data.y]
    assert all(len(own) == 2 for own in held) and set.union(*held) == set(range(10))
    np.testing.assert_array_equal(data.x, local_updates.split_by_class(0, 2).x)


@pytest.mark.slow
def test_the_example_writes_its_table_and_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(local_updates, "METHODS", local_updates.METHODS[:1])
    local_updates.main(["--rounds=2", "--seeds=2", "--classes=5", f"--out={tmp_path}"])
    text = (tmp_path / "local_updates.md").read_text()
    assert (
        "| gradient descent | 1 | 0.1 | 650 numbers |" in text and text in capsys.readouterr().out
    )
    assert (tmp_path / "local_updates.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--classes=3", "expected 1, 2 or 5"),
        ("--seeds=1", "expected 2 or more"),
        ("--rounds=x", "invalid int value"),
        ("--config.seed=1", "no settings --config.seed here"),
    ],
)
def test_what_cannot_be_asked_for(flag, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        local_updates.main([flag, f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
