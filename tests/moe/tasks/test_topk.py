"""Training and evaluation with the losses of top-k classification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.errors import UsageError
from moe.evaluate.evaluation import evaluate_run
from moe.nn.cosine import CosineHead
from moe.store.records import read
from moe.store.workdir import saved_config
from moe.tasks import TASKS, classification
from moe.tasks.topk import TopK
from moe.train.run import set_up
from moe.train.trainer import train
from routers import rarity_margins, sparse_topk_loss, topk_hinge_loss
from tests.moe.conftest import open_source

DENSE = {"moe__layers": "none", "model__depth": "1", "num_steps": "4", "eval__every": "4"}
SCORES = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
LABELS = np.arange(6) % 4


def sorted_hinge(scores, labels, k, margins):
    """relu(m_y + s_(k+1) - s_y), by sorting."""
    return np.array(
        [
            max(0, margins[y] + np.sort(s)[-(k + 1)] - s[y])
            for s, y in zip(scores, labels, strict=True)
        ]
    )


def test_hinge_without_noise_is_its_limit():
    key, ones = jax.random.key(0), np.ones(4)
    for counts, margin in (((), 0.0), ((17, 23, 55, 400), 0.3)):
        settings = TopK(k=2, strength=1e-6, largest_margin=margin)
        margins = rarity_margins(counts, margin) if counts else ones
        expected = sorted_hinge(SCORES, LABELS, 2, margins)
        for noise in (None, key):
            found = settings.losses("topk_hinge", jnp.asarray(SCORES), LABELS, counts, noise)
            np.testing.assert_allclose(found, expected, atol=1e-4)
    scaled = TopK(k=2).losses("topk_hinge", 60 * jnp.asarray(SCORES), LABELS, (), None, 60.0)
    np.testing.assert_allclose(scaled, 60 * sorted_hinge(SCORES, LABELS, 2, ones), rtol=1e-4)


def test_mixup_is_the_mean_of_two_labels(tiny):
    batch = {"label": LABELS, "label_mixed": LABELS[::-1].copy(), "mix": np.linspace(0, 1, 6)}
    found = classification.losses_of_labels(
        lambda label: sparse_topk_loss(jnp.asarray(SCORES), label, 2), batch
    )
    first, second = (sparse_topk_loss(SCORES, batch[n], 2) for n in ("label", "label_mixed"))
    np.testing.assert_allclose(found, batch["mix"] * first + (1 - batch["mix"]) * second, rtol=1e-5)


def test_macro_accuracies_count_each_class_alike():
    logits = jnp.asarray([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [1, 3, 2], [3, 1, 2], [9, 9, 9]])
    label, mask = jnp.asarray([0, 0, 0, 1, 1, 2]), jnp.asarray([1.0, 1, 1, 1, 1, 0])
    totals = jax.device_get(classification.sums(logits, label, jnp.zeros(6), mask, k=2))
    values = classification.scalars(totals)
    assert values["accuracy"] == pytest.approx(4 / 5)
    assert values["macro_accuracy"] == pytest.approx((1 + 1 / 2) / 2)  # class 2 has no example
    assert values["top2_accuracy"] == pytest.approx(4 / 5)
    assert values["macro_top2_accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    assert values["top5_accuracy"] == 1


def test_the_cosine_head_knows_angles_alone():
    head = CosineHead(8, 3, scale=60.0, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)
    scores = head(x)
    kernel = np.asarray(head.kernel[...])
    angles = (x / np.linalg.norm(x, axis=1)[:, None]) @ (kernel / np.linalg.norm(kernel, axis=0))
    np.testing.assert_allclose(scores, 60 * angles, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(head(3 * x), scores, rtol=1e-5, atol=1e-4)
    slope = jax.grad(lambda x: nnx.merge(*nnx.split(head))(x).sum())(jnp.zeros((1, 8)))
    assert np.isfinite(slope).all()


def sums_of(config, logits, batch, **phase):
    """The task's sums of a model that answers with these logits."""
    from moe.models.vit import Output

    model = lambda images, **_: Output(jnp.asarray(logits), {})  # noqa: E731
    return TASKS["images"].sums(config, model, batch, **phase)[0]


def test_a_step_draws_noise_and_an_evaluation_does_not(tiny):
    config = tiny(loss="topk_hinge", topk__k="2", topk__strength="0.5")
    logits = np.random.default_rng(1).normal(size=(8, 10)).astype(np.float32)
    batch = {"image": np.zeros((8, 8, 8, 1)), "label": np.arange(8)}
    run = functools.partial(sums_of, config, logits)
    key = jax.random.key(3)
    losses = [float(run(batch, train=True, key=k)["loss"]) for k in (key, key, jax.random.key(4))]
    assert losses[0] == losses[1] != losses[2]
    plain = run(batch | {"mask": jnp.ones(8)}, train=False)
    expected = sorted_hinge(logits, batch["label"], 2, np.ones(10)).sum()
    assert float(plain["loss"]) == pytest.approx(expected, rel=1e-5)
    from_operator = topk_hinge_loss(logits, batch["label"], key, k=2, num_samples=10)
    assert from_operator.shape == (8,)


@pytest.mark.slow
def test_a_run_with_margins_and_a_cosine_head(tiny, tmp_path):
    settings = {"loss": "topk_hinge", "topk__k": "3", "topk__largest_margin": "0.2"}
    settings |= {"topk__strength": "0.01", "model__head": "cosine", "data__augment__mixup": "0.2"}
    train(tiny(**DENSE, **settings), tmp_path / "run")
    counts = saved_config(tmp_path / "run").data.class_counts
    source = open_source(tiny(), "train")
    labels = [source[i]["label"] for i in range(len(source))]
    assert counts == tuple(np.bincount(labels).tolist()) and sum(counts) == 1438
    row = [row for row in read(tmp_path / "run" / "metrics.jsonl") if "eval/loss" in row][-1]
    found = evaluate_run(tmp_path / "run", step=None, split=None, overrides={})
    for name in ("loss", "top3_accuracy", "macro_top3_accuracy", "macro_accuracy"):
        assert found[name] == row[f"eval/{name}"]


def test_what_does_not_fit(tiny):
    source = open_source(tiny(), "train")
    for loss in ("topk", "topk_hinge"):
        for k in ("10", "11"):
            with pytest.raises(UsageError, match=rf"topk.k={k} must be below the 10 classes"):
                set_up(tiny(loss=loss, topk__k=k), source)
        set_up(tiny(loss=loss, topk__k="9"), source)
    set_up(tiny(topk__k="10"), source)
    with pytest.raises(UsageError, match=r"label_smoothing=0.1 is of the losses softmax and"):
        set_up(tiny(loss="topk", optimizer__label_smoothing="0.1"), source)
    with pytest.raises(UsageError, match=r"largest_margin=0.2 is of the loss topk_hinge"):
        set_up(tiny(loss="topk", topk__largest_margin="0.2"), source)
    wrong = tiny(loss="topk_hinge", data__class_counts="(3, 4)")
    with pytest.raises(UsageError, match=r"class_counts has 2 numbers for 10 classes"):
        set_up(wrong, source)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["topk", "topk_hinge"])
def test_every_mesh_has_the_same_losses(loss, tiny):
    from tests.moe.train.test_mesh import SIZES, losses, meshed

    settings = SIZES | {"loss": loss, "topk__k": "2", "model__head": "cosine"}
    settings |= {"router__name": "sparse_expert_choice"}
    found, *_ = losses(tiny(**settings, **meshed(1, 2, 2, 2)), steps=8)
    alone, *_ = losses(tiny(**settings), jax.devices()[:1], steps=8)
    assert found[-1] < found[0]
    np.testing.assert_allclose(found, alone, rtol=2e-5, atol=2e-5)
