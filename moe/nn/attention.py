"""Computes causal attention among packed documents, by the back end that fits the platform.

  blockwise   plain JAX on any device, also against a cache of keys; memory linear in T
  splash      the TPU's Pallas kernel, for rows of a multiple of 128 tokens that attend themselves
  triton      the GPU's Pallas kernel, for such rows without windows and caps
  auto        splash on a TPU where it fits, else blockwise

Every back end keeps documents apart; one that cannot do what a call asks for refuses.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.errors import UsageError
from moe.hosts import mesh
from moe.nn import splash, triton
from moe.nn.blockwise import BLOCK, OTHER_BLOCK, blockwise

BACKENDS = ("auto", "blockwise", "splash", "triton")
PLATFORMS = {"splash": "tpu", "triton": "gpu"}


class Places(NamedTuple):
    """Says where tokens stand, [B, T] both."""

    segment: jax.Array  # number of the document within its row, from 1; 0: padding
    position: jax.Array  # within the document, from 0
    place: jax.Array | None = None  # within the row, rising; None: the tokens are all of it


def attention(
    q_BTHd,
    k_BSKd,
    v_BSKd,
    queries: Places,
    keys: Places | None = None,
    *,
    window: int = 0,
    softcap: float = 0.0,
    backend: str = "auto",
):
    """Returns, for each query and head, the softmax-weighted mean of values, [B, T, H, d].

    A query sees the keys of its own document at its own or an earlier position; with a window, only
    the last `window` of these, itself included. Each head of keys serves H/K heads of queries.
    Logits are scaled by d^-1/2, then capped to softcap * tanh(logits / softcap); they and the
    softmax are float32 or better. A query that sees nothing gets 0.

    Args:
      queries: of the queries, and of the keys unless these have their own. Without, the tokens of a
        document are neighbours in their row, or have a `place` there, and in order, which saves the
        blocks of the future.
      keys: of the keys, in any order: a cache.
      backend: one of `BACKENDS`.

    Raises:
      UsageError: the back end cannot compute this.
    """
    shape = q_BTHd.shape
    if shape[2] % k_BSKd.shape[2]:
        raise ValueError(f"{k_BSKd.shape[2]} heads of keys do not divide {shape[2]} of queries")
    if backend not in BACKENDS:
        raise UsageError(f"attention={backend!r} is unknown; expected one of {', '.join(BACKENDS)}")
    obstacles = {
        "splash": splash.obstacle(shape[1]),
        "triton": triton.obstacle(shape[1], window, softcap),
    }
    if queries.place is not None and window:
        obstacles["splash"] = "its window takes the tokens of a row for neighbours"
    if keys is not None:
        obstacles = dict.fromkeys(obstacles, "a cache of keys has no order that it knows")
    backend = _choose(backend, obstacles)
    block = BLOCK.get(mesh.platform(), OTHER_BLOCK)

    def run(q, k, v, queries, keys):
        if backend == "splash":
            return splash.splash(q, k, v, queries[0], window=window, softcap=softcap)
        if backend == "triton":
            return triton.triton(q, k, v, queries[0])
        ordered = keys is None
        if ordered:  # by place in the row, which no document's start resets
            place = queries.place
            if place is None:
                every = jnp.arange(shape[1], dtype=jnp.int32)
                place = jnp.broadcast_to(every, queries[0].shape)
            queries = keys = queries[0], place
        options = {"window": window, "softcap": softcap, "ordered": ordered, "block": block}
        return blockwise(q, k, v, queries, keys, **options)

    return _on_mesh(run)(q_BTHd, k_BSKd, v_BSKd, queries, keys)


def _choose(backend: str, obstacles: dict[str, str]) -> str:
    """Returns the back end that "auto" stands for, or the one asked for if nothing is against it.

    A GPU's kernel is not chosen by itself: it has not been timed beside blockwise.
    """
    if backend == "auto":
        fits = mesh.platform() == "tpu" and not obstacles["splash"]
        return "splash" if fits else "blockwise"
    problem, platform = obstacles.get(backend), PLATFORMS.get(backend, mesh.platform())
    if not problem and platform != mesh.platform():
        problem = f"it is a {platform.upper()}'s kernel, and this is a {mesh.platform().upper()}"
    if problem:
        raise UsageError(f"attention={backend!r} cannot: {problem}; use 'blockwise' or 'auto'")
    return backend


def _on_mesh(run):
    """Makes each device compute its own examples and heads: attention needs no exchange.

    Where the tensor axis does not divide the heads of keys, these are repeated until it does; what
    cannot be split evenly is computed by every device.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return run

    def on_mesh(q, k, v, queries, keys):
        parts, (H, K) = mesh.axis_size("tensor"), (q.shape[2], k.shape[2])
        whole = math.lcm(K, parts)
        if H % whole == 0 and whole > K:
            k, v = (jnp.repeat(a, whole // K, 2) for a in (k, v))
        heads = "heads" if H % whole == 0 else None
        arrays = mesh.fitting(("batch", None, heads, None), q.shape)
        places = mesh.fitting(("batch", None), q.shape[:2])
        where = (arrays, arrays, arrays, places, None if keys is None else places)
        # Kernels do not say over which axes of the mesh their results vary.
        return jax.shard_map(run, in_specs=where, out_specs=arrays, check_vma=False)(
            q, k, v, queries, keys
        )

    return on_mesh
