"""The vision transformer: where its experts are, what they compute, and what padding may change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.checks import check
from moe.errors import UsageError
from moe.models.build import moe_layers
from moe.nn.memory import split
from moe.tasks import TASKS
from moe.train.step import make_eval_step
from routers import ROUTERS
from tests.jaxprs import float32_precisions
from tests.kinds import each_kind
from tests.moe.conftest import build_model, quick_jit

THREE = ("topk", "sparse_expert_choice", "sparse_threshold")  # each compiles a model


def sized(config):
    config.data.update({"image_size": 8, "channels": 1, "num_classes": 10})
    return config


@pytest.fixture
def images():
    return jax.random.normal(jax.random.key(0), (8, 8, 8, 1))


@pytest.mark.parametrize(
    ("spec", "depth", "layers"),
    [
        ("last-2", 12, {9, 11}),  # V-MoE-S/32 and B: published as the last two of every second
        ("last-2", 8, {5, 7}),
        ("every-2", 6, {1, 3, 5}),
        ("every-1", 3, {0, 1, 2}),
        ("1,3", 4, {1, 3}),
        ("none", 4, set()),
    ],
)
def test_moe_layers(spec, depth, layers):
    assert moe_layers(spec, depth) == layers


@pytest.mark.parametrize(
    "spec", ["last-3", "last-0", "every-9", "4", "-1", "1,1", "some", "last-x"]
)
def test_moe_layers_that_do_not_exist(spec):
    with pytest.raises(UsageError, match=r"moe\.layers=.*expected last-N, every-N"):
        moe_layers(spec, 4)


@pytest.mark.parametrize("name", each_kind(ROUTERS))
@pytest.mark.parametrize("pool", ["cls", pytest.param("mean", marks=pytest.mark.slow)])
def test_gradients_reach_every_parameter(name, pool, tiny, images):
    model = build_model(sized(tiny(router__name=name, model__pool=pool)), nnx.Rngs(0))
    graphdef, params, memory = split(model)

    def loss(params):
        out = nnx.merge(graphdef, params, memory)(images, train=True, key=jax.random.key(1))
        return (out.logits * jnp.arange(10)).sum() + sum(r.aux_loss for r in out.reports.values())

    params["head"]["kernel"][...] += jax.random.normal(jax.random.key(2), (16, 10))
    for path, grad in jax.tree.leaves_with_path(quick_jit(jax.grad(loss))(params)):
        assert jnp.isfinite(grad).all(), path
        # A bias of the keys shifts all scores of a query alike: softmax does not see it.
        # One layer alone has the whole budget.
        name = jax.tree_util.keystr(path)
        exempt = "['key']['bias']" in name or "spending" in name
        assert exempt or jnp.abs(grad).max() > 0, path


@pytest.mark.parametrize("name", each_kind(ROUTERS, quick=THREE))
@pytest.mark.parametrize("group_size", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_padding_changes_nothing(name, group_size, tiny, images):
    config = sized(tiny(router__name=name, moe__group_size=str(group_size)))
    model = build_model(config, nnx.Rngs(0))
    model.head.kernel[...] = jax.random.normal(jax.random.key(2), (16, 10))
    mask = jnp.arange(8) < 6
    forward = quick_jit(lambda images: nnx.merge(*nnx.split(model))(images, mask=mask))
    a, b = forward(images), forward(images.at[6:].set(7.0))
    np.testing.assert_array_equal(a.logits[:6], b.logits[:6])
    np.testing.assert_array_equal(*(next(iter(out.reports.values())).aux_loss for out in (a, b)))
    np.testing.assert_array_equal(a.reports[1].load_E, b.reports[1].load_E)


@pytest.mark.parametrize("name", each_kind(ROUTERS, quick=THREE))
def test_a_prediction_depends_on_its_own_example_alone(name, tiny, images):
    model = build_model(sized(tiny(router__name=name)), nnx.Rngs(0))
    model.head.kernel[...] = jax.random.normal(jax.random.key(2), (16, 10))
    forward = quick_jit(lambda images: nnx.merge(*nnx.split(model))(images).logits)
    together = forward(images)
    for i in (0, 7):
        np.testing.assert_allclose(forward(images[i : i + 1])[0], together[i], rtol=2e-5, atol=2e-5)


def test_bfloat16_computes_low_and_keeps_high(tiny, images):
    model = build_model(sized(tiny(model__dtype="bfloat16")), nnx.Rngs(0))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert model(images).logits.dtype == jnp.float32
    assert model.embed(images).dtype == jnp.bfloat16


def test_dense_counterpart_has_the_flops_of_the_experts(tiny):
    config = sized(tiny(moe__dense="true", router__name="topk"))
    hidden = getattr(build_model(config, nnx.Rngs(0)).blocks, "1").feed_forward.wide.kernel.shape[1]
    moe, k = config.moe, config.router.topk.k
    assert hidden == round(moe.expert_dim * k * moe.capacity_factor)


@pytest.mark.parametrize(
    "size", ["S", "B", *(pytest.param(s, marks=pytest.mark.slow) for s in "LH")]
)
def test_sizes_by_name(size, tiny):
    """Millions of parameters: 86, 307 and 632 in the ViT paper, table 1; 22 for S."""
    names = {"width": "0", "depth": "0", "mlp_dim": "0", "num_heads": "0", "patch_size": "16"}
    overrides = {f"model__{key}": value for key, value in names.items()}
    config = tiny(model__size=size, moe__layers="none", **overrides)
    config.data.update({"image_size": 224, "channels": 3, "num_classes": 1000})
    model = nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    published = {"S": 22, "B": 86, "L": 307, "H": 632}[size]
    assert count / 1e6 == pytest.approx(published, rel=0.01)  # heads and patch sizes differ


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"router__name": "topp"}, "router.name='topp' is unknown; expected topk,.*did you mean"),
        ({"router__topk__k": "9"}, "router.topk.k=9 is above moe.num_experts=4"),
        ({"moe__capacity_factor": "0"}, r"capacity_factor=0.0: expected a number in \(0, 1e4\]"),
        ({"model__patch_size": "3"}, "patch_size=3 does not divide the image size 8"),
        ({"model__num_heads": "3"}, "num_heads=3 does not divide the width 16"),
        ({"model__pool": "max"}, "pool='max' is unknown; expected cls, mean"),
        ({"model__size": "XL"}, "expected S, B, L, H"),
    ],
)
def test_settings_that_do_not_fit(overrides, message, tiny):
    with pytest.raises(UsageError, match=message):
        check(sized(tiny(**overrides)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_head_router_and_measures_are_not_rounded_to_bfloat16(dtype, tiny, images):
    """In a bfloat16 model all float32 products are at full precision: the router's and the head's;
    in a float32 one these and the two that mix slots."""
    config = sized(tiny(model__dtype=dtype, router__name="soft_moe"))
    graphdef, params = nnx.split(build_model(config, nnx.Rngs(0)))
    batch = {"image": images, "label": jnp.zeros(8, int), "mask": jnp.ones(8)}
    sums = functools.partial(TASKS["images"].sums, config)
    precisions = float32_precisions(make_eval_step(sums, graphdef), params, batch)
    highest = precisions.count((jax.lax.Precision.HIGHEST,) * 2)
    assert highest == (4 if dtype == "float32" else 2)
    assert dtype == "float32" or highest == len(precisions)
