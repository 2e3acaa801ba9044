"""Blocks as loops and with rematerialisation: the same numbers, parameter by parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.nn.blocks import REMATS, Run, runs
from moe.store.checkpoint import named
from tests.moe.conftest import build_model, quick_jit

SIZES = {"model__depth": "5", "moe__layers": "1,3", "router__name": "topk", "model__dropout": "0.1"}


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("dddd", [Run(0, 1, 4)]),
        ("dede", [Run(0, 2, 2)]),
        ("ddddede", [Run(0, 1, 4), Run(4, 1, 1), Run(5, 1, 1), Run(6, 1, 1)]),
        ("dedededd", [Run(0, 2, 3), Run(6, 1, 2)]),
        ("de", [Run(0, 1, 1), Run(1, 1, 1)]),
        ("ddeddedde", [Run(0, 3, 3)]),
        ("", []),
    ],
)
def test_runs_cover_the_blocks(kinds, expected):
    assert runs(kinds) == expected


def outcome(config, spending=()):
    """Loss, reports and gradients, the latter by block number; `spending` is set in the routers."""
    config.data.update({"image_size": 8, "channels": 1, "num_classes": 10})
    graphdef, params = nnx.split(build_model(config, nnx.Rngs(0)), nnx.Param)
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    cotangent = jax.random.normal(jax.random.key(2), (4, 10))
    params["head"]["kernel"][...] += jax.random.normal(jax.random.key(3), (16, 10))

    spent = iter(spending)
    for name, leaf in named(nnx.to_pure_dict(params)).items():
        if spending and name.endswith("spending"):
            values = jnp.array([next(spent) for _ in range(leaf.size)]).reshape(leaf.shape)
            params["blocks"][name.split(".")[1]]["feed_forward"]["router"]["spending"][...] = values

    def loss(params):
        out = nnx.merge(graphdef, params)(images, train=True, key=jax.random.key(1))
        return (out.logits * cotangent).sum() + sum(r.aux_loss for r in out.reports.values()), out

    (value, out), grads = quick_jit(jax.value_and_grad(loss, has_aux=True))(params)
    found, loops = {}, {}
    for run in nnx.merge(graphdef, params).blocks.runs:
        if run.repeats > 1:
            loops |= {str(run.start + i): run for i in range(run.period)}
    for path, grad in jax.tree.leaves_with_path(nnx.to_pure_dict(grads)):
        names = [k.key for k in path]
        loop = loops.get(names[1]) if names[0] == "blocks" else None
        if loop is None:
            found[".".join(names)] = grad
            continue
        for i in range(loop.repeats):
            found[".".join(["blocks", str(int(names[1]) + i * loop.period), *names[2:]])] = grad[i]
    return value, out, found


@pytest.fixture(scope="module")
def plain(data_dir):
    from moe import cli, config
    from tests.moe.conftest import TINY

    dotted = {key.replace("__", "."): value for key, value in SIZES.items()}
    return outcome(cli.apply(config.default(), TINY | dotted))


CASES = [(scan, remat) for scan in ("true", "false") for remat in REMATS]


@pytest.mark.slow  # a loop that computes again is in the quick `tests/moe/train/test_memory.py`
@pytest.mark.parametrize(("scan", "remat"), CASES)
def test_loops_and_rematerialisation_change_no_number(scan, remat, plain, tiny):
    value, out, grads = outcome(tiny(**SIZES, model__scan=scan, model__remat=remat))
    np.testing.assert_allclose(value, plain[0], rtol=1e-5)
    assert out.reports.keys() == plain[1].reports.keys() == {1, 3}
    for number, report in out.reports.items():
        theirs = jax.tree.leaves(plain[1].reports[number])
        for a, b in zip(jax.tree.leaves(report), theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert grads.keys() == plain[2].keys()
    for name, grad in grads.items():
        # Sums of about a hundred float32 terms of size 1, in another order.
        np.testing.assert_allclose(grad, plain[2][name], rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_loops_share_a_budget_as_single_blocks_do(tiny):
    """Also where a layer of the loop has spent other than the next."""
    settings = SIZES | {"router__name": "sparse_budget"}
    one, loop = (
        outcome(tiny(**settings, model__scan=scan, model__remat="full"), spending=[0.5, -0.5])
        for scan in ("false", "true")
    )
    names = [name for name in one[2] if name.endswith("spending")]
    assert len(names) == 2 and one[2].keys() == loop[2].keys()
    assert (np.abs([one[2][name] for name in names]) > 0).all()
    np.testing.assert_allclose(loop[0], one[0], rtol=1e-5)
    for name in one[2]:
        np.testing.assert_allclose(loop[2][name], one[2][name], rtol=1e-4, atol=2e-5, err_msg=name)
    chosen = [
        [float(r.chosen / r.tokens) for r in out.reports.values()] for _, out, _ in (one, loop)
    ]
    np.testing.assert_allclose(chosen[0], chosen[1], rtol=1e-6)
    assert chosen[0][0] > chosen[0][1]


def test_a_loop_compiles_its_body_once(tiny):
    def lines(scan):
        config = tiny(model__depth="8", moe__layers="every-2", model__scan=scan)
        config.data.update({"image_size": 8, "channels": 1, "num_classes": 10})
        graphdef, params = nnx.split(nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0))))
        images = jax.ShapeDtypeStruct((4, 8, 8, 1), jnp.float32)
        forward = jax.jit(lambda params, images: nnx.merge(graphdef, params)(images).logits)
        return len(forward.lower(params, images).as_text().splitlines())

    assert lines("true") < lines("false") / 2
