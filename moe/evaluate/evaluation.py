"""Evaluates a checkpoint of a run from the run's own saved config: the work behind eval.py."""

import math
import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from moe import cli
from moe import config as configs
from moe.data.source import ImageSource
from moe.data.transforms import fit, to_float
from moe.errors import UsageError
from moe.evaluate import report
from moe.hosts import mesh as meshes
from moe.hosts.distributed import by_first, together
from moe.models.build import build_model
from moe.store import outputs
from moe.store.checkpoint import Checkpoints
from moe.store.workdir import saved_config
from moe.train.agreement import agree
from moe.train.measure import evaluate, routing_table, scalars
from moe.train.run import Run, open_source, set_up

PICTURES = 12  # images in the routing picture
# Overrides that change where an evaluation runs, and those that change what it measures. Any other
# key belongs to the function that the parameters were trained for, or to training.
WHERE = ("data.data_dir", "eval.batch_size", *(f"mesh.{axis}" for axis in meshes.AXES))
WHAT = ("data.name", "data.image_size", "model.dtype", "moe.dispatch", "moe.dropless_bound")
WHAT += ("moe.dropless_receive", "moe.eval_capacity_factor")


class Files(NamedTuple):
    """Names where an evaluation is written: a plain one has plain names, any other its own."""

    result: pathlib.Path
    load: pathlib.Path
    patches: pathlib.Path


def evaluate_run(
    workdir: pathlib.Path, *, step: int | None, split: str | None, overrides: dict[str, str]
) -> dict[str, Any]:
    """Evaluates one checkpoint, prints its tables, writes its numbers and pictures into `workdir`.

    Args:
      workdir: directory of a run.
      step: of the checkpoint; None for the newest.
      split: of the data set; None for the config's `data.eval_split`.
      overrides: config keys of `WHERE` and `WHAT`.

    Raises:
      UsageError: no run or no readable checkpoint there, overrides that do not fit it, or a place
        that cannot be written to.
    """
    run, source = together(lambda: _prepare(workdir, split, overrides))
    agree(run.config, source, step=step)
    newest = step is None
    params, step, damaged = _restore(workdir, run, step)
    for bad in damaged:
        print(f"checkpoint {bad} is damaged; using step {step}")
    plain = newest and source.split == run.config.data.eval_split
    settings = configs.flatten(run.config)
    changed = {key: settings[key] for key in WHAT if key in overrides}
    files = name_files(workdir, "" if plain else f"-{source.split}-{step}", changed)
    together(lambda: [outputs.check(file) for file in files])

    total = evaluate(run.eval_step(), params, run.eval_batches(source), run.put)
    values = scalars(total)
    if total["timed_examples"]:
        values["examples_per_second"] = float(total["timed_examples"] / total["seconds"])
    layers = routing_table(total, total["examples"])
    examples = int(total["examples"])
    changes = "".join(f", {key}={value}" for key, value in overrides.items())
    title = f"{workdir}, step {step}: {source.name} {source.split}, {examples} examples{changes}"
    report.print_tables(title, values, layers)
    result = {
        "step": step,
        "data": source.name,
        "split": source.split,
        "examples": examples,
        "overrides": overrides,
        **values,
        "layers": layers,
    }
    by_first(lambda: outputs.write_json(files.result, result))
    print(f"wrote {files.result}")
    if layers and jax.process_count() > 1:
        print("pictures are drawn by one process: run eval.py on one host alone for them")
    elif layers:
        _draw(files, run, params, source, total)
    return result


def name_files(workdir: pathlib.Path, suffix: str, changed: dict[str, Any]) -> Files:
    """Returns the files of an evaluation: eval.json, or eval-SPLIT-STEP-KEY=VALUE.json."""
    suffix += "".join(f"-{key}={value}" for key, value in changed.items())
    suffix = re.sub(r"[^\w.=%+-]", "_", suffix)
    pictures = workdir / f"pictures{suffix}"
    return Files(workdir / f"eval{suffix}.json", pictures / "load.png", pictures / "patches.png")


def _prepare(workdir: pathlib.Path, split: str | None, overrides: dict[str, str]):
    """Returns the run as it will be evaluated, and its data; reads nothing of the checkpoint."""
    saved = saved_config(workdir)
    if saved is None:
        raise UsageError(f"{workdir} holds no run (no config.json); train one with train.py")
    config = override(saved, overrides)
    source = open_source(config, config.data.eval_split if split is None else split)
    run = set_up(config, source)
    _check_fit(saved, run)
    return run, source


def override(saved: ConfigDict, overrides: dict[str, str]) -> ConfigDict:
    """Returns the saved config for the devices at hand, with overrides.

    Another data set brings its own sizes. The mesh is the run's where it fits the devices, else
    one like it; if any of its axes is asked for, the others have their defaults.

    Raises:
      UsageError: an unknown key, or one that evaluation cannot change.
    """
    cli.apply(saved.copy_and_resolve_references(), overrides)  # misspelt keys first
    for key in overrides:
        if key not in WHERE + WHAT:
            raise UsageError(
                f"--config.{key} cannot be changed: evaluation takes the model as it was trained; "
                f"it may change {', '.join(WHAT + WHERE)} (and the split by --split)"
            )
    config = saved.copy_and_resolve_references()
    devices, axes = jax.devices(), [f"mesh.{axis}" for axis in meshes.AXES]
    if any(axis in overrides for axis in axes):
        config.mesh.update(configs.default().mesh)
    else:
        config.mesh.update(meshes.shrink(saved.mesh, devices))
    groups = len(devices) * config.moe.group_size  # no fewer than any mesh asks for
    config.optimizer.accumulate, config.batch_size = 1, groups  # it will train on no batch
    config.eval.batch_size = _batch_size(saved, groups)
    if "data.name" in overrides:
        config.data.num_classes = 0
    return cli.apply(config, overrides)


def _batch_size(saved: ConfigDict, groups: int) -> int:
    """Returns the saved size, as far as the devices hold it: each no more than in training."""
    fixed = math.prod(max(saved.mesh[axis], 1) for axis in meshes.EXAMPLES)
    most = saved.eval.batch_size * len(jax.devices()) / fixed
    return math.ceil(min(saved.eval.batch_size, most) / groups) * groups


def _restore(workdir: pathlib.Path, run: Run, step: int | None):
    """Reads what evaluation uses, the parameters' average where the run keeps one, and its step."""
    key = "ema" if run.config.optimizer.ema_decay else "params"
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    state, step, damaged = checkpoints.restore_newest({key: run.params}, step)
    return state[key], step, damaged


def _check_fit(saved: ConfigDict, run: Run) -> None:
    """Raises UsageError where another data set or image size changes a parameter's shape."""
    model = nnx.eval_shape(lambda: build_model(saved, nnx.Rngs(0)))
    trained = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    theirs, ours = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (trained, run.params)
    )
    wrong = [name for name in theirs | ours if theirs.get(name) != ours.get(name)]
    if wrong:
        before, now = (shapes.get(wrong[0], "absent") for shapes in (theirs, ours))
        raise UsageError(
            f"the overrides do not fit the checkpoint: {wrong[0]} is {before} there and {now} here"
        )


def _draw(files: Files, run: Run, params, source: ImageSource, total) -> None:
    """Draws each expert's load, and the first image of each class with its patches' experts."""
    labels = np.array([source[i]["label"] for i in range(min(len(source), 1000))])
    first = [int(np.flatnonzero(labels == c)[0]) for c in np.unique(labels)][:PICTURES]
    size = run.config.data.image_size
    batch = [to_float(fit(source[i]["image"], size)) for i in first]
    forward = jax.jit(lambda params, images: nnx.merge(run.graphdef, params)(images))
    # A group is whole examples: the picture's are repeated to fill it.
    repeat = run.config.moe.group_size
    out = forward(params, np.repeat(np.stack(batch), repeat, axis=0))
    weights = {i: np.asarray(r.weights_BTE[::repeat]) for i, r in out.reports.items()}
    predicted = np.asarray(out.logits[::repeat].argmax(-1))
    names = source.class_names
    titles = [
        names[p] if p == labels[i] else f"{names[p]} (is {names[labels[i]]})"
        for i, p in zip(first, predicted, strict=True)
    ]
    has_cls = run.config.model.pool == "cls"
    report.draw_patches(files.patches, np.stack(batch), titles, weights, has_cls)
    report.draw_load(files.load, {int(i): v for i, v in total["load"].items()})
    print(f"drew {files.load} and {files.patches}")
