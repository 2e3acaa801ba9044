"""The training step against plain formulas: losses, accumulation, averaging, decay, schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe.optimizer import build_optimizer, build_schedule, decayed
from moe.run import open_source, set_up
from moe.step import example_losses, main_label
from tests.moe.conftest import QUICK


@pytest.fixture
def logits():
    return jax.random.normal(jax.random.key(0), (6, 10))


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_softmax_loss_with_smoothing_and_mixup(tiny, logits):
    batch = {
        "label": jnp.arange(6),
        "label_mixed": jnp.arange(6)[::-1],
        "mix": jnp.linspace(0, 1, 6),
    }
    x, mix = log_softmax(np.float64(logits)), np.linspace(0, 1, 6)
    cross = np.array([x[i, i] * mix[i] + x[i, 5 - i] * (1 - mix[i]) for i in range(6)])
    expected = -(0.9 * cross + 0.1 * x.mean(-1))
    losses = example_losses(tiny(), logits, batch, smoothing=0.1)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert main_label(batch).tolist() == [5, 4, 3, 3, 4, 5]


def test_sigmoid_loss(tiny, logits):
    x, label = np.float64(logits), np.arange(6)
    sign = np.where(np.eye(10)[label] > 0, 1, -1)
    expected = np.log1p(np.exp(-sign * x)).sum(-1)
    losses = example_losses(tiny(loss="sigmoid"), logits, {"label": jnp.arange(6)})
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def one_step(config):
    source = open_source(config, "train")
    run = set_up(config, source)
    step = run.jit(run.train_step, compiler_options=QUICK)
    batch = run.put(next(run.train_batches(source, 0)))
    return run.initial_state(), *step(run.initial_state(), batch)


def test_accumulation_gives_the_gradient_of_the_whole_batch(tiny):
    # A router without noise or losses over the whole batch: those differ by micro-batch.
    settings = {"router__name": "sparse_expert_choice", "optimizer__schedule": "constant"}
    settings |= {"optimizer__warmup_steps": "0", "optimizer__name": "sgd", "batch_size": "32"}
    _, whole, sums = one_step(tiny(**settings))
    _, parts, sums_of_parts = one_step(tiny(**settings, optimizer__accumulate="4"))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for name in ("loss", "correct", "grad_norm", "steps"):
        np.testing.assert_allclose(sums[name], sums_of_parts[name], rtol=1e-4)
    np.testing.assert_array_equal(sums["load"]["1"], sums_of_parts["load"]["1"])


def test_the_average_moves_by_its_rate(tiny):
    settings = {"optimizer__ema_decay": "0.9", "optimizer__warmup_steps": "0"}
    before, after, _ = one_step(tiny(**settings))
    mean = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, before["params"], after["params"])
    for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(after["ema"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_only_matrices_decay(tiny):
    run = set_up(tiny(model__position="learned"), open_source(tiny(), "train"))
    names = {
        jax.tree_util.keystr(path, simple=True, separator="."): mask
        for path, mask in jax.tree.leaves_with_path(decayed(run.params))
    }
    assert names["blocks.1.feed_forward.experts.kernel_wide"]
    assert names["blocks.1.feed_forward.router.kernel"] and names["head.kernel"]
    assert not names["blocks.1.feed_forward.experts.bias_wide"]  # a matrix of biases
    assert not names["position"] and not names["norm.scale"]


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_optimizers_step_and_decay(name, tiny):
    config = tiny(optimizer__name=name, optimizer__warmup_steps="0", optimizer__weight_decay="0.5")
    optimizer = build_optimizer(config)
    params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    assert (new["kernel"] < 1).all() and (new["bias"] == 1).all()


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("cosine", {0: 0, 5: 0.5, 10: 1, 60: 0.5, 110: 0}),
        ("linear", {0: 0, 5: 0.5, 10: 1, 60: 0.5, 110: 0}),
        ("rsqrt", {0: 0, 10: 1, 40: 0.5, 90: 1 / 3}),
        ("constant", {0: 0, 10: 1, 110: 1}),
    ],
)
def test_schedules(schedule, values, tiny):
    config = tiny(
        num_steps="110",
        optimizer__schedule=schedule,
        optimizer__warmup_steps="10",
        optimizer__learning_rate="1",
    )
    rate = build_schedule(config)
    for step, value in values.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6)


def test_clipping_bounds_the_step(tiny):
    optimizer = build_optimizer(tiny(optimizer__name="sgd", optimizer__warmup_steps="0"))
    params = {"bias": jnp.zeros(4)}
    state = optimizer.init(params)
    big, _ = optimizer.update({"bias": jnp.full(4, 1e6)}, state, params)
    bigger, _ = optimizer.update({"bias": jnp.full(4, 1e9)}, state, params)
    np.testing.assert_allclose(big["bias"], bigger["bias"], rtol=1e-5)
