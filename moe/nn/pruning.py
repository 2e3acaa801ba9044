r"""Keeps the largest entries of each matrix: the parameters that a pruned model computes with.

The objective is min over W of loss(T_k(W)) (Sander et al. 2023), with T_k the top-k in magnitude of
each matrix, k a share of its entries, relaxed so that a gradient reaches entries near the
threshold. W stays dense; what a pruned model *is*, is hard top-k of it: exactly k entries.

A matrix is a kernel of attention, of an MLP or of one expert (`moe.nn.matrices`); embeddings,
routers, heads, norms and biases stay as they are.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from moe.hosts import mesh
from moe.nn.matrices import matrix
from routers import sparse_topk_magnitude
from routers.selection import largest


@dataclasses.dataclass(frozen=True)
class Pruning:
    """Holds the section `prune` of a config: how many entries stay, and how training gets there.

    Attributes:
      keep: share of each matrix's entries that stay; 1 prunes nothing.
      p, strength: of `routers.sparse_topk_magnitude` in training; strength 0 is the hard top-k. For
        p = 2 a strength means the same for weights of any scale.
      final_strength: what the strength goes to over the run, evenly in its logarithm; 0: it stays.
      straight_through: whether gradients pass as if nothing were pruned, so that entries that are 0
        are trained too.
      one_shot: whether training prunes nothing, and only what it ends with is hardened.
    """

    keep: Annotated[float, "(0, 1]"] = 1.0
    p: Annotated[float, "[1.1, 4]"] = 2.0
    strength: Annotated[float, "0 or [1e-6, 1e6]"] = 3.0
    final_strength: Annotated[float, "0 or [1e-6, 1e6]"] = 0.01
    straight_through: bool = False
    one_shot: bool = False

    @property
    def prunes(self) -> bool:
        """Tells whether anything is pruned, be it in the end."""
        return self.keep < 1

    @property
    def trains(self) -> bool:
        """Tells whether training computes with other parameters than its state has."""
        return self.prunes and not self.one_shot

    @property
    def is_hard(self) -> bool:
        """Tells whether training computes with what hardening makes."""
        return self.trains and not self.strength

    def effective(self, params, progress, like=None):
        """Returns the parameters that training computes with, to be differentiated.

        Args:
          params: the parameters' nested dictionary.
          progress: share of the run's steps that are done; may be traced.
          like: the same as shapes with shardings; None where every device has all.
        """
        if not self.trains:
            return params
        if self.is_hard:
            prune = _hard
        else:
            strength = self._strength(progress)

            def prune(rows, k):
                return sparse_topk_magnitude(rows, k, p=self.p, strength=strength)

        def shrink(rows, k):
            pruned = prune(rows, k)
            if not self.straight_through:
                return pruned
            # Exactly 0, with the derivative of the identity.
            return jax.lax.stop_gradient(pruned) + (rows - jax.lax.stop_gradient(rows))

        return self._each(shrink, params, like)

    def hardened(self, params, like=None):
        """Returns the parameters with k entries left of each matrix, and zeros."""
        return self._each(_hard, params, like) if self.prunes else params

    def hardened_piece(self, name: str, piece: np.ndarray) -> np.ndarray:
        """Returns a parameter of one block hardened, or its part of one expert, by its name."""
        axes = matrix(name.split("."))
        if axes is None:
            return piece
        rows = as_rows(piece.shape, axes)
        flat = rows.flatten(jnp.asarray(piece))
        return np.asarray(rows.restore(_hard(flat, self.kept(flat.shape[-1]))))

    def _strength(self, progress):
        if not self.final_strength:
            return self.strength
        return self.strength * jnp.float32(self.final_strength / self.strength) ** progress

    def _each(self, prune: Callable, params, like):
        """Applies prune(rows, k) to the matrices of every kernel.

        Kernels of one shape are pruned together: a search for each would be compiled for each.
        """
        places = jax.tree.leaves(params if like is None else like)
        found, structure = jax.tree_util.tree_flatten_with_path(params)
        new, groups = [leaf for _, leaf in found], {}
        for i, (path, kernel) in enumerate(found):
            if (axes := matrix(path)) is not None:
                rows = as_rows(kernel.shape, axes, _spec(places[i]))
                flat = rows.flatten(kernel)
                groups.setdefault((flat.shape, rows.spec), []).append((i, flat, rows.restore))
        for (shape, _), members in groups.items():
            pruned = prune(jnp.stack([flat for _, flat, _ in members]), self.kept(shape[-1]))
            for part, (i, _, restore) in zip(pruned, members, strict=True):
                new[i] = restore(part)
        return jax.tree.unflatten(structure, new)

    def kept(self, size: int) -> int:
        """Returns k of a matrix of so many entries."""
        return max(1, round(self.keep * size))


def _hard(rows, k: int):
    """Returns the k largest entries of each row in magnitude, the first of equal ones, and zeros.

    Gradients reach what stays alone: what is 0 stays so but for decay of the others.
    """
    return jnp.where(largest(jnp.abs(jax.lax.stop_gradient(rows)), k), rows, 0)


class Rows(NamedTuple):
    """Holds how a kernel's matrices become rows [..., n], the way back, and how rows are spread."""

    flatten: Callable
    restore: Callable
    spec: PartitionSpec


def as_rows(shape: tuple[int, ...], axes: tuple[int, int], spec=()) -> Rows:
    """Says how to see the matrices of a kernel as rows.

    The order of a row's entries is each device's own part after the other's, so that none of them
    needs another's: only what is summed up along rows crosses devices.

    Args:
      axes: of `matrix`.
      spec: how the kernel's axes are spread over the mesh in context.
    """
    whole = len(shape) - sum(axes)
    spec = (*spec, *[None] * (len(shape) - len(spec)))
    names = [(part,) if isinstance(part, str) else part or () for part in spec]
    along = tuple(name for part in names[whole:] for name in part)
    flat = PartitionSpec(*spec[:whole], along or None)
    own = tuple(
        size // math.prod(map(mesh.axis_size, part))
        for size, part in zip(shape, names, strict=True)
    )
    flatten = mesh.local(lambda a: a.reshape(*a.shape[:whole], -1), PartitionSpec(*spec), flat)
    restore = mesh.local(lambda a: a.reshape(own), flat, PartitionSpec(*spec))
    return Rows(flatten, restore, flat)


def nonzero_share(params) -> jax.Array:
    """Returns which share of the matrices' entries is not 0."""
    size, count = 0, jnp.zeros(())
    for path, kernel in jax.tree_util.tree_leaves_with_path(params):
        if (axes := matrix(path)) is not None:
            inside = tuple(range(kernel.ndim - sum(axes), kernel.ndim))
            # Whole numbers within a matrix: float32 cannot count beyond 2^24, nor int32 all layers.
            each = (kernel != 0).sum(inside, dtype=jnp.int32)
            size, count = size + kernel.size, count + each.astype(jnp.float32).sum()
    return count / max(size, 1)


def _spec(leaf) -> PartitionSpec:
    """Returns how an array that is to come is spread; nothing is known of one that is here."""
    where = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
    return getattr(where, "spec", PartitionSpec())
