"""Makes the gradient of a step from what each shard of the axis `data` sends of its own.

A worker is a shard of `data`: the devices that share its examples along `fsdp`, `expert` and
`tensor` compute one gradient together, by what the compiler makes of it as ever. Between workers
nothing is summed: each device sends the largest entries of its part of each array of the worker's
gradient, made up by `routers.compression`, and adds up what all have sent. An array of stacked
layers counts as so many arrays.

The update is the workers' mean, before clipping and the optimizer. A worker's loss is that of its
examples times their share of the whole batch's weight, so that the mean of all gradients, if none
was compressed, is the gradient of the step's loss; an auxiliary loss is the workers' own, as it is
of micro-batches (`moe.train.step`). So is the noise of a router, and dropout.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from moe.hosts.mesh import AXES
from moe.nn import memory as memories
from routers import compression

Kept = dict[str, Any]  # "own": of each worker [W, *shape], "mean": what EF21's workers agree on
WORKERS = "data"


@dataclasses.dataclass(frozen=True)
class Compressor:
    """Sends the largest entries of gradients between the shards of `data`, and keeps the rest.

    Attributes:
      keep: share of the entries that are sent.
      method: a name of `compression.METHODS`; "" without a memory.
      params: the parameters' shapes with shardings.
      stacked: for each of them, whether its first axis counts layers.
    """

    keep: float
    method: str
    params: Any
    stacked: Any

    @property
    def workers(self) -> int:
        return jax.tree.leaves(self.params)[0].sharding.mesh.shape[WORKERS]

    def kept(self) -> Kept:
        """Returns what workers keep between steps, as shapes with shardings; {} without a memory.

        Before the first step all of it is 0.
        """
        if not self.method:
            return {}

        def own(p):
            where = NamedSharding(p.sharding.mesh, PartitionSpec(WORKERS, *p.sharding.spec))
            return jax.ShapeDtypeStruct((self.workers, *p.shape), p.dtype, sharding=where)

        kept = {"own": jax.tree.map(own, self.params)}
        return kept | ({"mean": self.params} if self.method == "ef21" else {})

    def gradient(self, gradient: Callable) -> Callable:
        """Returns a function: params, batch, key, memory[, kept] -> gradient, sums[, kept].

        It needs the mesh in context.

        Args:
          gradient: of `moe.train.step.make_gradient`.
        """
        local = self.local(gradient)

        def compressed(params, batch, key, memory, *kept: Kept):
            grads, sums = local(params, batch, key, memory)
            if not kept:
                return self.exchange(grads, {})[0], sums
            grads, new = self.exchange(grads, kept[0])
            return grads, sums, new

        return compressed

    def local(self, gradient: Callable) -> Callable:
        """Returns a function: params, batch, key, memory -> each worker's gradient [W, *shape], and
        the sums over the batch."""

        def on_worker(params, batch, key, memory):
            key = jax.random.fold_in(key, jax.lax.axis_index(WORKERS))
            grads, sums = gradient(params, batch, key, memory)
            total = jax.lax.psum(sums["weight"], WORKERS)
            share = sums["weight"] * self.workers / jnp.where(total > 0, total, 1.0)
            grads = jax.tree.map(lambda g: (g * share.astype(g.dtype))[None], grads)
            return grads, jax.lax.psum(sums, WORKERS)

        everywhere, split = PartitionSpec(), PartitionSpec(WORKERS)
        # Without a record of what varies between workers: by that record JAX would sum gradients of
        # parameters that do not, and it is wrong inside loops over further axes (JAX 0.10).
        return jax.shard_map(
            on_worker,
            in_specs=(everywhere, split, everywhere, everywhere),
            out_specs=(split, everywhere),
            axis_names={WORKERS},
            check_vma=False,
        )

    def exchange(self, grads, kept: Kept):
        """Returns the gradient that all use, and what is kept, of gradients [W, *shape]."""
        names = [name for name in ("own", "mean") if name in kept]

        def array(p, stacked: bool, g, *old):
            own, whole = PartitionSpec(WORKERS, *p.sharding.spec), p.sharding.spec
            where = [{"own": own, "mean": whole}[name] for name in names]
            return jax.shard_map(
                functools.partial(self._on_device, stacked),
                in_specs=(own, *where),
                out_specs=[whole, *where],
                axis_names=set(AXES),
                check_vma=False,  # all workers come to the same mean
            )(g, *old)

        old = [kept[name] for name in names]
        out = jax.tree.map(array, self.params, self.stacked, grads, *old)
        inner = jax.tree.structure([0, *names])
        grads, *new = jax.tree.transpose(jax.tree.structure(grads), inner, out)
        return grads, dict(zip(names, new, strict=True))

    def _on_device(self, stacked: bool, g, own=None, mean=None) -> list[jax.Array]:
        """Returns the gradient, and what is kept, of one device's part [1, *part] of an array."""
        part = g.shape[1:]
        rows = (part[0], -1) if stacked else (-1,)
        g = g.reshape(rows)
        method = compression.METHODS.get(self.method, compression.none)
        sent, new = method(
            g, own if own is None else own.reshape(rows), compression.count(g.shape[-1], self.keep)
        )
        d = compression.mean(jax.lax.all_gather(sent, WORKERS), g.shape[-1]).reshape(part)
        if own is None:
            return [d]
        new = new.reshape(1, *part)
        return [d, new] if mean is None else [mean + d, new, mean + d]


def make_compressor(section: ConfigDict, graphdef, params, memory) -> Compressor | None:
    """Returns what compresses a run's gradients; None where all of them is kept: then they are
    summed as if there were no such thing.

    Args:
      section: `optimizer.compress` of a config.
      params: the parameters' shapes with shardings.
      memory: what the routers remember, as shapes.
    """
    if section.keep == 1:
        return None
    model = nnx.merge(graphdef, memories.join(params, memory))
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731

    def stacked(variable: nnx.Variable) -> bool:
        return variable.get_metadata().get("axes", (None,))[:1] == ("layers",)

    state = memories.split(model)[1]
    stacks = nnx.to_pure_dict(jax.tree.map(stacked, state, is_leaf=is_variable))
    return Compressor(section.keep, section.method if section.feedback else "", params, stacks)
