"""Which parameters' gradients were not finite, for the message that ends a run.

The train step refuses an update that is not finite, and with `nonfinite="stop"` all that come after
it, so that when the log looks the state is still that of the bad step: the step is computed again
from it, for the names alone. No step waits for the host to look.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe.checkpoint import Checkpoints
from moe.data import ImageSource
from moe.distributed import AgreedError
from moe.run import Run
from moe.step import State, make_gradient

SHOWN = 4  # names


def check(run: Run, state: State, checkpoints: Checkpoints, source: ImageSource) -> None:
    """Raises where the totals of `state` have a refused step, and the config says to stop.

    Raises:
      AgreedError: names the step, the parameters and the last good checkpoint.
    """
    if run.config.nonfinite != "stop" or not jax.device_get(state["totals"]["skipped"]):
        return
    done = int(state["step"])
    batch = run.put(next(run.train_batches(source, done)))
    find = run.jit(_finite_gradients(run), out_shardings=run.replicated)
    leaves = jax.tree_util.tree_leaves_with_path(
        jax.device_get(find(state["params"], state["step"], batch))
    )
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".") for path, good in leaves if not good
    ]
    checkpoints.wait()
    steps = checkpoints.steps()
    shown = ", ".join(names[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise AgreedError(
        f"step {done + 1} is not finite, and was not applied: "
        + (
            f"gradients of {shown}{more} (of {len(leaves)})"
            if names
            else "its loss, its norm or what the optimizer made of it"
        )
        + (f"; the last good checkpoint is of step {steps[-1]}" if steps else "; no checkpoint yet")
        + "; start anew with a lower --config.optimizer.learning_rate, or go on without such steps "
        "by --config.nonfinite=skip"
    )


def _finite_gradients(run: Run) -> Callable:
    gradient = make_gradient(run.config, run.graphdef)

    def find(params, step, batch):
        key = jax.random.fold_in(jax.random.key(run.config.seed), step)
        grads, _ = gradient(params, batch, key)
        return jax.tree.map(lambda g: jnp.isfinite(g).all(), grads)

    return find
