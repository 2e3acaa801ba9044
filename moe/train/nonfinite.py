"""Numbers that are not finite: which ones end a run, said by name, before anything is saved.

The train step refuses an update that is not finite, and with `nonfinite="stop"` all that come after
it, so that when the log looks the state is still that of the bad step: the step is computed again
from it, for the names alone. No step waits for the host to look.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from moe.hosts.distributed import AgreedError
from moe.store.checkpoint import Checkpoints, named
from moe.tasks.task import Source
from moe.train.run import Run
from moe.train.step import State, root_key, step_key

SHOWN = 4  # names


def check(
    run: Run, state: State, halted: jax.Array, checkpoints: Checkpoints, source: Source
) -> None:
    """Raises where a step was refused and the config says to stop.

    Raises:
      AgreedError: names the step, the parameters and the last good checkpoint.
    """
    if run.config.nonfinite != "stop" or not jax.device_get(halted):
        return
    done = int(state["step"])
    batch = run.put(next(run.train_batches(source, done)))
    find = run.jit(_causes(run), out_shardings=run.replicated)
    gradients, new = (
        [name for name, good in named(tree).items() if not good]
        for tree in jax.device_get(find(state, batch))
    )
    cause = "its loss or the norm"
    if gradients:
        cause = f"gradients of {_some(gradients)} (of {len(named(state['params']))})"
    elif new:
        cause = f"the new {_some(new)}, though all gradients are"
    raise AgreedError(
        f"step {done + 1} is not finite, and was not applied: {cause}; "
        f"{_last_good(checkpoints)}; start anew with a lower --config.optimizer.learning_rate, or "
        "go on without such steps by --config.nonfinite=skip"
    )


def state_check(run: Run) -> Callable[[int, State, Checkpoints], None]:
    """Returns a function that raises an AgreedError where a state to be saved is not finite."""

    def finite(state):
        return jax.tree.map(lambda a: jnp.isfinite(a).all(), state)

    compiled = run.jit(finite, out_shardings=run.replicated)

    def check_state(step: int, state: State, checkpoints: Checkpoints) -> None:
        good = named(jax.device_get(compiled(state)))
        bad = [name for name in good if not good[name]]
        if bad:
            raise AgreedError(
                f"the state of step {step} is not finite and is not saved: {_some(bad)} (of "
                f"{len(good)}); {_last_good(checkpoints)}; start anew with other settings"
            )

    return check_state


def _causes(run: Run) -> Callable:
    """Returns a function: state, batch -> whether each gradient is finite, and each new array."""
    gradient = run.gradient

    def find(state, batch):
        root, memory = root_key(run.config.seed), state.get("routers", {})
        key = step_key(root, state["step"])
        kept = {name: state[name] for name in ("compress",) if name in state}
        arguments = state["params"], batch, key, memory, state["step"], *kept.values()
        grads, _, *new = gradient(*arguments)
        updates, opt_state = run.optimizer.update(grads, state["opt_state"], state["params"])
        new = dict(zip(kept, new, strict=True)) | {
            "params": optax.apply_updates(state["params"], updates),
            "opt_state": opt_state,
        }
        return tuple(jax.tree.map(lambda a: jnp.isfinite(a).all(), tree) for tree in (grads, new))

    return find


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _last_good(checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    steps = checkpoints.steps()
    return f"the last good checkpoint is of step {steps[-1]}" if steps else "no checkpoint yet"
