"""Mixture of depths by flag: what the plain model is, what is refused, and what a run carries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe import cli, config
from moe.errors import UsageError
from moe.store.checkpoint import named
from moe.store.huggingface import families
from moe.tasks import TASKS, task_of
from moe.train.origins import origin_of_each
from moe.train.run import set_up
from tests.moe.conftest import TINY, TINY_TEXT, build_model

IMAGE = {"data__image_size": "8", "data__channels": "1", "data__num_classes": "10"}
PLAIN = IMAGE | {"moe__layers": "none"}
T = 5  # four patches and the class token


def program(settings):
    """The model as text, with its loss and all, and its first parameters."""
    run = set_up(settings, devices=jax.devices()[:1])
    model = nnx.eval_shape(lambda: build_model(run.config, nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.float32)

    def forward(state, images, key):
        return nnx.merge(graphdef, state)(images, train=True, key=key)

    text = jax.make_jaxpr(forward)(state, images, jax.random.key(0))
    return str(text), run


@pytest.mark.parametrize("router", ["sparse", "topk"])
def test_capacity_1_is_the_plain_model_to_the_bit(router, tiny):
    """It is the same program of the same parameters, so the same run; also as a loop."""
    skipping = {"depth__layers": "0,1", "depth__router": router}
    for scan in ("false", "true"):
        plain, one = program(tiny(**PLAIN, model__scan=scan))
        for capacity in ("1", "0.9"):  # 0.9 of 5 tokens are all 5
            own = skipping | {"depth__capacity": capacity, "model__scan": scan}
            whole, run = program(tiny(**PLAIN, **own))
            assert whole == plain
            assert jax.tree.structure(run.variables) == jax.tree.structure(one.variables)
            assert task_of(run.config).flops(run.config) == one.task.flops(one.config)
        own |= {"depth__capacity": "0.6"}
        assert program(tiny(**PLAIN, **own))[0] != plain


def test_the_other_parameters_begin_as_those_of_the_plain_model(tiny):
    def begins(**settings):
        run = set_up(tiny(**PLAIN, **settings), devices=jax.devices()[:1])
        return named(run.initial_state()["params"])

    plain, skipping = begins(), begins(depth__layers="1")
    assert skipping.keys() - plain.keys() == {"blocks.1.skip.router.kernel"}
    for name in plain:
        np.testing.assert_array_equal(plain[name], skipping[name])


def test_a_run_starts_from_a_dense_one_and_back(tiny):
    plain = set_up(tiny(**PLAIN), devices=jax.devices()[:1])
    settings = {"depth__layers": "0,1", "depth__router": "threshold", "model__scan": "true"}
    skipping = set_up(tiny(**PLAIN, **settings), devices=jax.devices()[:1])
    there = origin_of_each(skipping, plain)
    new = {f"blocks.{n}.skip.router.{name}" for n in (0, 1) for name in ("kernel", "bias")}
    assert {name for name, origin in there.items() if origin == "new"} == new
    assert "new" not in origin_of_each(plain, skipping).values()


def test_a_skipped_block_counts_its_slots(tiny, tiny_text):
    """By hand: 2 of 5 tokens of width 16 in the second of two blocks, and its scores."""
    chosen = tiny(**PLAIN, depth__layers="1", depth__capacity="0.4")
    flops = task_of(chosen).flops(chosen)
    assert flops.attention == sum(8 * n * 16**2 + 4 * n**2 * 16 for n in (T, 2))
    assert flops.mlp == (T + 2) * 4 * 16 * 32 and flops.router == 2 * T * 16
    text = {"depth__layers": "1", "depth__router": "threshold", "depth__bound": "0.25"}
    text |= {"moe__layers": "none", "data__vocabulary": "257"}
    chosen = tiny_text(**text)  # 8 of 32 tokens
    flops = TASKS["text"].flops(chosen)
    pairs = 32 * 33 // 2 + 8 * 9 // 2
    assert flops.mlp == (32 + 8) * 6 * 16 * 32 and flops.router == 2 * 32 * 16
    assert flops.attention == 4 * 40 * 16 * 8 * (2 + 1) + 4 * 2 * 8 * pairs


@pytest.mark.parametrize(
    ("task", "overrides", "message"),
    [
        ("text", {"depth.router": "topk"}, "'topk' looks ahead in a text: .*; threshold does not"),
        ("text", {"depth.router": "sparse"}, "'sparse' looks ahead in a text: .*; threshold"),
        (
            "text",
            {"depth.router": "threshold", "depth.eval_bound": "0.5"},
            "eval_bound=0.5 must be 1 in a causal model",
        ),
        ("images", {"depth.layers": "0,1"}, "has blocks with experts in it .1.: skip others"),
        ("images", {"depth.layers": "0,7"}, "depth.layers='0,7' fits no model of 2 blocks"),
        (
            "images",
            {"depth.router": "topk", "depth.bound": "0.5"},
            "are of sparse and threshold: topk takes exactly its capacity",
        ),
        ("images", {"depth.capacity": "0"}, "config.depth.capacity=0.*a number in .0, 1"),
        ("images", {"depth.capacity": "1.1"}, "config.depth.capacity=1.1.*a number in .0, 1"),
        ("images", {"depth.router": "sparce"}, "'sparce' is unknown.*did you mean sparse"),
    ],
)
def test_what_does_not_fit(task, overrides, message):
    tiny = TINY if task == "images" else TINY_TEXT
    with pytest.raises(UsageError, match=message):
        cli.apply(config.default(task), tiny | {"depth.layers": "0"} | overrides)


def test_a_dense_stand_in_may_be_skipped(tiny):
    chosen = tiny(**IMAGE, moe__dense="true", depth__layers="1", depth__capacity="0.4")
    whole = tiny(**IMAGE, moe__dense="true")
    less, more = (task_of(c).flops(c) for c in (chosen, whole))
    assert less.experts == more.experts * 2 / T and less.mlp == more.mlp


@pytest.mark.parametrize("task", ["images", "text"])
def test_no_published_family_has_it(task, tiny, tiny_text):
    own = {"depth__layers": "1", "depth__router": "threshold"}
    text = {"moe__layers": "none", "data__vocabulary": "257"}
    chosen = tiny(**PLAIN, **own) if task == "images" else tiny_text(**text, **own)
    with pytest.raises(UsageError, match=r"needs .*--format=plain"):
        families.of_run(config.flatten(chosen), None)
    if task == "images":
        with pytest.raises(UsageError, match=r"vit needs depth.layers='none', not '1'"):
            families.of_run(config.flatten(chosen), "vit")
