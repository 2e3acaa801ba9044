"""Defines routers in which a token may get any number of experts: by probability mass, by a gate's
threshold, by ReLU."""

import math
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from routers import losses
from routers.routing import Router, RouterState, Routing, masked
from routers.selection import ranks


class TopP(Router):
    """Sends each token to the smallest set of experts whose probabilities add up to P or more.

    Weights are the probabilities, softmax(logits). Huang et al. 2024, "Harder Tasks Need More
    Experts" (arXiv 2403.07652): with a loss on the entropy, without which probabilities spread and
    every token takes more.

    Settings:
      k: for which the layer sizes its slots and rows; no bound of the choice.
      mass: P.
      entropy, balance, z: weights of the auxiliary losses.
    """

    causal: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity: int,
        *,
        k: Annotated[float, "(0, 1e5]"] = 2.0,
        mass: Annotated[float, "(0, 1]"] = 0.5,
        entropy: Annotated[float, "[0, 1e3]"] = 1e-4,
        balance: Annotated[float, "[0, 1e3]"] = 0.01,
        z: Annotated[float, "[0, 1e3]"] = 0.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_experts, k=k, rngs=rngs)
        self.mass, self.entropy, self.balance, self.z = mass, entropy, balance, z

    def __call__(self, x_GTD, *, mask=None, key=None) -> Routing:
        logits = self.logits(x_GTD)
        probs = jax.nn.softmax(logits, axis=-1)
        fixed = jax.lax.stop_gradient(probs)
        rank = ranks(fixed, self.num_experts)
        better = rank[..., None, :] < rank[..., None]  # of each expert, the others before it
        before = jnp.where(better, fixed[..., None, :], 0).sum(-1)
        chosen = masked(before < self.mass, mask)
        return Routing(
            weights=jnp.where(chosen, probs, 0),
            aux_loss=self.entropy * losses.entropy(probs, mask)
            + self.balance * losses.load_balance(probs, chosen, mask)
            + self.z * losses.z_loss(logits, mask),
        )


class Threshold(Router):
    """Sends each token to the experts whose gate g = sigmoid(logit + b) is at least p; weights g.

    With one expert a token passes the layer or skips it: MoDification's mixture of depths (arXiv
    2410.14268) on the feed-forward, with the loss sparsity * sum_e F_e G_e of the share F taken (no
    gradient) and the mean gate G.

    Settings:
      k: for which the layer sizes its slots and rows; no bound of the choice.
      p: threshold of the gate.
      bias: initial b; a large one lets all tokens pass at first.
      sparsity: weight of the loss.
    """

    causal: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity: int,
        *,
        k: Annotated[float, "(0, 1e5]"] = 2.0,
        p: Annotated[float, "(0, 1)"] = 0.5,
        bias: Annotated[float, "[-100, 100]"] = 0.0,
        sparsity: Annotated[float, "[0, 1e3]"] = 0.01,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_experts, k=k, rngs=rngs)
        self.p, self.sparsity = p, sparsity
        self.bias = nnx.Param(jnp.full(num_experts, bias))

    def __call__(self, x_GTD, *, mask=None, key=None) -> Routing:
        logits = self.logits(x_GTD) + self.bias[...][None, None]
        gate = jax.nn.sigmoid(logits)
        # By the logits: a bias of exactly log(p / (1 - p)) passes, whatever the sigmoid rounds to.
        chosen = masked(logits >= math.log(self.p / (1 - self.p)), mask)
        taken, mean = losses.shares(chosen, mask), losses.shares(gate, mask)
        return Routing(
            weights=jnp.where(chosen, gate, 0),
            aux_loss=self.sparsity * (jax.lax.stop_gradient(taken) * mean).sum(),
        )


class ReLU(Router):
    """Weighs each expert by relu(logit), and holds the number of those above 0 near K by a penalty.

    The penalty is c mean_t sum_e f_e R_te, of gates R and each expert's load f_e in fair shares;
    after each step c *= factor where the experts per token are above K, c /= factor below. Wang et
    al. 2024, ReMoE (arXiv 2412.14711). At first about half of all experts are above 0: dispatches
    with bounds (`moe.dropless_bound`) drop what they have no room for.

    Settings:
      k: experts per token, on average.
      factor, coefficient: of the penalty; the latter is c's first value.
      balanced: False takes f_e = 1, the plain L1 norm.
    """

    causal: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity: int,
        *,
        k: Annotated[float, "(0, 1e5]"] = 2.0,
        factor: Annotated[float, "[1, 100]"] = 1.2,
        coefficient: Annotated[float, "[1e-20, 1e3]"] = 1e-8,
        balanced: bool = True,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_experts, k=k, rngs=rngs)
        self.factor, self.balanced = factor, balanced
        self.coefficient = RouterState(jnp.float32(coefficient))

    def __call__(self, x_GTD, *, mask=None, key=None) -> Routing:
        gates = masked(jax.nn.relu(self.logits(x_GTD)), mask)
        chosen = (gates > 0).astype(jnp.float32)
        size = losses.shares(gates, mask)
        if self.balanced:
            size *= self.num_experts / self.k * losses.shares(chosen, mask)
        tokens = chosen.shape[0] * chosen.shape[1] if mask is None else mask.sum()
        return Routing(
            weights=gates,
            aux_loss=self.coefficient[...] * size.sum(),
            statistics={"chosen": chosen.sum(), "tokens": jnp.float32(tokens)},
        )

    def advance(self, state, statistics, progress):
        above = jnp.sign(statistics["chosen"] - self.k * statistics["tokens"])
        # Where the penalty is far out of range nothing is left for it to change.
        new = jnp.clip(state["coefficient"] * self.factor**above, 1e-20, 1e6)
        return state | {"coefficient": new}
