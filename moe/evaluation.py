"""Evaluates a checkpoint of a run from the run's own saved config: the work behind eval.py."""

import pathlib
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from moe import cli, report
from moe.agreement import agree
from moe.checkpoint import Checkpoints
from moe.data.transforms import fit, to_float
from moe.distributed import by_first, together
from moe.errors import UsageError
from moe.evaluate import evaluate, routing_table, scalars
from moe.model import build_model
from moe.run import Run, open_source, set_up
from moe.workdir import saved_config

PICTURES = 12  # images in the routing picture


def evaluate_run(
    workdir: pathlib.Path, *, step: int | None, split: str | None, overrides: dict[str, str]
) -> dict[str, Any]:
    """Evaluates one checkpoint, prints its tables, writes eval.json and pictures into `workdir`.

    Args:
      workdir: directory of a run.
      step: of the checkpoint; None for the newest.
      split: of the data set; None for the config's `data.eval_split`.
      overrides: config keys that change the evaluation, not the model.

    Raises:
      UsageError: no run or no readable checkpoint there, or overrides that do not fit it.
    """
    run, source = together(lambda: _prepare(workdir, split, overrides))
    agree(run.config, source, step=step)
    params, step, damaged = _restore(workdir, run, step)
    for bad in damaged:
        print(f"checkpoint {bad} is damaged; using step {step}")

    total = evaluate(run.eval_step(), params, run.eval_batches(source), run.put)
    values = scalars(total)
    if total["timed_examples"]:
        values["examples_per_second"] = float(total["timed_examples"] / total["seconds"])
    layers = routing_table(total, total["examples"])
    examples = int(total["examples"])
    title = f"{workdir}, step {step}: {source.name} {source.split}, {examples} examples"
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
    by_first(lambda: report.write_json(workdir / "eval.json", result))
    print(f"wrote {workdir / 'eval.json'}")
    if layers and jax.process_count() > 1:
        print("pictures are drawn by one process: run eval.py on one host alone for them")
    elif layers:
        _draw(workdir / "pictures", run, params, source, total)
    return result


def _prepare(workdir: pathlib.Path, split: str | None, overrides: dict[str, str]):
    """The run as it will be evaluated, and its data; nothing is read of the checkpoint."""
    saved = saved_config(workdir)
    if saved is None:
        raise UsageError(f"{workdir} holds no run (no config.json); train one with train.py")
    config = _override(saved, overrides)
    source = open_source(config, split or config.data.eval_split)
    run = set_up(config, source)
    _check_fit(saved, run)
    return run, source


def _override(saved: ConfigDict, overrides: dict[str, str]) -> ConfigDict:
    """The saved config with overrides; another data set brings its own sizes."""
    config = saved.copy_and_resolve_references()
    if "data.name" in overrides:
        config.data.num_classes = 0
    return cli.apply(config, overrides)


def _restore(workdir: pathlib.Path, run: Run, step: int | None):
    """The parameters that evaluation uses (the average, if the run keeps one), and their step."""
    key = "ema" if run.config.optimizer.ema_decay else "params"
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    state, step, damaged = checkpoints.restore_newest({key: run.params}, step)
    return state[key], step, damaged


def _check_fit(saved: ConfigDict, run: Run) -> None:
    """Overrides may change the data and the capacity, but no parameter's shape."""
    model = nnx.eval_shape(lambda: build_model(saved, nnx.Rngs(0)))
    theirs = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    shapes = [
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (theirs, run.params)
    ]
    wrong = [name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)]
    if wrong:
        there, here = (s.get(wrong[0], "absent") for s in shapes)
        raise UsageError(
            f"the overrides do not fit the checkpoint: {wrong[0]} is {there} there and {here} here"
        )


def _draw(directory: pathlib.Path, run: Run, params, source, total) -> None:
    """The load of each expert, and the first test image of each class with its patches' experts."""
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
    report.draw_patches(directory / "patches.png", np.stack(batch), titles, weights, has_cls)
    report.draw_load(directory / "load.png", {int(i): v for i, v in total["load"].items()})
    print(f"drew {directory / 'load.png'} and {directory / 'patches.png'}")
