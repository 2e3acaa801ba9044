"""Evaluates a checkpoint of a run from the run's own saved config: the work behind eval.py."""

import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from ml_collections import ConfigDict

from moe import cli, outputs
from moe import config as configs
from moe.errors import UsageError
from moe.evaluate import report
from moe.hosts import mesh as meshes
from moe.hosts.distributed import by_first, together
from moe.nn.memory import join
from moe.store.checkpoint import Checkpoints
from moe.store.workdir import saved_config
from moe.tasks import Task, task_of
from moe.train.agreement import agree
from moe.train.measure import evaluate, routing_table
from moe.train.pruned import Views
from moe.train.run import Run, set_up

# Overrides that change where an evaluation runs, and those that change what it measures. Any other
# key belongs to the function that the parameters were trained for, or to training.
WHERE = ("data.data_dir", "eval.batch_size", *(f"mesh.{axis}" for axis in meshes.AXES))
WHAT = ("data.name", "model.dtype", "moe.dispatch", "moe.dropless_bound", "moe.dropless_receive")
WHAT += ("moe.eval_capacity_factor", "depth.eval_bound")
HARDENED = ("prune.keep",)  # which a hardened evaluation may change too


class Files(NamedTuple):
    """Names where an evaluation is written: a plain one has plain names, any other its own."""

    result: pathlib.Path
    load: pathlib.Path
    experts: pathlib.Path  # where layers differ in how many a token gets
    pictures: list[pathlib.Path]  # of the task


def evaluate_run(
    workdir: pathlib.Path,
    *,
    step: int | None,
    split: str | None,
    overrides: dict[str, str],
    harden: bool = False,
) -> dict[str, Any]:
    """Evaluates one checkpoint, prints its tables, writes its numbers and pictures into `workdir`.

    The parameters are those that the model computed with at that step.

    Args:
      workdir: directory of a run.
      step: of the checkpoint; None for the newest.
      split: of the data set; None for the config's `data.eval_split`.
      overrides: config keys of `WHERE` and `WHAT`.
      harden: whether to keep exactly `prune.keep` of each matrix, see `moe.nn.pruning`.

    Raises:
      UsageError: no run or no readable checkpoint there, overrides that do not fit it, or a place
        that cannot be written to.
    """
    run, source = together(lambda: prepare(workdir, split, overrides, harden=harden))
    agree(run.config, source, step=step, **{"--harden": harden})
    newest = step is None
    params, own, step, damaged = restore(workdir, run, step, harden)
    for bad in damaged:
        print(f"checkpoint {bad} is damaged; using step {step}")
    plain = newest and source.split == run.config.data.eval_split
    settings = configs.flatten(run.config)
    changed = {key: settings[key] for key in what(run.task, harden) if key in overrides}
    suffix = ("" if plain else f"-{source.split}-{step}") + "-hardened" * harden
    files = name_files(workdir, suffix, changed, run.task.pictures)
    shown = (files.load, files.experts, *files.pictures)
    together(lambda: [outputs.check(file) for file in (files.result, *shown)])

    eval_step = run.jit(run.eval_step, out_shardings=run.replicated)
    total = evaluate(eval_step, params, run.eval_batches(source), run.put)
    values = run.task.scalars(total) | own
    if total["timed"]:
        values[f"{run.task.unit}s_per_second"] = float(total["timed"] / total["seconds"])
    layers = routing_table(total)
    examples = int(total["examples"])
    changes = "".join(f", {key}={value}" for key, value in overrides.items())
    changes += ", hardened" * harden
    title = f"{workdir}, step {step}: {source.name} {source.split}, {examples} examples{changes}"
    report.print_tables(title, values, layers)
    result = {
        "step": step,
        "data": source.name,
        "split": source.split,
        "examples": examples,
        "overrides": overrides,
        "hardened": harden,
        **values,
        "layers": layers,
    }
    by_first(lambda: outputs.write_json(files.result, result))
    print(f"wrote {files.result}")
    if layers and jax.process_count() > 1:
        print("pictures are drawn by one process: run eval.py on one host alone for them")
    elif layers:
        report.draw_load(files.load, {int(i): load for i, load in total["load"].items()})
        if len({round(row["experts_per_token"], 6) for row in layers.values()}) > 1:
            report.draw_experts(files.experts, layers)
        run.task.draw(run.config, run.graphdef, params, source, files.pictures)
        print(f"drew {' and '.join(str(file) for file in shown if file.exists())}")
    return result


def what(task: Task, harden: bool = False) -> tuple[str, ...]:
    """Returns the keys by which an evaluation may measure something else than the run's own."""
    return WHAT + task.overrides + HARDENED * harden


def name_files(
    workdir: pathlib.Path, suffix: str, changed: dict[str, Any], pictures: Sequence[str] = ()
) -> Files:
    """Returns the files of an evaluation: eval.json, or eval-SPLIT-STEP-KEY=VALUE.json."""
    suffix += "".join(f"-{key}={value}" for key, value in changed.items())
    suffix = re.sub(r"[^\w.=%+-]", "_", suffix)
    folder = workdir / f"pictures{suffix}"
    result = workdir / f"eval{suffix}.json"
    paths = [folder / name for name in pictures]
    return Files(result, folder / "load.png", folder / "experts.png", paths)


def prepare(
    workdir: pathlib.Path,
    split: str | None,
    overrides: dict[str, str],
    reads_data: bool = True,
    harden: bool = False,
):
    """Returns the run as it will be evaluated, and its data; reads nothing of the checkpoint.

    Without `reads_data` the data are None, and nobody looks for them.

    Raises:
      UsageError: no run is there, the overrides do not fit it, or it keeps all that it would
        `harden`.
    """
    saved = saved_config(workdir)
    if saved is None:
        raise UsageError(f"{workdir} holds no run (no config.json); train one with train.py")
    config = override(saved, overrides, harden)
    if harden and config.prune.keep == 1:
        raise UsageError(
            "--harden keeps config.prune.keep of each matrix, which is 1 in this run: say a share, "
            "such as --config.prune.keep=0.1"
        )
    source = None
    if reads_data:
        source = task_of(config).open(config, config.data.eval_split if split is None else split)
    run = set_up(config, source)
    _check_fit(saved, run)
    return run, source


def override(saved: ConfigDict, overrides: dict[str, str], harden: bool = False) -> ConfigDict:
    """Returns the saved config for the devices at hand, with overrides.

    Another data set brings its own sizes. The mesh is the run's where it fits the devices, else
    one like it; if any of its axes is asked for, the others have their defaults.

    Raises:
      UsageError: an unknown key, or one that evaluation cannot change.
    """
    cli.apply(saved.copy_and_resolve_references(), overrides)  # misspelt keys first
    task, may = task_of(saved), what(task_of(saved), harden) + WHERE
    for key in overrides:
        if key in HARDENED and not harden:
            raise UsageError(f"--config.{key} is of an evaluation with --harden; say that too")
        if key not in may:
            raise UsageError(
                f"--config.{key} cannot be changed: evaluation takes the model as it was trained; "
                f"it may change {', '.join(may)} (and the split by --split)"
            )
    config = saved.copy_and_resolve_references()
    devices, axes = jax.devices(), [f"mesh.{axis}" for axis in meshes.AXES]
    if any(axis in overrides for axis in axes):
        config.mesh.update(configs.default().mesh)
    else:
        config.mesh.update(meshes.shrink(saved.mesh, devices))
    groups = len(devices) * config.moe.group_size  # no fewer than any mesh asks for
    config.optimizer.accumulate, config.batch_size = 1, groups  # it will train on no batch
    config.optimizer.compress.keep = 1.0  # which also one device can
    config.eval.batch_size = _batch_size(saved, groups)
    if "data.name" in overrides:
        config.update_from_flattened_dict(
            {key: 0 for key in task.sizes if key not in task.overrides + task.kept}
        )
    return cli.apply(config, overrides)


def _batch_size(saved: ConfigDict, groups: int) -> int:
    """Returns the saved size, as far as the devices hold it: each no more than in training."""
    fixed = math.prod(max(saved.mesh[axis], 1) for axis in meshes.EXAMPLES)
    most = saved.eval.batch_size * len(jax.devices()) / fixed
    return math.ceil(min(saved.eval.batch_size, most) / groups) * groups


def restore(workdir: pathlib.Path, run: Run, step: int | None, harden: bool = False):
    """Reads the variables that evaluation uses, scalars of them, their step, and damaged ones.

    They are the parameters, or their average where the run keeps one, and the routers' memory; of a
    pruned run what the model computed with at that step, or what `harden` leaves.
    """
    key = "ema" if run.config.optimizer.ema_decay else "params"
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    like = {key: run.params} | ({"routers": run.memory} if run.memory else {})
    state, step, damaged = checkpoints.restore_newest(like, step)
    views, params = Views(run), state[key]
    params, own = views.hardened(params) if harden else views.effective(params, step)
    return join(params, state.get("routers", {})), own, step, damaged


def _check_fit(saved: ConfigDict, run: Run) -> None:
    """Raises UsageError where another data set or image size changes a parameter's shape."""
    model = nnx.eval_shape(lambda: task_of(saved).build(saved, nnx.Rngs(0)))
    trained = nnx.to_pure_dict(nnx.state(model))
    theirs, ours = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (trained, run.variables)
    )
    wrong = [name for name in theirs | ours if theirs.get(name) != ours.get(name)]
    if wrong:
        before, now = (shapes.get(wrong[0], "absent") for shapes in (theirs, ours))
        raise UsageError(
            f"the overrides do not fit the checkpoint: {wrong[0]} is {before} there and {now} here"
        )
