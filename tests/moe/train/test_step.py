"""The training step against plain formulas: losses, accumulation, averaging, decay, schedules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe.tasks.classification import losses as example_losses
from moe.tasks.classification import main_label
from moe.train.optimizer import DIRECTIONS, build_optimizer, build_schedule, decayed
from moe.train.run import set_up
from moe.train.step import make_gradient
from tests.moe.conftest import QUICK, open_source


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
    losses = example_losses("softmax", logits, batch, smoothing=0.1)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert main_label(batch).tolist() == [5, 4, 3, 3, 4, 5]


def test_sigmoid_loss(tiny, logits):
    x, label = np.float64(logits), np.arange(6)
    sign = np.where(np.eye(10)[label] > 0, 1, -1)
    expected = np.log1p(np.exp(-sign * x)).sum(-1)
    losses = example_losses("sigmoid", logits, {"label": jnp.arange(6)})
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


@pytest.mark.slow
def test_micro_batches_give_the_mean_of_their_own_auxiliary_losses(tiny):
    settings = {"router__name": "topk", "router__topk__noise": "0", "router__topk__load": "0"}
    settings |= {"router__topk__balance": "10", "router__topk__z": "1", "batch_size": "32"}
    settings |= {"model__depth": "1", "moe__layers": "0"}
    config = tiny(**settings, optimizer__accumulate="4")
    source = open_source(config, "train")
    run = set_up(config, source, jax.devices()[:1])
    params, batch = run.initial_state()["params"], next(run.train_batches(source, 0))

    def router_gradient(parts, batch):
        sums = functools.partial(run.task.sums, config)
        compute = run.jit(make_gradient(sums, run.graphdef, parts), compiler_options=QUICK)
        gradient, _ = compute(params, batch, jax.random.key(0))
        return gradient["blocks"]["0"]["feed_forward"]["router"]["kernel"]

    quarters = [{name: a[part::4] for name, a in batch.items()} for part in range(4)]
    alone = [router_gradient(1, quarter) for quarter in quarters]
    np.testing.assert_allclose(router_gradient(4, batch), sum(alone) / 4, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.slow
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


@pytest.mark.parametrize("name", list(DIRECTIONS))
@pytest.mark.parametrize("rate", [0.1, 0.0])
def test_decay_multiplies_a_matrix_by_one_minus_rate_times_decay_a_step(name, rate, tiny):
    config = tiny(
        num_steps="8",
        optimizer__name=name,
        optimizer__learning_rate=str(rate),
        optimizer__warmup_steps="3",
        optimizer__weight_decay="0.5",
    )
    optimizer, schedule = build_optimizer(config.optimizer, 8), build_schedule(config.optimizer, 8)
    params = {"kernel": jnp.full((4, 4), 2.0), "bias": jnp.ones(4)}
    zero, state, expected = jax.tree.map(jnp.zeros_like, params), optimizer.init(params), 2.0
    for step in range(6):
        updates, state = optimizer.update(zero, state, params)
        params = optax.apply_updates(params, updates)
        expected *= 1 - float(schedule(step)) * 0.5
    np.testing.assert_allclose(params["kernel"], expected, rtol=1e-6)
    np.testing.assert_array_equal(params["bias"], 1)


@pytest.mark.parametrize("name", list(DIRECTIONS))
def test_decay_is_added_to_the_step_that_the_gradient_alone_makes(name, tiny):
    def walk(decay):
        config = tiny(
            optimizer__name=name,
            optimizer__schedule="constant",
            optimizer__warmup_steps="0",
            optimizer__learning_rate="0.1",
            optimizer__weight_decay=decay,
        )
        optimizer = build_optimizer(config.optimizer, config.num_steps)
        params = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]])}
        grads = {"kernel": jnp.array([[0.3, 0.1], [-0.2, 0.4]])}
        state = optimizer.init(params)
        first, state = optimizer.update(grads, state, params)
        second, _ = optimizer.update(grads, state, params)
        return params["kernel"], first["kernel"], second["kernel"]

    kernel, *plain = walk("0")
    _, *decayed_steps = walk("0.5")
    for without, with_decay in zip(plain, decayed_steps, strict=True):
        np.testing.assert_allclose(with_decay, without - 0.1 * 0.5 * kernel, rtol=1e-5, atol=1e-7)


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
    rate = build_schedule(config.optimizer, 110)
    for step, value in values.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6)


def test_clipping_bounds_the_step(tiny):
    section = tiny(optimizer__name="sgd", optimizer__warmup_steps="0").optimizer
    optimizer = build_optimizer(section, 8)
    params = {"bias": jnp.zeros(4)}
    state = optimizer.init(params)
    big, _ = optimizer.update({"bias": jnp.full(4, 1e6)}, state, params)
    bigger, _ = optimizer.update({"bias": jnp.full(4, 1e9)}, state, params)
    np.testing.assert_allclose(big["bias"], bigger["bias"], rtol=1e-5)


def to_nan(tree):
    return jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), tree)


OPTIMIZERS_THAT_FAIL = {
    "an update that is not finite": optax.stateless(lambda updates, _: to_nan(updates)),
    "a moment that overflows": optax.GradientTransformation(
        lambda params: jnp.float32(3e38),
        lambda updates, moment, params: (jax.tree.map(jnp.zeros_like, updates), 2 * moment),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("failure", OPTIMIZERS_THAT_FAIL)
def test_an_update_that_is_not_finite_is_refused_where_the_gradient_is_finite(failure, tiny):
    config = tiny(nonfinite="skip", optimizer__ema_decay="0.9", model__depth="1", moe__layers="0")
    source = open_source(config, "train")
    run = set_up(config, source, jax.devices()[:1])
    run.optimizer = optax.chain(run.optimizer, OPTIMIZERS_THAT_FAIL[failure])
    state = run.initial_state()
    batch = run.put(next(run.train_batches(source, 0)))
    new, sums = run.jit(run.train_step, compiler_options=QUICK)(state, batch)
    assert float(sums["skipped"]) == 1 and float(sums["steps"]) == 0 and int(new["step"]) == 1
    for name in ("params", "opt_state", "ema"):
        for a, b in zip(jax.tree.leaves(state[name]), jax.tree.leaves(new[name]), strict=True):
            np.testing.assert_array_equal(a, b)
