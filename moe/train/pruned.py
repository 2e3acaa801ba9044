"""Trains and measures a pruned model: its state is dense, what it computes with is not.

A step differentiates at `Pruning.effective`, an evaluation is made with it and once more with
`Pruning.hardened`, which has exactly k entries of each matrix: `eval/hardened/...` in the records.
"""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from moe.nn.pruning import Pruning, nonzero_share
from moe.tasks import Metric

PHASE = "eval/hardened"  # of the names of a hardened evaluation's scalars


def judged(best: Metric, pruning: Pruning) -> Metric:
    """Returns what an evaluation is judged by: of a pruned run, that of the hardened weights."""
    return best._replace(name=f"hardened/{best.name}") if pruning.prunes else best


def through(effective: Callable, gradient: Callable) -> Callable:
    """Returns a function: params, batch, key, memory, step[, kept] -> the gradient, sums[, kept].

    Only one pass goes back through the pruning, however many micro-batches there are.

    Args:
      effective: (params, step) -> the parameters that the model computes with.
      gradient: (params, batch, key, memory[, kept]) -> the gradient there, sums[, kept]; "kept" is
        what workers keep of gradients that they send in part.
    """

    def compute(params, batch, key, memory, step, *kept):
        pruned, pull = jax.vjp(lambda params: effective(params, step), params)
        grads, sums, *kept = gradient(pruned, batch, key, memory, *kept)
        return *pull(grads), sums | {"nonzero_share": nonzero_share(pruned)}, *kept

    return compute


def as_hardened(results: Mapping[str, float]) -> dict[str, float]:
    """Returns an evaluation's scalars by the names of a hardened one's, which it was."""
    own = {name.partition("/")[2]: value for name, value in results.items()}
    return {f"{PHASE}/{name}": value for name, value in own.items() if "/" not in name}


class Views:
    """Makes what an evaluation computes with from what a state holds."""

    def __init__(self, run):
        self._run, self.pruning = run, run.pruning
        layout = jax.tree.map(lambda a: a.sharding, run.params)
        shardings = layout, run.replicated

        def counted(make: Callable) -> Callable:
            def both(*args):
                pruned = make(*args)
                return pruned, nonzero_share(pruned)

            return run.jit(both, out_shardings=shardings)

        self._effective, self._hardened = counted(run.effective), counted(run.hardened)

    def effective(self, params, step: int):
        """Returns the parameters that training computes with at a step, and scalars of them."""
        if not self.pruning.trains:
            return params, {"nonzero_share": 1.0} if self.pruning.prunes else {}
        return self._with_share(self._effective, params, np.int32(step))

    def hardened(self, params):
        """Returns the parameters of the pruned model that the run ends with, and scalars."""
        return self._with_share(self._hardened, params)

    def _with_share(self, make: Callable, *args):
        params, share = make(*args)
        return params, {"nonzero_share": float(jax.device_get(share))}
