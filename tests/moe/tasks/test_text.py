"""The task text: causality of whole decoders, sums by weight, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe import cli, config
from moe.errors import UsageError
from moe.models.build import moe_layers
from moe.tasks import TASKS
from moe.tasks.flops import attended
from moe.train.run import set_up
from moe.train.step import make_gradient
from routers import ROUTERS
from tests.kinds import each_kind
from tests.moe.conftest import TINY_TEXT, build_model, open_source, quick_jit

T, V = 32, 257
CAUSAL = [name for name, router in ROUTERS.items() if router.causal]
DISPATCHES = ("capacity", "dropless", "dense")
FEW = {"moe__capacity_factor": "0.5", "moe__eval_capacity_factor": "0.5"}
FEW |= {"moe__dropless_bound": "0.5", "data__vocabulary": str(V)}


def packed(seed=0, rows=2):
    """Rows of tokens of which a new document begins at 11 and at 20, with padding from 29."""
    tokens = jax.random.randint(jax.random.key(seed), (rows, T), 0, V)
    place = jnp.arange(T)
    starts = jnp.where(place < 11, 0, jnp.where(place < 20, 11, 20))
    segments = jnp.where(place < 11, 1, jnp.where(place < 20, 2, 3)) * (place < 29)
    whole = [jnp.broadcast_to(a, (rows, T)) for a in (segments, place - starts)]
    return tokens, *whole


def logits_of(settings, *, train):
    """Returns tokens, segments, positions -> logits of a model with random parameters."""
    graphdef, state = nnx.split(build_model(settings, nnx.Rngs(0)))
    key = jax.random.key(1) if train else None

    def forward(state, tokens, segments, positions):
        model = nnx.merge(graphdef, state)
        out = model(tokens, segments=segments, positions=positions, train=train, key=key)
        return model.logits(out.hidden_BTD)

    compiled = quick_jit(forward)
    return lambda *inputs: np.asarray(compiled(state, *inputs))


def looks_ahead(settings, *, train) -> bool:
    """Tells whether a bit of any logit depends on a later token."""
    forward = logits_of(settings, train=train)
    tokens, segments, positions = packed()
    before = forward(tokens, segments, positions)
    for t in (0, 10, 15, 27):
        other = tokens.at[:, t + 1 :].set((tokens[:, t + 1 :] + 7) % V)
        after = forward(other, segments, positions)
        assert (after != before).any()  # the later ones do see it
        if (after[:, : t + 1] != before[:, : t + 1]).any():
            return True
    return False


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("name", each_kind(CAUSAL))
def test_no_bit_of_a_logit_depends_on_a_later_token(name, dispatch, tiny_text):
    settings = tiny_text(**FEW, router__name=name, moe__dispatch=dispatch)
    for train in (True, False):
        assert not looks_ahead(settings, train=train)


def test_the_same_test_catches_a_router_that_looks_ahead(tiny_text, monkeypatch):
    monkeypatch.setattr(ROUTERS["expert_choice"], "why_not_causal", lambda settings: None)
    settings = tiny_text(**FEW, router__name="expert_choice")
    assert looks_ahead(settings, train=True) and looks_ahead(settings, train=False)


@pytest.mark.parametrize("name", each_kind(CAUSAL, quick=("sparse_threshold",)))
def test_a_document_and_a_row_alone_are_as_among_others(name, tiny_text):
    forward = logits_of(tiny_text(**FEW, router__name=name), train=False)
    tokens, segments, positions = packed(rows=4)
    whole = forward(tokens, segments, positions)
    alone = forward(tokens[:1], segments[:1], positions[:1])
    np.testing.assert_allclose(alone[0, :29], whole[0, :29], rtol=0, atol=1e-5)
    for start, end in ((0, 11), (11, 20), (20, 29)):
        length = end - start
        one = jnp.ones((4, length), jnp.int32)
        alone = forward(tokens[:, start:end], one, jnp.broadcast_to(jnp.arange(length), one.shape))
        np.testing.assert_allclose(alone, whole[:, start:end], rtol=0, atol=1e-5)


def unequal_batch():
    """A batch whose rows have from 0 to 32 targets that count."""
    tokens, segments, positions = packed(rows=8)
    place = jnp.arange(T)[None]
    weight = (place < jnp.array([0, 1, 3, 32, 20, 7, 30, 12])[:, None]) * (segments > 0)
    batch = {"tokens": tokens, "targets": jnp.roll(tokens, -1, 1), "segments": segments}
    batch |= {"positions": positions, "weight": jnp.float32(weight)}
    return batch | {"bytes": weight.astype(jnp.int32)}


@pytest.mark.slow
def test_micro_batches_of_unequal_weight_have_one_loss_and_one_gradient(tiny_text):
    settings = {"router__topk__noise": "0", "router__topk__importance": "0"}
    settings |= {"router__topk__load": "0", "model__z_loss": "0.01", "data__vocabulary": str(V)}
    found, batch, task = [], unequal_batch(), TASKS["text"]
    for parts in (1, 2, 4):
        chosen = tiny_text(**settings, optimizer__accumulate=str(parts))
        graphdef, params = nnx.split(build_model(chosen, nnx.Rngs(0)))
        params = nnx.to_pure_dict(params)
        sums = functools.partial(task.sums, chosen)
        compute = quick_jit(make_gradient(sums, graphdef, parts))
        grads, sums = compute(params, batch, jax.random.key(0))
        found.append((grads, task.scalars(jax.device_get(sums))))
    for grads, scalars in found[1:]:
        assert scalars == pytest.approx(found[0][1], rel=1e-5)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(found[0][0]), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


def test_scalars_are_of_text_alone():
    totals = {"loss": 12.0, "weight": 8.0, "correct": 2.0, "nats_of_text": 6 * np.log(2)}
    found = TASKS["text"].scalars(totals | {"bytes": 4.0})
    assert found == pytest.approx(
        {"bits_per_byte": 1.5, "loss": 1.5, "perplexity": np.exp(1.5), "accuracy": 0.25}
    )
    assert "bits_per_byte" not in TASKS["text"].scalars(totals | {"bytes": 0.0})


def test_the_evaluation_counts_every_byte_once(tiny_text):
    settings = tiny_text()
    source = open_source(settings, "test[:1]")
    run = set_up(settings, source)
    params = run.initial_state()["params"]
    batches = list(run.eval_batches(source))
    step = run.jit(run.eval_step)
    sums = [jax.device_get(step(params, run.put(batch))) for batch in batches]
    expected = source.token_bytes[np.asarray(source.tokens[1:])].sum()
    assert sum(s["bytes"] for s in sums) == expected
    assert sum(s["weight"] for s in sums) == len(source.tokens) - 1
    assert sum(s["examples"] for s in sums) == source.windows(T)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"router.name": "expert_choice"}, "looks ahead in a text.*topk"),
        ({"router.name": "sparse_expert_choice"}, "looks ahead in a text.*sparse_topk"),
        ({"router.name": "soft_moe"}, "looks ahead in a text"),
        ({"router.topk.batch_priority": "true"}, "looks ahead in a text.*batch_priority"),
        ({"moe.group_size": "2"}, "moe.group_size=2 must be 1 in a causal model"),
        ({"model.kv_heads": "3"}, "kv_heads=3 does not divide num_heads=2"),
        ({"model.head_dim": "5"}, "head_dim=5 must be even"),
        ({"data.augment.crop": "1"}, "unknown key config.data.augment.crop"),
        ({"model.patch_size": "4"}, "unknown key config.model.patch_size"),
        ({"task": "images"}, "--config.task=images: this config is of the task 'text'"),
    ],
)
def test_what_does_not_fit_a_text(overrides, message):
    with pytest.raises(UsageError, match=message):
        cli.apply(config.default("text"), TINY_TEXT | overrides)


def test_a_dense_model_may_have_any_router(tiny_text):
    assert tiny_text(router__name="soft_moe", moe__dense="true").moe.dense


def test_another_tokenizer_is_refused(tiny_text):
    source = open_source(tiny_text(), "train[:2%]")
    with pytest.raises(UsageError, match=r"data.vocabulary=256 is less than the 257 tokens"):
        set_up(tiny_text(data__vocabulary="256"), source)
    known = set_up(tiny_text(), source).config.data.tokenizer
    assert set_up(tiny_text(data__tokenizer=known), source).config.data.vocabulary == V
    with pytest.raises(UsageError, match=r"has another tokenizer .* than the model was made for"):
        set_up(tiny_text(data__tokenizer="0123456789abcdef"), source)


def test_layers_but_the_first():
    assert moe_layers("from-1", 4) == {1, 2, 3} and moe_layers("from-0", 2) == {0, 1}
    with pytest.raises(UsageError, match="fits no model of 2 blocks"):
        moe_layers("from-2", 2)


def test_flops_are_those_of_the_program(tiny_text):
    """XLA's count of the forward pass; a short row, so that the blocks of attention are whole."""
    settings = {"data__seq_len": "4", "model__width": "64", "model__mlp_dim": "256"}
    settings |= {"moe__layers": "1", "moe__dispatch": "dense", "moe__expert_dim": "32"}
    chosen = tiny_text(**settings, data__vocabulary="512", model__chunk="32")
    graphdef, params = nnx.split(nnx.eval_shape(lambda: build_model(chosen, nnx.Rngs(0))))
    task, rows = TASKS["text"], 8

    def forward(params, batch):
        return task.sums(chosen, nnx.merge(graphdef, params), batch, train=True)[0]["loss"]

    lowered = jax.jit(forward).lower(params, task.batch(chosen, rows))
    counted = task.flops(chosen)
    assert lowered.cost_analysis()["flops"] / rows == pytest.approx(counted.computed, rel=0.08)
    assert counted.experts < counted.slots == 2 * counted.experts  # all of 4 experts, K = 2


def test_pairs_that_attend():
    for tokens, window in ((5, 0), (5, 2), (5, 9), (1, 1)):
        see = [min(t + 1, window or tokens) for t in range(tokens)]
        assert attended(tokens, window) == sum(see)
