"""Lets chosen tokens pass a whole block, attention included; the others go around it.

Mixture of depths (Raposo et al. 2024, arXiv 2404.02258) and its threshold-p (MoDification,
arXiv 2410.14268). With a block f and a token's weight w, x' = x + w (f(x) - x) where it is taken,
and x' = x, to the bit, where it is not. Tokens that are taken attend to one another alone.

  sparse      the relaxed top-k mask along the tokens of a row, w = m (Sander et al. 2023)
  topk        the k tokens of a row that score highest, w = 1
  threshold   the tokens whose gate g = sigmoid(w x + b) is at least p, w = g: looks at no other
"""

import functools
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe.hosts import mesh
from moe.nn.dispatch import slots_per_expert
from moe.nn.layer import LayerReport
from routers import ROUTERS, Router, Routing
from routers.routing import masked
from routers.selection import largest


class Highest(Router):
    """Takes the C tokens of a group that score highest, with weight 1: nothing learns the scores.

    (`expert_choice` ranks by a softmax over the experts, in which all tokens of a sole one tie.)
    """

    causal: ClassVar[bool] = False

    def __init__(self, dim: int, num_experts: int, capacity: int, *, k: float, rngs: nnx.Rngs):
        super().__init__(dim, num_experts, k=k, rngs=rngs)
        self.capacity = capacity

    def __call__(self, x_GTD, *, mask=None, key=None) -> Routing:
        scores = jax.lax.stop_gradient(self.logits(x_GTD))
        if mask is not None:
            scores = jnp.where(mask[..., None], scores, jnp.finfo(scores.dtype).min)
        chosen = masked(largest(scores.swapaxes(1, 2), self.capacity).swapaxes(1, 2), mask)
        return Routing(weights=chosen.astype(jnp.float32))


SKIPS: dict[str, type[Router]] = {
    "sparse": ROUTERS["sparse_expert_choice"],
    "topk": Highest,
    "threshold": ROUTERS["threshold"],
}


class Rows(NamedTuple):
    """Counts tokens of a row of T; they are static, so what is not computed costs nothing."""

    chosen: int  # by the top-k ones
    train: int  # slots of the block in training
    evaluate: int  # and in evaluation


def rows(tokens: int, *, router: str, capacity: float, bound: float, eval_bound: float) -> Rows:
    """Returns the numbers of tokens that are shares of a row."""
    share = functools.partial(slots_per_expert, tokens, num_experts=1, capacity_factor=1.0)
    chosen, every = share(capacity), router == "threshold"
    if router == "topk":
        return Rows(chosen, chosen, chosen)
    train = share(bound) if bound else tokens if every else chosen
    return Rows(chosen, train, share(eval_bound))


class Skip(nnx.Module):
    """Chooses the tokens of each row that pass a block.

    In training the block computes a static number of slots of a row; tokens that are taken and find
    none go around the block, and the report counts their weight as dropped. Kept are the heaviest
    or, in a `causal` model, the first by position. There nothing is dropped in evaluation.

    Args:
      dim: D.
      tokens: T of a row in training.
      router: one of `SKIPS`.
      capacity: share of a row's tokens that top-k ones choose.
      p, strength, final_strength: of sparse, see `routers.expert_choice.SparseExpertChoice`.
      gated: whether the weights of top-k ones are times sigmoid(score): so hard top-k too learns
        whom to take. (Mixture of depths as published weighs by the score itself.)
      threshold: p of threshold, whose gates begin at it: all tokens are taken at first.
      start: by how much more their logits begin.
      alpha: weight of threshold's loss F G, of the share F taken and the mean gate G.
      gain: factor of gates; 1 / p makes a gate of p weigh 1.
      bound: slots in training, a share of the row; 0: as many as top-k ones choose, all else.
      eval_bound: slots in evaluation, of sparse and threshold.
    """

    def __init__(
        self,
        dim: int,
        tokens: int,
        *,
        router: str = "sparse",
        capacity: float = 0.125,
        p: float = 2.0,
        strength: float = 0.5,
        final_strength: float = 0.0,
        gated: bool = False,
        threshold: float = 0.5,
        start: float = 0.0,
        alpha: float = 0.01,
        gain: float = 1.0,
        bound: float = 0.0,
        eval_bound: float = 1.0,
        causal: bool = False,
        rngs: nnx.Rngs,
    ):
        if causal:
            _must_be_causal(router)
        bounds = {"capacity": capacity, "bound": bound, "eval_bound": eval_bound}
        self.rows = rows(tokens, router=router, **bounds)
        settings = {
            "sparse": {"p": p, "strength": strength, "final_strength": final_strength},
            "topk": {},
            "threshold": {
                "p": threshold,
                "bias": math.log(threshold / (1 - threshold)) + start,
                "sparsity": alpha,
            },
        }[router]
        self.router = SKIPS[router](dim, 1, self.rows.chosen, k=1, rngs=rngs, **settings)
        if router == "threshold":
            self.router.kernel.set_value(jnp.zeros_like(self.router.kernel.get_value()))
        self.gated, self.gain, self.causal = gated and router != "threshold", gain, causal
        self.weighed = router == "threshold" or gated

    def __call__(self, block, x_BTD, *, mask, train: bool, key, context=None, cache=None):
        """Returns what a block does: [B, T, D], the report and the cache.

        Args:
          block: has `whole`, which computes all of its tokens, and `among`, which makes the context
            of chosen ones.
          mask: [B] or [B, T], False on padding, which passes no block; None: none is.
          context, cache: of the block.
        """
        batch, length, _ = x_BTD.shape
        if mask is not None and mask.ndim == 1:
            mask = jnp.broadcast_to(mask[:, None], (batch, length))
        routing = self.router(x_BTD, mask=mask)
        weights_BT = routing.weights[..., 0]
        if self.gated:
            weights_BT *= jax.nn.sigmoid(self.router.logits(x_BTD)[..., 0])
        if self.weighed:
            weights_BT *= self.gain
        slots = self._slots(length, train)
        told = {"train": train, "key": key, "cache": cache}
        if slots == length:
            told["context"] = block.among(context, weights_BT > 0)
            run = functools.partial(_pass, block, x_BTD, weights_BT, **told)
            if cache is not None and length == 1:  # text is generated: all rows may skip the block
                y_BTD, cache = jax.lax.cond((weights_BT > 0).any(), run, lambda: (x_BTD, cache))
            else:
                y_BTD, cache = run()
            kept_BT = weights_BT
        else:
            pick = mesh.on_groups(functools.partial(_pick, slots, self.causal))
            token_BC = pick(jax.lax.stop_gradient(weights_BT))
            gather = mesh.on_groups(lambda tree, token: jax.tree.map(lambda a: _at(a, token), tree))
            x_BCD, weights_BC, context = gather((x_BTD, weights_BT, context), token_BC)
            context = block.among(context, weights_BC > 0, token_BC)
            out_BCD, cache = _pass(block, x_BCD, weights_BC, context=context, **told)
            y_BTD, kept_BT = mesh.on_groups(_put)(x_BTD, out_BCD, weights_BC, token_BC)
        real = weights_BT.size if mask is None else mask.sum()
        taken, lost = weights_BT > 0, (weights_BT - kept_BT).sum()
        report = LayerReport(
            aux_loss=jnp.float32(routing.aux_loss),
            load_E=(kept_BT > 0).sum(dtype=jnp.float32)[None],
            dropped=lost / jnp.maximum(weights_BT.sum(), jnp.finfo(jnp.float32).tiny),
            weights_BTE=weights_BT[..., None],
            tokens=jnp.float32(real),
            chosen=taken.sum(dtype=jnp.float32),
            margin=None,
            statistics=jax.lax.stop_gradient(routing.statistics),
        )
        return y_BTD, report, cache

    def _slots(self, length: int, train: bool) -> int:
        if self.causal and not train:
            return length
        return min(length, self.rows.train if train else self.rows.evaluate)


def _must_be_causal(router: str) -> None:
    if not SKIPS[router].causal:
        raise ValueError(f"a causal model needs router='threshold' of its skips; got {router!r}")


def _pass(block, x, weights, *, train, key, context, cache):
    """Returns x + weight (f(x) - x) where the weight is not 0, else x; and the cache."""
    taken = weights > 0
    told = {"mask": taken, "train": train, "key": key}
    out, _, cache = block.whole(x, context=context, cache=cache, **told)
    changed = x + weights[..., None].astype(x.dtype) * (out - x)
    return jnp.where(taken[..., None], changed, x), cache


def _pick(slots: int, in_order: bool, weights_BT):
    """Returns the tokens in a row's slots, [B, C]: the first, or the heaviest, of those that have a
    weight, in the order of their row, and others where these are fewer."""
    if in_order:
        place = jnp.arange(weights_BT.shape[1], dtype=jnp.float32)
        return jax.lax.top_k(jnp.where(weights_BT > 0, -place[None], -jnp.inf), slots)[1]
    return jnp.sort(jax.lax.top_k(weights_BT, slots)[1], axis=1)


def _at(a_BT, token_BC):
    return a_BT[jnp.arange(len(a_BT))[:, None], token_BC]


def _put(x_BTD, out_BCD, weights_BC, token_BC):
    """Returns x with its tokens in the slots replaced, and the weights of these tokens, [B, T]."""
    at = jnp.arange(len(x_BTD))[:, None], token_BC
    kept_BT = jnp.zeros(x_BTD.shape[:2], weights_BC.dtype).at[at].set(weights_BC)
    return x_BTD.at[at].set(out_BCD, unique_indices=True), kept_BT
