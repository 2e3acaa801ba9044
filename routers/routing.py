"""Defines what a router decides, and the class that every router is built from.

Axis letters, here and in `moe`: B batch, G groups, T tokens in a group, E experts, C capacity
(slots of an expert in a group), K experts chosen by a token, D model width, F expert width,
H heads, L layers, V classes. `x_GTD` has the axes G, T and D.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, struct


@struct.dataclass
class Routing:
    """Holds which token goes to which expert, and with what weight its output comes back.

    Sparse routers set `weights` [G, T, E], zero where the token does not go to the expert; a
    dispatch with C slots keeps, for each expert, the C tokens of the highest `priority`.
    Soft routers also set `mix`, and their `weights` are [G, T, E, C]: slot c of expert e reads the
    mixture sum_t mix[t, e, c] x_t.
    """

    weights: jax.Array  # combine weights >= 0, float32
    priority: jax.Array | None = None  # [G, T, E]; None: the heaviest first
    mix: jax.Array | None = None  # [G, T, E, C], sums to 1 over T
    # The most weights of a group that are not 0, where the router has such a number.
    rows: int | None = struct.field(pytree_node=False, default=None)
    aux_loss: jax.Array | float = 0.0  # scalar, already weighted by the router's own settings
    # [G, T]: by how much a token's last chosen expert outscored the next; None where tokens do not
    # choose, or choose all experts. No gradient.
    margin: jax.Array | None = None
    # Sums over the real tokens from which `Router.advance` learns; a pytree without gradients.
    statistics: Any = None


class Tokens(NamedTuple):
    """Says of a group's tokens, [G, T], what their vectors do not."""

    ids: jax.Array  # in the vocabulary; where a model has none, the positions
    positions: jax.Array  # of each token in its document, or of each patch in its image


class RouterState(nnx.Variable):
    """Holds what a router keeps from one optimizer step to the next; no gradient changes it."""


class Router(nnx.Module):
    """Maps tokens linearly to a score for each expert; a subclass turns scores into a `Routing`.

    Contract (tests/routers/test_contract.py holds every entry of `ROUTERS` to it):
      __init__(dim, num_experts, capacity, *, k, <settings with defaults>, rngs): `capacity` is the
        number C of slots that the layer gives each expert in training, and so the number of tokens
        an expert chooses where experts choose; `k` the number of experts per token (on average,
        there). The keyword defaults are the configuration's: they are written nowhere else, nor is
        a setting's range, the text of its annotation: `p: Annotated[float, "(1, 100]"] = 2.0`.
      __call__(x_GTD, *, mask=None, key=None) -> Routing: `mask` [G, T] is False on padding, which
        gets weight 0 and enters no loss; `key` seeds training noise, None in evaluation. A group's
        routing depends on no other group. Scores are float32.
      causal: whether, in evaluation and in training, no token's weights depend on later tokens of
        its group; every router says it. Slots, and whatever bounds them, are the dispatch's matter.

    The decision is part of the model: the capacity of an evaluation changes only what the dispatch
    has to drop.

    A router that learns without a gradient keeps `RouterState` variables, {name: array} below.
    They are values: `__call__` reads them and returns `Routing.statistics`, sums that add up over
    groups, micro-batches and devices; the training step applies, once, to those of the whole batch
      advance(state, statistics, progress) -> state: pure; `progress` is the share of the run's
        steps that are then done, in (0, 1], for settings that follow a schedule.
      calibrate(state, statistics) -> state: the same for the first state of all, from one batch
        that no gradient sees; by default the state stays.
    Evaluation, refused steps and recomputed code leave the state alone. Settings of `advance` are
    attributes: it reads no variable.

      reads_tokens: whether `__call__` also takes `tokens`, of `Tokens`.
      offers: the name of the scalar parameter that each layer puts in where all layers share
        something, a budget: share(offers_L) -> values_L then gets those of all layers in order,
        before the first of them runs, and `__call__` its own value as `share`.
    """

    causal: ClassVar[bool]
    reads_tokens: ClassVar[bool] = False
    offers: ClassVar[str | None] = None
    instead: ClassVar[str] = "topk or sparse_topk"  # causal relatives of a router that is not

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: float,
        rngs: nnx.Rngs,
        slots: int = 1,
        null_experts: int = 0,
    ):
        """Makes the kernel of `logits`.

        `slots` is the number of scores of an expert. `null_experts` more are scored and chosen like
        experts but are none: they cost nothing and return 0, and `real` leaves them out.
        """
        if not 0 < k <= num_experts:
            raise ValueError(f"k must be above 0 and at most num_experts={num_experts}; got k={k}")
        self.k, self.num_experts = k, num_experts
        scores = num_experts * slots + null_experts
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (dim, scores), jnp.float32))

    @classmethod
    def why_not_causal(cls, settings: Mapping[str, Any]) -> str | None:
        """Says in a line why, with these settings, a token's experts depend on later tokens, and
        what to use instead; None where they do not."""
        said = getattr(cls, "causal", None)
        if said is None:
            return (
                f"{cls.__name__} does not say whether it is; expected `causal = True` in its class"
            )
        if said:
            return None
        return f"{cls.__name__} compares each token with later ones; {cls.instead} does not"

    def advance(self, state, statistics, progress):
        """Returns the state after an optimizer step; see the contract."""
        return state

    def calibrate(self, state, statistics):
        """Returns the state before the first step; see the contract."""
        return state

    def share(self, offers_L):
        """Returns what each layer gets; see the contract."""
        raise NotImplementedError

    def real(self, weights):
        """Returns the weights [G, T, E] of real experts alone."""
        return weights[..., : self.num_experts]

    def logits(self, x_GTD):
        """Returns the scores [G, T, E], those of null experts last, exact to float32.

        Decisions do not survive bfloat16's three digits, and without `precision` TPUs multiply
        float32 numbers in one pass of bfloat16, GPUs in TF32.
        """
        return jnp.matmul(x_GTD.astype(jnp.float32), self.kernel[...], precision="highest")


def masked(weights_GTE, mask):
    """Returns `weights_GTE` with padding tokens set to 0; `mask` is [G, T] or None."""
    return weights_GTE if mask is None else jnp.where(mask[..., None], weights_GTE, 0)
