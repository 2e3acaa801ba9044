"""Runs transformer blocks one after another: each compiled by itself, or equal ones as a loop."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe.hosts.mesh import constrain
from moe.nn import memory
from moe.nn.layer import LayerReport

# What the backward pass keeps of a block; all else is computed again.
_KEEP = jax.checkpoint_policies
REMATS: dict[str, Callable | None] = {
    "none": None,  # keep everything
    "full": _KEEP.nothing_saveable,  # keep the input alone
    "exchange": _KEEP.save_only_these_names("exchange"),  # and what crossed between experts
    "dots_no_batch": _KEEP.dots_with_no_batch_dims_saveable,  # and products with parameters
    "dots": _KEEP.dots_saveable,  # and all matrix products
}


class Run(NamedTuple):
    """Stands for `repeats` times the same `period` blocks, the first of which is block `start`."""

    start: int
    period: int
    repeats: int


class Block(nnx.Module):
    """Computes a pre-norm transformer block; `feed_forward` is an `Mlp` or a `MoE`.

    `skip` makes the `moe.nn.skip.Skip` by which tokens go around the block; None: all pass it. The
    context is which tokens the others see, [B, T]; None: all of them.
    """

    def __init__(self, dim: int, heads: int, feed_forward: nnx.Module, *, dropout, norm_eps=1e-6,
                 skip: Callable | None = None, dtype, rngs):  # fmt: skip
        norm = {"epsilon": norm_eps, "dtype": dtype, "rngs": rngs}
        self.norm_attention = nnx.LayerNorm(dim, **norm)
        self.attention = nnx.MultiHeadAttention(
            heads,
            dim,
            decode=False,
            dtype=dtype,
            kernel_init=nnx.initializers.xavier_uniform(),
            kernel_metadata={"axes": ("embed", "heads", None)},
            bias_metadata={"axes": ("heads", None)},
            out_kernel_metadata={"axes": ("heads", None, "embed")},
            out_bias_metadata={"axes": (None,)},
            rngs=rngs,
        )
        self.norm_feed_forward = nnx.LayerNorm(dim, **norm)
        self.feed_forward = feed_forward
        self.dropout = nnx.Dropout(dropout)
        # The last, so that its draws move nobody else's.
        self.skip = None if skip is None else skip(rngs=rngs)

    def __call__(self, x, **told):
        return self.whole(x, **told) if self.skip is None else self.skip(self, x, **told)

    def whole(self, x, *, mask, train, key, context=None, cache=None, **told):
        """Computes the block for all tokens."""
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        x = constrain(x, "batch", None, None)
        seen = None if context is None else context[:, None, None, :]
        x += self._drop(self.attention(self.norm_attention(x), mask=seen), keys[0])
        out, report = self.feed_forward(
            self.norm_feed_forward(x), mask=mask, train=train, key=keys[1], **told
        )
        return x + self._drop(out, keys[2]), report, None

    def among(self, context, taken, place=None):
        """Returns the context in which tokens see those that are taken."""
        return taken

    def _drop(self, x, key):
        return self.dropout(x, deterministic=key is None, rngs=key)


class Blocks(nnx.Module):
    """Applies blocks 0 to L-1 to [B, T, D].

    A block maps (x, mask, train, key, context, cache) to x, its report (None without experts) and
    its new cache (None without one): `context` is what all blocks are told of the tokens, a pytree
    that only they know, and a cache is what a block keeps of tokens that it was given before. It
    also gets `share` where the layers' routers share something (`routers.Router`).

    Args:
      make: (block number, rngs) -> its module.
      kinds: for each block what distinguishes it; blocks of one kind differ in parameters alone.
      scan: True stacks the parameters of equal blocks and loops over them, which compiles each
        kind once: the same numbers, with parameters named by the first block of a loop and a
        leading axis over its turns.
      remat: a name in `REMATS`.
      key: of the blocks' parameters: block i's are a function of (key, i), scanned or not.
    """

    def __init__(self, make: Callable, kinds: Sequence, *, scan: bool, remat: str, key: jax.Array):
        singles = [Run(i, 1, 1) for i in range(len(kinds))]
        self.runs = tuple(runs(kinds) if scan else singles)
        self.remat = remat

        def block(number: int, key) -> nnx.Module:
            return make(number, nnx.Rngs(key))

        keys = jax.random.split(key, len(kinds))
        for run in self.runs:
            for number in range(run.start, run.start + run.period):
                block_keys = keys[number : run.start + run.period * run.repeats : run.period]
                build = functools.partial(block, number)
                module = build(block_keys[0]) if run.repeats == 1 else _stacked(build, block_keys)
                setattr(self, str(number), module)

    def __call__(self, x, *, mask, train, key, context=None, caches=None):
        """Returns [B, T, D], the reports by block number, and the caches as they were given: by the
        name of a block or of the first of its loop, there with a leading axis over the turns."""
        reports: dict[int, LayerReport] = {}
        new_caches = {}
        depth = sum(run.period * run.repeats for run in self.runs)
        shares = self._shares()
        keys = None if key is None else jax.random.split(key, depth)
        for run in self.runs:
            end = run.start + run.period * run.repeats
            run_keys = None if keys is None else keys[run.start : end]
            x, run_reports, run_caches = self._run(
                run, x, mask, train, run_keys, context, caches, shares
            )
            reports |= run_reports
            new_caches |= run_caches
        return x, reports, None if caches is None else new_caches

    def caches(self, make: Callable):
        """Returns the caches of all blocks, where make(block number) is that of one."""
        found = {}
        for run in self.runs:
            for number in range(run.start, run.start + run.period):
                one = make(number)
                if run.repeats > 1:
                    one = jax.tree.map(lambda a, n=run.repeats: jnp.stack([a] * n), one)
                found[str(number)] = one
        return found

    def _shares(self) -> dict[int, jax.Array]:
        """Returns by block what the routers share, from what each puts in; {} where none does."""
        offers, router = {}, None
        for found in memory.in_blocks(self):
            if found.router.offers:
                router, value = found.router, getattr(found.router, found.router.offers)[...]
                offers |= zip(found.numbers, value.reshape(-1), strict=True)
        if router is None:
            return {}
        numbers = sorted(offers)
        values = router.share(jnp.stack([offers[number] for number in numbers]))
        return dict(zip(numbers, values, strict=True))

    def _run(self, run: Run, x, mask, train, keys, context, caches, shares):
        """Applies one loop, or one block; returns x, and the reports and caches by block."""
        numbers = range(run.start, run.start + run.period)
        parts = [nnx.split(getattr(self, str(number))) for number in numbers]
        applies = [self._apply(graphdef, train, run.repeats > 1) for graphdef, _ in parts]
        states = tuple(state for _, state in parts)
        names = [str(number) for number in numbers]
        caches = tuple(None if caches is None else caches[name] for name in names)
        shares = tuple(_turns(run, number, shares) for number in numbers)

        def turn(x, inputs):
            states, keys, caches, shares = inputs
            reports, new_caches = [], []
            for i, apply in enumerate(applies):
                key = None if keys is None else keys[i]
                x, report, cache = apply(states[i], x, mask, key, context, caches[i], shares[i])
                reports.append(report)
                new_caches.append(cache)
            return x, (tuple(reports), tuple(new_caches))

        if run.repeats == 1:
            x, (reports, caches) = turn(x, (states, keys, caches, shares))
            reports = {n: r for n, r in zip(numbers, reports, strict=True) if r is not None}
            return x, reports, dict(zip(names, caches, strict=True))
        if keys is not None:
            keys = keys.reshape(run.repeats, run.period)
        x, (reports, caches) = jax.lax.scan(turn, x, (states, keys, caches, shares))
        reports = {
            number + i * run.period: jax.tree.map(lambda a, i=i: a[i], report)
            for number, report in zip(numbers, reports, strict=True)
            if report is not None
            for i in range(run.repeats)
        }
        return x, reports, dict(zip(names, caches, strict=True))

    def _apply(self, graphdef, train: bool, looped: bool) -> Callable:
        """Returns (variables, x, mask, key, context, cache, share) -> (x, report, cache) that keeps
        what `remat` says."""

        def apply(state, x, mask, key, context, cache, share):
            told = {"context": context, "cache": cache}
            told |= {} if share is None else {"share": share}
            return nnx.merge(graphdef, state)(x, mask=mask, train=train, key=key, **told)

        if self.remat == "none":
            return apply
        # In a loop nothing outside can be merged with what is computed again.
        return jax.checkpoint(apply, policy=REMATS[self.remat], prevent_cse=not looped)


def _turns(run: Run, number: int, shares: dict[int, jax.Array]):
    """Returns a block's share, with a leading axis over the turns of a loop; None without one."""
    if number not in shares:
        return None
    if run.repeats == 1:
        return shares[number]
    return jnp.stack([shares[number + i * run.period] for i in range(run.repeats)])


def runs(kinds: Sequence) -> list[Run]:
    """Groups the blocks in loops, from each block on by the period whose repeats reach furthest."""
    loops, start = [], 0
    while start < len(kinds):
        best = Run(start, 1, 1)
        for period in range(1, (len(kinds) - start) // 2 + 1):
            pattern, repeats = list(kinds[start : start + period]), 1
            while list(kinds[start + repeats * period :][:period]) == pattern:
                repeats += 1
            if repeats > 1 and period * repeats > best.period * best.repeats:
                best = Run(start, period, repeats)
        loops.append(best)
        start += best.period * best.repeats
    return loops


def _stacked(build: Callable, keys) -> nnx.Module:
    """Builds one module for all keys: its parameters have a leading axis over build(key)'s."""

    def values(key):
        flat = nnx.to_flat_state(nnx.state(build(key)))
        return {path: variable.get_value() for path, variable in flat}

    def stack(variable: nnx.Variable, value) -> nnx.Variable:
        whole = (None,) * (value.ndim - 1)
        axes = ("layers", *variable.get_metadata().get("axes", whole))
        return variable.type(value, axes=axes)

    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))
    stacked = jax.vmap(values)(keys)
    flat = {path: stack(variable, stacked[path]) for path, variable in nnx.to_flat_state(state)}
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
