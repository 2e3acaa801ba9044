"""The chunked cross entropy against the plain one, on meshes, and by its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.hosts.mesh import make_mesh
from moe.nn.cross_entropy import cross_entropy
from tests.moe.conftest import quick_jit

B, T, D, V = 8, 5, 6, 12


def plain(hidden, head, targets, *, softcap=0.0, z_loss=0.0):
    """The definition, with all logits at once."""
    logits = jnp.einsum("btd,dv->btv", hidden, head)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    lse = jax.nn.logsumexp(logits, -1)
    nats = lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return nats, z_loss * lse**2, logits.argmax(-1) == targets


@functools.cache
def numbers():
    rng = np.random.default_rng(0)
    hidden, head = 2 * rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    return hidden, head, rng.integers(V, size=(B, T), dtype=np.int32), rng.normal(size=(2, B, T))


def outcome(losses, arrays, **options):
    *inputs, weight = arrays

    def total(hidden, head):
        nats, z, correct = losses(hidden, head, inputs[2], **options)
        return (nats * weight[0] + z * weight[1]).sum(), (nats, z, correct)

    step = quick_jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (_, out), grads = step(*inputs[:2])
    return (*out, *grads)


@pytest.mark.parametrize(("chunk", "softcap", "z_loss"), [(7, 0.0, 0.0), (40, 3.0, 0.1), (1, 0, 1)])
def test_it_is_the_plain_cross_entropy(chunk, softcap, z_loss):
    with jax.enable_x64(True):
        options = {"softcap": softcap, "z_loss": z_loss}
        found = outcome(cross_entropy, numbers(), chunk=chunk, **options)
        expected = outcome(plain, numbers(), **options)
    for ours, true in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, true, atol=1e-12)


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "tensor": 4}, {"fsdp": 4, "tensor": 2}, {"expert": 8}]
)
def test_a_mesh_computes_the_same(sizes):
    arrays = [jnp.asarray(a, a.dtype if a.dtype == np.int32 else np.float32) for a in numbers()]
    options = {"chunk": 3, "softcap": 3.0, "z_loss": 0.1}
    expected = outcome(cross_entropy, arrays, **options)
    with jax.set_mesh(make_mesh({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | sizes)):
        found = outcome(cross_entropy, arrays, **options)
    for ours, true in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, true, atol=2e-5)


def test_bfloat16_has_losses_and_gradients_of_the_head_in_float32():
    hidden, head, targets, weight = numbers()
    low = jnp.bfloat16(hidden)
    found = outcome(cross_entropy, (low, jnp.float32(head), targets, jnp.float32(weight)), chunk=8)
    exact = jnp.float32(low), jnp.float32(jnp.bfloat16(head)), targets, jnp.float32(weight)
    assert [a.dtype for a in found[:2]] == [jnp.float32] * 2 and found[4].dtype == jnp.float32
    expected = outcome(plain, exact)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(found[4], expected[4], atol=0.05)  # its factors have three digits


def test_equal_logits_predict_the_first_class():
    out = cross_entropy(jnp.ones((1, 3, D)), jnp.zeros((D, V)), jnp.arange(3)[None], chunk=2)
    np.testing.assert_array_equal(out.correct, [[True, False, False]])
    np.testing.assert_allclose(out.nats, np.log(V), rtol=1e-6)


def test_logits_never_exist_whole():
    """At V = 131,072: forward and backward of 4,096 tokens, whose logits would take 2 GiB."""
    tokens, width, V, chunk = 4096, 64, 131_072, 256
    shapes = ((1, tokens, width), jnp.bfloat16), ((width, V), jnp.float32), ((1, tokens), jnp.int32)
    loss = lambda *a: cross_entropy(*a, chunk=chunk, z_loss=1e-4).nats.mean()  # noqa: E731
    step = quick_jit(jax.value_and_grad(loss, (0, 1)))
    program = step.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
    logits, head = 4 * chunk * V, 4 * width * V
    assert program.memory_analysis().temp_size_in_bytes < 3 * logits + 3 * head
    assert 3 * logits + 3 * head < 4 * tokens * V / 4
