"""Starts a new run from another run's parameters; the MLPs of a dense one become experts.

Sparse upcycling (Komatsuzaki et al. 2023): each expert starts as a copy of the dense MLP of its
block, the router is new, all else is copied. A token's experts are weighted by the router, so that
the sparse model does not compute what the dense one did where the weights do not add up to 1.
"""

import pathlib
import re
from collections import Counter

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moe import outputs
from moe.errors import UsageError
from moe.hosts.distributed import together
from moe.nn.memory import join, part
from moe.screen import say
from moe.store.checkpoint import Checkpoints, named
from moe.store.origins import COPIES, SAME, Layout, Rule, find, places
from moe.store.workdir import saved_config, saved_steps
from moe.train.run import Run, set_up
from moe.train.step import State

# What the arrays of experts start as, where the other run has a dense network.
RULES = tuple(
    Rule(
        f"blocks.{{n}}.feed_forward.experts.{kind}_{part}",
        f"blocks.{{n}}.feed_forward.{part}.{kind}",
        COPIES,
    )
    for part in ("wide", "narrow", "gate")
    for kind in ("kernel", "bias")
)
NEW = "new"


def start_from_checkpoint(run: Run, state: State) -> tuple[State, dict]:
    """Returns the state of step 0 with the parameters of `config.init.workdir`'s checkpoint.

    So is what the routers remember, where both runs have the same router. The second result says
    where each variable came from; see `write_origin`. The arrays of the given state become the new
    ones'.

    Raises:
      UsageError: no run or checkpoint is there, or the sizes of the two models differ.
    """
    directory, wanted = pathlib.Path(run.config.init.workdir), run.config.init.step
    source, origins = together(lambda: find_source(run))
    checkpoints = Checkpoints(directory / "checkpoints", read_only=True)
    key = "ema" if source.config.optimizer.ema_decay else "params"
    like = {key: source.params} | ({"routers": source.memory} if source.memory else {})
    saved, step, damaged = checkpoints.restore_newest(like, wanted if wanted >= 0 else None)
    checkpoints.close()
    for bad in damaged:
        say(f"checkpoint {bad} of {directory} is damaged; using step {step}")
    layout = jax.tree.map(lambda a: a.sharding, run.variables)
    assemble = run.jit(
        lambda new, old: _assemble(run, new, old, source), out_shardings=layout, donate_argnums=0
    )
    old = join(saved[key], saved.get("routers", {}))
    variables = assemble(join(state["params"], state.get("routers", {})), old)
    state = state | {"params": part(variables, run.params)}
    if run.memory:
        state["routers"] = part(variables, run.memory)
    if "ema" in state:
        state = state | {"ema": jax.tree.map(jnp.copy, state["params"])}
    return state, {"workdir": run.config.init.workdir, "step": step, "parameters": origins}


def write_origin(origin: dict | None, workdir: pathlib.Path) -> None:
    """Prints where the parameters came from; `workdir`/init.json has it parameter by parameter."""
    if origin is None:
        return

    def kind(name: str) -> str:
        source = origin["parameters"][name]
        what = {NEW: "new", name: "copied"}.get(source, f"each expert a copy of {source}")
        return re.sub(r"\d+", "*", f"{name}: {what}")

    say(f"starting from step {origin['step']} of {origin['workdir']}:")
    for line, count in sorted(Counter(map(kind, origin["parameters"])).items()):
        say(f"  {line}" + (f" ({count} blocks)" if count > 1 else ""))
    outputs.write_json(workdir / "init.json", origin)


def find_source(run: Run) -> tuple[Run, dict[str, str]]:
    """Returns the run of `config.init.workdir`, and each parameter's origin; reads no array.

    Raises:
      UsageError: no run or checkpoint is there, or the sizes of the two models differ.
    """
    source, init = _source(run), run.config.init
    steps = saved_steps(pathlib.Path(init.workdir))
    if not steps or (init.step >= 0 and init.step not in steps):
        step = f"of step {init.step} " if steps else ""
        raise UsageError(
            f"config.init.workdir={init.workdir} has no checkpoint {step}to start from: "
            f"it has {steps}"
        )
    return source, origin_of_each(run, source)


def origin_of_each(run: Run, source: Run) -> dict[str, str]:
    """{parameter of one block: the source's parameter, or "new"}.

    Raises:
      UsageError: a parameter has another shape there; only the task's ends and the router may.
    """
    theirs = _shapes(source, source.variables)
    origins = {}
    other = run.config.router.name != source.config.router.name
    remembered = _shapes(run, run.memory) if other else ()
    for name, shape in _shapes(run, run.variables).items():
        origins[name], layout = _origin(name, theirs)
        if name in remembered:  # means something else to another router
            origins[name] = NEW
        if origins[name] == NEW:
            continue
        expected, actual = layout.theirs(shape), theirs[origins[name]]
        if expected == actual:
            continue
        if not name.startswith(run.task.ends) and ".router." not in name:
            raise UsageError(
                f"config.init: {name} needs {list(expected)} and {origins[name]} of "
                f"{run.config.init.workdir} has {list(actual)}; give both models the same sizes "
                "(an expert has the width F of the MLP it starts as: --config.moe.expert_dim)"
            )
        origins[name] = NEW
    return origins


def _source(run: Run) -> Run:
    """Returns the other run, its parameters laid out on this run's mesh."""
    saved = saved_config(pathlib.Path(run.config.init.workdir))
    if saved is None:
        raise UsageError(f"config.init.workdir={run.config.init.workdir} holds no run")
    if saved.task != run.config.task:
        raise UsageError(
            f"config.init.workdir={run.config.init.workdir} holds a run of the task "
            f"{saved.task!r}, not {run.config.task!r}: its parameters mean something else"
        )
    saved = ConfigDict(saved.to_dict())
    saved.mesh = run.config.mesh
    # It will see no batch; one must only fit the mesh.
    saved.optimizer.accumulate, saved.optimizer.compress.keep = 1, 1.0
    saved.batch_size = saved.eval.batch_size = run.mesh.size * saved.moe.group_size
    return set_up(saved.lock(), devices=list(run.mesh.devices.flat))


def is_new(run: Run, origin: dict) -> bool:
    """Tells whether the routers remember nothing of the other run."""
    return all(origin["parameters"][name] == NEW for name in _shapes(run, run.memory))


def _shapes(run: Run, variables) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of some of the run's variables, by the names of single blocks."""
    leaves = named(variables)
    return {
        name: leaves[place.leaf].shape[0 if place.turn is None else 1 :]
        for name, place in places(run.graphdef, run.variables).items()
        if place.leaf in leaves
    }


def _origin(name: str, theirs) -> tuple[str, Layout]:
    """Returns the other run's parameter that one is made of, or "new", and how."""
    if name in theirs:
        return name, SAME
    for rule, number in find(RULES, name):
        if (dense := rule.theirs.replace("{n}", number)) in theirs:
            return dense, rule.layout
    return NEW, SAME


def _assemble(run: Run, new, old, source: Run):
    """Returns the new parameters, block by block, from the old ones."""
    origins, leaves = origin_of_each(run, source), named(old)
    mine, theirs = (places(r.graphdef, r.variables) for r in (run, source))

    def value(name: str, fresh):
        if origins[name] == NEW:
            return fresh
        origin, layout = _origin(name, theirs)
        place = theirs[origin]
        saved = leaves[place.leaf] if place.turn is None else leaves[place.leaf][place.turn]
        return layout.read(saved, fresh.shape)

    parts: dict[str, list] = {}
    fresh = named(new)
    for name, place in mine.items():
        leaf = fresh[place.leaf]
        initial = leaf if place.turn is None else leaf[place.turn]
        parts.setdefault(place.leaf, []).append(value(name, initial))
    stacked = {place.leaf for place in mine.values() if place.turn is not None}
    whole = [jnp.stack(parts[leaf]) if leaf in stacked else parts[leaf][0] for leaf in fresh]
    return jax.tree.unflatten(jax.tree.structure(new), whole)
