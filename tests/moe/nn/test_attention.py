"""Attention's back ends against a plain softmax, on packed rows, with windows, caps and caches."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moe.errors import UsageError
from moe.hosts.mesh import make_mesh, spec
from moe.nn.attention import Places, attention
from moe.nn.blockwise import blockwise
from moe.nn.splash import splash
from moe.nn.triton import triton
from tests.moe.conftest import quick_jit

B, H, K, D = 2, 4, 2, 8


def packed(rows, length):
    """The places of rows of documents of these lengths; what is left is padding."""
    segment, position = np.zeros((2, len(rows), length), np.int32)
    for b, lengths in enumerate(rows):
        start = 0
        for number, size in enumerate(lengths, 1):
            segment[b, start : start + size] = number
            position[b, start : start + size] = np.arange(size)
            start += size
        position[b, start:] = np.arange(length - start)
    return Places(segment, position)


def draw(T, S=None, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, T, H, D), (B, S or T, K, D), (B, S or T, K, D), (B, T, H, D)
    return [rng.normal(size=shape) for shape in shapes]


def dense(q, k, v, queries, keys, window=0, softcap=0.0):
    """The definition, all at once; also JAX's derivative of it is a reference."""
    k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], 2) for a in (k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    back = queries.position[:, :, None] - keys.position[:, None]
    seen = (queries.segment[:, :, None] == keys.segment[:, None]) & (back >= 0)
    if window:
        seen &= back < window
    weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -1e30), -1)
    weights = jnp.where(seen.any(-1)[:, None, :, None], weights, 0)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


ROWS = [(5, 11, 1, 6), (20,)]  # of 23 tokens: documents end within blocks, one row is padded
CASES = [(0, 0.0, 8), (3, 0.0, 8), (7, 2.0, 4), (0, 5.0, 23), (1, 0.0, 8)]


@pytest.mark.parametrize(("window", "softcap", "block"), CASES)
def test_blocks_are_the_plain_softmax_and_so_are_their_gradients(window, softcap, block):
    places = packed(ROWS, 23)
    *arrays, direction = draw(23)
    order = np.broadcast_to(np.arange(23, dtype=np.int32), (B, 23))

    def ours(q, k, v):
        at = places.segment, order
        options = {"window": window, "softcap": softcap, "ordered": True, "block": block}
        return (blockwise(q, k, v, at, at, **options) * direction).sum()

    def plain(q, k, v):
        return (dense(q, k, v, places, places, window, softcap) * direction).sum()

    with jax.enable_x64(True):
        value, grads = quick_jit(jax.value_and_grad(ours, (0, 1, 2)))(*arrays)
        expected, truth = quick_jit(jax.value_and_grad(plain, (0, 1, 2)))(*arrays)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        for grad, true in zip(grads, truth, strict=True):
            np.testing.assert_allclose(grad, true, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_cache_of_keys_in_any_order(tokens):
    rng = np.random.default_rng(1)
    S = 40
    position = np.stack([rng.permutation(S) for _ in range(B)]).astype(np.int32)
    segment = (position < 25).astype(np.int32)  # the rest of the cache is empty
    at = 20 + np.arange(tokens, dtype=np.int32)[None] + np.array([[0], [2]], np.int32)
    queries = Places(np.ones_like(at), at)
    *arrays, _ = draw(tokens, S)
    for window, block in ((0, 8), (4, 256)):
        keys = Places(segment, position)
        options = {"window": window, "softcap": 0.0, "ordered": False, "block": block}
        with jax.enable_x64(True):
            out = quick_jit(lambda *a, o=options, k=keys: blockwise(*a, queries, k, **o))(*arrays)
            expected = dense(*arrays, queries, keys, window)
        np.testing.assert_allclose(out, expected, atol=1e-13)


def test_who_sees_nothing_gets_zero():
    *arrays, _ = draw(3, 5)
    queries = Places(*np.ones((2, B, 3), np.int32))
    keys = Places(np.zeros((B, 5), np.int32), np.zeros((B, 5), np.int32))
    value, grads = jax.value_and_grad(lambda *a: attention(*a, queries, keys).sum(), (0, 1, 2))(
        *(jnp.float32(a) for a in arrays)
    )
    assert value == 0 and all((g == 0).all() for g in grads)


def test_no_bit_depends_on_the_future_another_document_or_another_row():
    places = packed([(5, 18), (23,)], 23)
    q, k, v, _ = (jnp.bfloat16(a) for a in draw(23))
    order = np.broadcast_to(np.arange(23, dtype=np.int32), (B, 23))
    at = places.segment, order

    @quick_jit
    def run(q, k, v):
        return blockwise(q, k, v, at, at, window=0, softcap=0.0, ordered=True, block=4)

    out = np.asarray(run(q, k, v), np.float32)
    for t in (0, 4, 6, 15):
        changed = np.asarray(run(*(a.at[:, t + 1 :].multiply(-1e3) for a in (q, k, v))), np.float32)
        np.testing.assert_array_equal(out[:, : t + 1], changed[:, : t + 1])
        assert (out[:, t + 1 :] != changed[:, t + 1 :]).any()
    other = np.asarray(run(*(a.at[0, :5].add(7) for a in (q, k, v))), np.float32)
    np.testing.assert_array_equal(out[0, 5:], other[0, 5:])
    np.testing.assert_array_equal(out[1], other[1])


@pytest.mark.parametrize(
    ("kernel", "window", "softcap"),
    [(splash, 0, 0.0), (splash, 40, 3.0), (triton, 0, 0.0)],
)
def test_a_kernel_is_blockwise(kernel, window, softcap):
    """Interpreted on a CPU."""
    T, d = 256, 128
    rng = np.random.default_rng(2)
    places = packed([(100, 56, 90), (256,)], T)
    q, k, v, direction = (
        rng.normal(size=(B, T, heads, d)).astype(np.float32) for heads in (2, 1, 1, 2)
    )

    def outcome(run):
        def loss(q, k, v):
            out = run(q, k, v)
            return (out * direction).sum(), out

        return quick_jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    options = {"window": window, "softcap": softcap}
    own = options if kernel is splash else {}
    (_, out), grads = outcome(lambda *a: kernel(*a, places.segment, **own, interpret=True))
    (_, expected), truth = outcome(lambda *a: attention(*a, places, **options, backend="blockwise"))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for grad, true in zip(grads, truth, strict=True):
        np.testing.assert_allclose(grad, true, atol=1e-4)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU's compiler, is not installed: pip install 'permoe[plan]'",
)
def test_auto_compiles_splash_for_a_tpu_and_blocks_for_what_it_cannot():
    devices = make_mesh({"data": 2, "fsdp": 1, "expert": 1, "tensor": 2}, tpus())

    def kernels(T, keys=None, **options):
        def put(shape, dtype, *names):
            where = NamedSharding(devices, spec(*names))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

        q, k = (put((4, T, n, 64), jnp.bfloat16, "batch", None, "heads", None) for n in (8, 2))
        places = Places(*(put((4, T), jnp.int32, "batch", None) for _ in range(2)))

        def loss(q, k, v, places):
            own = places if keys else None
            return attention(q, k, v, places, own, **options).astype(jnp.float32).sum()

        with jax.set_mesh(devices):
            step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
            return step.lower(q, k, k, places).compile().as_text().count("tpu_custom_call")

    assert kernels(256, window=100, softcap=5.0) == 3  # forward, and two backward
    assert kernels(256, backend="blockwise") == kernels(192) == kernels(256, keys=True) == 0


def tpus():
    from moe.plan.topology import open_topology

    return open_topology("v5e:2x2").devices


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 4}, {"expert": 2, "fsdp": 4}])
def test_a_mesh_computes_the_same(sizes):
    """Four parts of two heads of keys, and four of two examples: what does not divide is whole."""
    places = packed(ROWS, 23)
    *arrays, direction = (jnp.float32(a) for a in draw(23))

    def loss(q, k, v):
        return (attention(q, k, v, places, window=9) * direction).sum()

    step = jax.value_and_grad(loss, (0, 1, 2))
    expected, truth = quick_jit(step)(*arrays)
    with jax.set_mesh(make_mesh({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | sizes)):
        value, grads = quick_jit(step)(*arrays)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for grad, true in zip(grads, truth, strict=True):
        np.testing.assert_allclose(grad, true, atol=1e-5)


def test_a_back_end_that_cannot_refuses():
    *arrays, _ = draw(23)
    places = packed(ROWS, 23)
    with pytest.raises(UsageError, match="'splash' cannot: rows of 23 tokens"):
        attention(*arrays, places, backend="splash")
    with pytest.raises(UsageError, match="'triton' cannot: it has neither windows nor caps"):
        attention(*arrays, places, window=3, backend="triton")
    even = packed([(128,)] * B, 128)
    for backend, platform in (("splash", "TPU"), ("triton", "GPU")):
        with pytest.raises(UsageError, match=f"cannot: it is a {platform}'s kernel, and this is a"):
            attention(*draw(128)[:3], even, backend=backend)
    with pytest.raises(UsageError, match="expected one of auto, blockwise, splash, triton"):
        attention(*arrays, places, backend="flash")
    with pytest.raises(UsageError, match="a cache of keys"):
        attention(*arrays, places, places, backend="splash")


def test_memory_grows_with_the_length_alone():
    def temporary(T):
        q, k = (jax.ShapeDtypeStruct((1, T, heads, 16), jnp.bfloat16) for heads in (4, 2))
        places = Places(*(jax.ShapeDtypeStruct((1, T), jnp.int32) for _ in range(2)))
        loss = lambda q, k, v, at: attention(q, k, v, at).astype(jnp.float32).sum()  # noqa: E731
        step = quick_jit(jax.value_and_grad(loss, (0, 1, 2)))
        return step.lower(q, k, k, places).compile().memory_analysis().temp_size_in_bytes

    small, middle, large = (temporary(T) for T in (1024, 4096, 16384))
    assert middle < 6 * small and large < 6 * middle  # it is 16 times where weights are whole
    assert large < 16384**2  # one byte for each of the weights of one head
