"""Computes the cross entropy of a large vocabulary in chunks of tokens.

The logits [B, T, V] never exist whole: each pass computes those of a chunk, the backward pass a
second time from the logsumexp that was kept. Gradients of the head add up in float32 or better.
On a mesh each device takes its own tokens, and its part of the vocabulary.

Letters: N chunks of C tokens, V classes (of a device), D width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe.hosts import mesh


class TokenLoss(NamedTuple):
    """Holds what each token lost, [B, T], nothing of it masked."""

    nats: jax.Array  # -log p(target), float32
    z: jax.Array  # z_loss * log^2 of the softmax's denominator, float32
    correct: jax.Array  # whether the target has the largest logit, the first of equals


class _Setting(NamedTuple):
    chunk: int
    softcap: float
    z_loss: float
    split: bool  # whether `tensor` splits the vocabulary


def cross_entropy(
    hidden_BTD, head_DV, targets_BT, *, chunk: int, softcap: float = 0.0, z_loss: float = 0.0
) -> TokenLoss:
    """Returns the loss of logits = hidden @ head, capped to softcap * tanh(logits / softcap).

    The product is computed in hidden's dtype and added up in float32, as the logits are.

    Args:
      chunk: tokens of a device at a time; its logits take 4 * chunk * V bytes, in each of a few
        copies.
      z_loss: weight of the squared log of the softmax's denominator, which keeps logits from
        drifting (PaLM, Chowdhery et al. 2022, section 5).
    """
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more; got {chunk}")

    def on_device(split, hidden_BTD, head_DV, targets_BT):
        shape = targets_BT.shape
        setting = _Setting(min(chunk, targets_BT.size), softcap, z_loss, split)
        hidden_NCD, targets_NC = _chunks(hidden_BTD, targets_BT, setting.chunk)
        out = _losses(setting, *mesh.alike(hidden_NCD, head_DV), targets_NC)
        return TokenLoss(*(a.reshape(-1)[: targets_BT.size].reshape(shape) for a in out))

    if jax.sharding.get_abstract_mesh().empty:
        return on_device(False, hidden_BTD, head_DV, targets_BT)
    tokens = mesh.fitting(("batch", None), targets_BT.shape)
    hidden = mesh.fitting(("batch", None, None), hidden_BTD.shape)
    head = mesh.fitting((None, "vocab"), head_DV.shape)
    split = head[1] is not None
    f = functools.partial(on_device, split)
    return mesh.local(f, (hidden, head, tokens), tokens)(hidden_BTD, head_DV, targets_BT)


def _chunks(hidden_BTD, targets_BT, size: int):
    """Returns the tokens as chunks, the last of them filled up."""
    hidden_ND, targets_N = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), targets_BT.reshape(-1)
    missing = -len(targets_N) % size
    if missing:
        hidden_ND = jnp.pad(hidden_ND, ((0, missing), (0, 0)))
        targets_N = jnp.pad(targets_N, (0, missing))
    return hidden_ND.reshape(-1, size, hidden_ND.shape[1]), targets_N.reshape(-1, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(setting: _Setting, hidden_NCD, head_DV, targets_NC):
    return _forward(setting, hidden_NCD, head_DV, targets_NC)[0]


def _forward(setting: _Setting, hidden_NCD, head_DV, targets_NC):
    """Returns the losses, and what the backward pass needs."""
    head = head_DV.astype(hidden_NCD.dtype)

    def step(_, chunk):
        hidden_CD, targets_C = chunk
        logits_CV = _logits(setting, hidden_CD, head)
        place_C, own_C = _place(setting, targets_C, head)
        largest_C = _reduce(setting, lax.pmax, logits_CV.max(-1))
        total_C = jnp.exp(logits_CV - largest_C[:, None]).sum(-1)
        lse_C = largest_C + jnp.log(_reduce(setting, lax.psum, total_C))
        target_C = jnp.take_along_axis(logits_CV, place_C[:, None], 1)[:, 0]
        target_C = _reduce(setting, lax.psum, jnp.where(own_C, target_C, 0))
        # The first of the largest, by a plain minimum: argmax is slow on CPU.
        class_V = jnp.arange(head.shape[1], dtype=targets_C.dtype) + _first(setting, head)
        is_best_CV = logits_CV == largest_C[:, None]
        best_C = jnp.where(is_best_CV, class_V[None], jnp.iinfo(class_V.dtype).max).min(-1)
        best_C = _reduce(setting, lax.pmin, best_C)
        return None, (lse_C - target_C, lse_C, best_C == targets_C)

    _, (nats_NC, lse_NC, correct_NC) = lax.scan(step, None, (hidden_NCD, targets_NC))
    losses = TokenLoss(nats_NC, setting.z_loss * lse_NC**2, correct_NC)
    return losses, (hidden_NCD, head_DV, targets_NC, lse_NC)


def _backward(setting: _Setting, kept, slopes: TokenLoss):
    """Returns the derivatives by hidden and head, each device's part of their sums."""
    hidden_NCD, head_DV, targets_NC, lse_NC = kept
    head = head_DV.astype(hidden_NCD.dtype)
    slope_NC = slopes.nats + slopes.z * setting.z_loss * 2 * lse_NC  # of the log denominator

    def step(dhead_DV, chunk):
        hidden_CD, targets_C, lse_C, slope_C, nats_C = chunk
        logits_CV = _logits(setting, hidden_CD, head)
        place_C, own_C = _place(setting, targets_C, head)
        d_CV = jnp.exp(logits_CV - lse_C[:, None]) * slope_C[:, None]
        target_CV = jnp.arange(d_CV.shape[1])[None] == jnp.where(own_C, place_C, -1)[:, None]
        d_CV = jnp.where(target_CV, d_CV - nats_C[:, None], d_CV)
        if setting.softcap:
            d_CV *= 1 - (logits_CV / setting.softcap) ** 2
        d_CV = d_CV.astype(head.dtype)
        dhidden_CD = jnp.einsum("cv,dv->cd", d_CV, head, preferred_element_type=_wide(head))
        dhead_DV += jnp.einsum("cd,cv->dv", hidden_CD, d_CV, preferred_element_type=_wide(head))
        return dhead_DV, dhidden_CD.astype(hidden_CD.dtype)

    start = mesh.vary_like(jnp.zeros(head_DV.shape, _wide(head)), head_DV)
    chunks = (hidden_NCD, targets_NC, lse_NC, slope_NC, slopes.nats)
    dhead_DV, dhidden_NCD = lax.scan(step, start, chunks)
    return dhidden_NCD, dhead_DV.astype(head_DV.dtype), None


_losses.defvjp(_forward, _backward)


def _logits(setting: _Setting, hidden_CD, head_DV):
    logits_CV = jnp.einsum("cd,dv->cv", hidden_CD, head_DV, preferred_element_type=_wide(head_DV))
    return soft_cap(logits_CV, setting.softcap)


def soft_cap(logits, cap: float):
    """Returns logits within (-cap, cap); 0 leaves them alone (Gemma 2)."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def _first(setting: _Setting, head_DV):
    """Returns the number of the device's first class."""
    return lax.axis_index("tensor") * head_DV.shape[1] if setting.split else 0


def _place(setting: _Setting, targets_C, head_DV):
    """Returns the targets' places among the device's classes, and whether they are there."""
    place_C = targets_C - _first(setting, head_DV)
    own_C = (place_C >= 0) & (place_C < head_DV.shape[1])
    return jnp.where(own_C, place_C, 0), own_C


def _reduce(setting: _Setting, f, a):
    return f(a, "tensor") if setting.split else a


def _wide(a):
    return jnp.promote_types(a.dtype, jnp.float32)
