"""The decoder: against its formula, on packed rows, with a cache, on a mesh; and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from moe.hosts import mesh
from moe.models.decoder import build_decoder
from moe.nn.cross_entropy import cross_entropy
from moe.nn.rope import rope_angles, rotate
from routers import ROUTERS
from tests.moe.conftest import quick_jit

B, T, V, L = 4, 12, 17, 4
EXPERTS = {
    "router": ROUTERS["topk"],
    "settings": {"k": 2},
    "num_experts": 4,
    "capacity_factor": 1.0,
    "eval_capacity_factor": 1.0,
    "dispatch": "dense",
    "dropout": 0.0,
}
SIZES = {"vocab": V, "width": 8, "depth": L, "heads": 4, "kv_heads": 2, "head_dim": 6}
SIZES |= {"mlp_dim": 10, "expert_dim": 6, "shared_experts": 1, "tokens": T, "window": 5}
SIZES |= {"expert_layers": (1, 3), "experts": EXPERTS, "global_every": 2, "embed_scale": 1.0}


@functools.cache
def split(**settings):
    """The parts of a decoder, whose parameters one compiled program makes."""
    build = lambda: build_decoder(**SIZES | settings, rngs=nnx.Rngs(0))  # noqa: E731
    graphdef, _ = nnx.split(nnx.eval_shape(build))
    return graphdef, quick_jit(lambda: nnx.state(build()))()


def run(graphdef):
    def forward(params, tokens, **places):
        model = nnx.merge(graphdef, params)
        out = model(tokens, **places)
        return model.logits(out.hidden_BTD), out

    return quick_jit(forward)


@functools.cache
def tokens():
    return np.random.default_rng(0).integers(V, size=(B, T), dtype=np.int32)


def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def by_formula(params, ids):
    """A decoder without experts on one row, head by head, in float64; pairs turn as complex."""

    def turn(x):  # [T, d]
        half = x.shape[1] // 2
        angle = np.arange(len(x))[:, None] * 10_000.0 ** -(np.arange(half) / half)
        z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], 1)

    x = params["embedding"][ids]
    for n in range(L):
        p = params["blocks"][str(n)]
        a, heads, window = p["attention"], [], T if n % 2 else 5
        h = norm(x, p["norm_attention"]["scale"])
        for i in range(4):
            q = turn(norm(h @ a["query"]["kernel"][:, i], a["query_norm"]["scale"]))
            k = turn(norm(h @ a["key"]["kernel"][:, i // 2], a["key_norm"]["scale"]))
            logits = q @ k.T / np.sqrt(q.shape[1])
            back = np.arange(T)[:, None] - np.arange(T)
            weights = np.where((back >= 0) & (back < window), np.exp(logits), 0)
            v = h @ a["value"]["kernel"][:, i // 2]
            heads.append(weights / weights.sum(1, keepdims=True) @ v)
        x = x + np.einsum("hti,hid->td", np.stack(heads), a["out"]["kernel"])
        h, f = norm(x, p["norm_feed_forward"]["scale"]), p["feed_forward"]
        hidden = silu(h @ f["gate"]["kernel"]) * (h @ f["wide"]["kernel"])
        x = x + hidden @ f["narrow"]["kernel"]
    x = norm(x, params["norm"]["scale"])
    return 3 * np.tanh(x @ params["embedding"].T / 3)


def test_it_computes_the_formula():
    graphdef, params = split(expert_layers=(), scan=False, softcap=3.0)
    numbers = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(params))
    logits, _ = run(graphdef)(params, tokens())
    for row in (0, B - 1):
        np.testing.assert_allclose(logits[row], by_formula(numbers, tokens()[row]), atol=1e-5)


def test_kernels_begin_at_their_scale():
    _, params = split(width=256, depth=2, expert_layers=(1,), tied=False, embed_scale=0.02)
    blocks, narrow = params["blocks"], 1 / np.sqrt(2 * 2)
    scales = [
        (params["embedding"], 0.02),
        (params["untied"], 0.02),
        (blocks["0"]["attention"]["query"]["kernel"], 1 / 16),
        (blocks["0"]["attention"]["out"]["kernel"], narrow / np.sqrt(4 * 6)),
        (blocks["0"]["feed_forward"]["narrow"]["kernel"], narrow / np.sqrt(10)),
        (blocks["1"]["feed_forward"]["experts"]["kernel_narrow"], narrow / np.sqrt(6)),
        (blocks["1"]["feed_forward"]["shared"]["narrow"]["kernel"], narrow / np.sqrt(6)),
    ]
    for parameter, scale in scales:
        np.testing.assert_allclose(np.std(parameter[...]), scale, rtol=0.1)


def test_turned_products_depend_on_the_distance_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 2, 8)).astype(np.float32)
    at = lambda x, n: rotate(x, rope_angles(jnp.full((1, 1), n), 8, 100.0))  # noqa: E731
    np.testing.assert_allclose(at(q, 0), q)
    products = [(at(q, n + 3) * at(k, n)).sum() for n in (0, 5, 100)]
    np.testing.assert_allclose(products, products[0], rtol=1e-4)


def test_a_packed_document_is_the_document_alone_and_no_bit_comes_from_later():
    graphdef, params = split()
    forward = run(graphdef)
    lengths = (5, 4, 3)
    segment = np.repeat([1, 2, 0], lengths)[None].repeat(B, 0).astype(np.int32)
    position = np.concatenate([np.arange(n) for n in lengths])[None].repeat(B, 0)
    packed, _ = forward(params, tokens(), segments=segment, positions=position)
    alone = np.roll(tokens(), -5, 1)
    ones = np.where(np.arange(T) < 4, 1, 0)[None].repeat(B, 0).astype(np.int32)
    expected, _ = forward(params, alone, segments=ones, positions=np.roll(position, -5, 1))
    np.testing.assert_allclose(packed[:, 5:9], expected[:, :4], atol=1e-5)
    for t in (0, 3, 6):
        changed = tokens().copy()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % V
        other, _ = forward(params, changed, segments=segment, positions=position)
        np.testing.assert_array_equal(other[:, : t + 1], packed[:, : t + 1])
        assert (other[:, t + 1 :] != packed[:, t + 1 :]).any()
    changed = tokens().copy()
    changed[1:] = 0
    other, _ = forward(params, changed, segments=segment, positions=position)
    np.testing.assert_array_equal(other[0], packed[0])


def test_padding_takes_no_expert():
    graphdef, params = split()
    segment = np.where(np.arange(T) < 7, 1, 0)[None].repeat(B, 0).astype(np.int32)
    _, out = run(graphdef)(params, tokens(), segments=segment, mask=np.arange(B) != 1)
    for number in (1, 3):
        weights = out.reports[number].weights_BTE
        assert (weights[:, 7:] == 0).all() and (weights[1] == 0).all()
        assert (weights[0, :7].sum(-1) > 0).all()
        assert out.reports[number].load_E.sum() == 2 * 7 * (B - 1)


@pytest.mark.parametrize("scan", [True, False])
def test_prefill_and_decode_are_the_full_forward_pass(scan):
    """Prompts of different lengths, each row going on from its own."""
    graphdef, params = split(scan=scan)
    forward = run(graphdef)
    expected, _ = forward(params, tokens())
    lengths = np.array([3, 7, 1, 5])
    caches = nnx.merge(graphdef, params).init_cache(B, T + 4)
    prompt = np.arange(7)[None].repeat(B, 0)
    segment = (prompt < lengths[:, None]).astype(np.int32)
    logits, out = forward(
        params, tokens()[:, :7], segments=segment, positions=prompt, caches=caches
    )
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], atol=1e-5)
    for step in range(5):
        at = (lengths + step)[:, None]
        one = np.take_along_axis(tokens(), at, 1)
        logits, out = forward(params, one, positions=at, caches=out.caches)
        np.testing.assert_allclose(
            logits[:, 0], expected[np.arange(B), lengths + step], atol=1e-5, err_msg=str(step)
        )


def loss_of(graphdef):
    def loss(params, tokens, key):
        model = nnx.merge(graphdef, params)
        out = model(tokens[:, :-1], train=True, key=key)
        told = cross_entropy(out.hidden_BTD, model.head(), tokens[:, 1:], chunk=8)
        return told.nats.mean() + sum(r.aux_loss for r in out.reports.values())

    return loss


@pytest.mark.slow
def test_a_mesh_computes_the_same():
    experts = EXPERTS | {"dispatch": "dropless", "dropless_receive": 8.0}
    graphdef, params = split(experts=frozen(experts), tied=False, vocab=18, depth=2)
    ids = np.random.default_rng(1).integers(18, size=(B, T), dtype=np.int32)
    step = jax.value_and_grad(loss_of(graphdef))
    expected, truth = quick_jit(step)(params, ids, jax.random.key(0))
    devices = mesh.make_mesh({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2})
    with jax.set_mesh(devices):
        where = mesh.parameter_shardings(devices, params)
        placed = jax.tree.map(jnp.copy, params)
        nnx.replace_by_pure_dict(
            placed, jax.tree.map(jax.device_put, nnx.to_pure_dict(params), where)
        )
        there = jax.device_put(ids, NamedSharding(devices, mesh.spec("batch")))
        value, grads = quick_jit(step)(placed, there, jax.random.key(0))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for (path, ours), true in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(truth), strict=True
    ):
        np.testing.assert_allclose(ours, true, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def frozen(settings):
    """Settings that a cached function takes."""

    class Frozen(dict):
        __hash__ = object.__hash__

    return Frozen(settings)


@pytest.mark.slow
@pytest.mark.slow
def test_it_learns_to_count():
    """Rows of n, n + 1, n + 2, ...: from ln 17 = 2.8 nats a token to almost none."""
    graphdef, params = split(remat="full", width=16, depth=2, embed_scale=0.02, dtype=jnp.bfloat16)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)
    loss = jax.value_and_grad(loss_of(graphdef))

    @quick_jit
    def step(params, state, tokens, key):
        value, grads = loss(params, tokens, key)
        updates, state = optimizer.update(grads, state)
        return value, optax.apply_updates(params, updates), state

    losses = []
    for number in range(60):
        start = np.random.default_rng(number).integers(V, size=(8, 1))
        rows = (start + np.arange(T + 1)[None]) % V
        value, params, state = step(params, state, rows, jax.random.key(number))
        losses.append(float(value))
    assert losses[0] == pytest.approx(np.log(V), abs=0.2)
    assert losses[-1] < 0.3
