"""Gradients that workers send in part, with a memory and without: what is lost, and what is saved.

python -m examples.compressed_gradients [--config=digits] [--steps=N] [--seeds=N] [--workers=N]
                                        [--split=classes] [--out=DIR] [--config.KEY=VALUE ...]

Trains one config on shards of `data`, on CPU so many made up, for each share that is sent and each
method of `optimizer.compress`. With --split=classes the images of a batch are dealt out in order of
their labels, so that each worker has two or so of ten classes; else as they come. The table has how
well each ends and the bytes that a worker sends. Runs lie in DIR, and those that are complete
are not trained again. Writes DIR/compressed_gradients.md and DIR/compressed_gradients.png.
"""

import argparse
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from moe import cli, outputs
from moe.errors import UsageError
from moe.tasks import TASKS, task_of
from moe.tasks.images import Images


class Arm(NamedTuple):
    """Names a setting of `optimizer.compress`."""

    keep: float
    method: str = ""  # "": without feedback

    @property
    def name(self) -> str:
        how = self.method or "no feedback"
        return "all" if self.keep == 1 else f"{self.keep:.1%}, {how}"

    @property
    def folder(self) -> str:
        return self.name.replace(", ", "-").replace(" ", "-")

    def settings(self) -> dict[str, Any]:
        settings = {"keep": self.keep, "feedback": bool(self.method)}
        return settings | ({"method": self.method} if self.method else {})


class ImagesByClass(Images):
    """Learns as its base does, from batches whose rows are in the order of their labels."""

    def train_batches(self, config, source, start_step: int, rows: Sequence[int]):
        for batch in super().train_batches(config, source, start_step, rows):
            order = np.argsort(batch["label"], kind="stable")
            yield {name: array[order] for name, array in batch.items()}


SPLITS = {"random": Images, "classes": ImagesByClass}
SHARES, METHODS = (0.1, 0.01, 0.001), ("", "ef", "ef21")
ARMS = (Arm(1.0), *(Arm(keep, method) for keep in SHARES for method in METHODS))


def make_devices(count: int) -> None:
    """Makes so many devices of a CPU, before JAX looks for any."""
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        import jax

        jax.config.update("jax_num_cpu_devices", count)


def train_all(config, seeds: int, out: pathlib.Path) -> dict[Arm, list[dict[str, float]]]:
    """Returns the last evaluations of each arm by seed, with "sent", a worker's bytes in a step."""
    from moe.plan.compression import measure  # late: the devices must be there first
    from moe.train.run import set_up
    from moe.train.trainer import train

    found: dict[Arm, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in range(seeds):
        for arm in ARMS:
            own = config.copy_and_resolve_references()
            own.seed = seed
            own.optimizer.compress.update(arm.settings())
            run = set_up(own, task_of(own).open(own, own.data.train_split))
            found[arm].append(train(own.lock(), out / arm.folder / str(seed)))
            if run.compressor:
                counted = measure(run.compressor, own.model.dtype)
                found[arm][seed]["sent"] = counted.sent
                found[ARMS[0]][seed]["sent"] = counted.whole
    return found


def table(found: dict[Arm, list[dict[str, float]]], metric: str) -> str:
    """Returns the rows as Markdown, means and standard deviations over seeds."""
    lines = [
        f"| sent | bytes of a worker a step | {metric.removeprefix('eval/')} | loss |",
        "|---|---|---|---|",
    ]
    for arm, seeds in found.items():
        best, loss = (np.array([row[key] for row in seeds]) for key in (metric, "eval/loss"))
        lines.append(
            f"| {arm.name} | {seeds[0]['sent'] / 1e3:,.1f} kB "
            f"| {best.mean():.2%} ± {best.std(ddof=1):.2%} "
            f"| {loss.mean():.4f} ± {loss.std(ddof=1):.4f} |"
        )
    return "\n".join(lines) + "\n"


def draw(out: pathlib.Path, file: pathlib.Path) -> None:
    """Draws the training loss of each arm, of the first seed."""
    from moe.store.records import read

    figure = Figure((11, 4), layout="constrained")
    axes = figure.subplots(1, len(SHARES), sharey=True)
    for share, axis in zip(SHARES, axes, strict=True):
        for arm in (ARMS[0], *(arm for arm in ARMS if arm.keep == share)):
            rows = read(out / arm.folder / "0" / "metrics.jsonl")
            points = [(r["step"], r["train/loss"]) for r in rows if "train/loss" in r]
            axis.plot(*zip(*points, strict=True), label=arm.name)
        axis.set(title=f"{share:.1%} sent", xlabel="step", yscale="log")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("training loss")
    outputs.write(file, lambda fresh: figure.savefig(fresh, dpi=110))


def main(argv) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.compressed_gradients",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--config", default="digits", help=cli.CONFIG_HELP)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--split", default="random", choices=SPLITS)
    parser.add_argument("--out", default="runs/compressed_gradients")
    flags, overrides = cli.parse(parser, argv)
    for name, least in (("seeds", 2), ("workers", 2)):
        if getattr(flags, name) < least:
            raise UsageError(f"--{name}={getattr(flags, name)}: expected {least} or more")
    out = cli.local_path(flags.out, "--out")
    files = out / "compressed_gradients.md", out / "compressed_gradients.png"
    for file in files:
        outputs.check(file)
    make_devices(flags.workers)
    shown = {"num_steps": str(flags.steps), "mesh.data": str(flags.workers), "log.every": "10"}
    shown |= {"eval.every": str(flags.steps), "checkpoint.every": str(flags.steps)}
    config = cli.load_config(flags.config, shown | overrides)
    if config.task != "images":
        raise UsageError(f"--config={flags.config} is of the task {config.task}: expected images")
    TASKS["images"] = SPLITS[flags.split]()
    found = train_all(config, flags.seeds, out)
    text = table(found, task_of(config).best.key)
    outputs.write(files[0], lambda fresh: fresh.write_text(text))
    draw(out, files[1])
    print(f"{text}wrote {files[0]} and {files[1]}")


if __name__ == "__main__":
    cli.run(main)
