"""Draws a comparison: the rows with their seeds, learning curves, and what the layers did."""

import pathlib
import statistics
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from moe.evaluate.league.standings import Entry, Standing
from moe.tasks import Metric
from moe.tasks.pictures import save

CURVES, LAYERS = "curves.png", "layers.png"
# Of the layers' scalars, those that say what routing did.
_SHOWN = {
    "max_over_mean_load": "load of the busiest expert (1 = even)",
    "experts_per_token": "experts per token",
    "drop_rate": "routing weight without a slot",
    "budget": "k of the layer, where it is learnt",
}


def draw_rows(
    path: pathlib.Path, entries: Sequence[Entry], rows: Sequence[Standing], metric: Metric
) -> None:
    """Draws each seed, the mean and the standard deviation of each row."""
    figure, axis = plt.subplots(figsize=(6, 0.5 + 0.45 * len(rows)))
    for i, (entry, row) in enumerate(zip(entries, rows, strict=True)):
        values = list(entry.values.values())
        axis.scatter(values, [i] * len(values), color="tab:blue", alpha=0.5)
        axis.errorbar(row.mean, i, xerr=row.deviation, fmt="D", color="black", capsize=4)
    axis.set_yticks(range(len(rows)), [row.name for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel(f"test {metric.title}: each seed, mean and standard deviation")
    axis.grid(axis="x", alpha=0.3)
    save(figure, path)


def draw_curves(path: pathlib.Path, entries: Sequence[Entry], metric: Metric) -> None:
    """Draws the metric against steps and against FLOPs: the mean, and from least to most."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    columns = ((0, "step"), (2, "training FLOPs"))
    for axis, (column, title) in zip(axes, columns, strict=True):
        for number, entry in enumerate(entries):
            xs, ys = _mean_curve(entry, column)
            colour = _colour(number, len(entries))
            axis.plot(xs, ys.mean(1), "o-", markersize=3, color=colour, label=entry.name)
            axis.fill_between(xs, ys.min(1), ys.max(1), color=colour, alpha=0.15, linewidth=0)
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"test {metric.title}")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    save(figure, path)


def _mean_curve(entry: Entry, column: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a column's means at the steps that all seeds evaluated, and the values there."""
    curves = [{int(point[0]): point for point in run.curve} for run in entry.results]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    xs = np.array([[curve[step][column] for curve in curves] for step in steps]).mean(1)
    return xs, np.array([[curve[step][1] for curve in curves] for step in steps])


def draw_layers(path: pathlib.Path, entries: Sequence[Entry]) -> bool:
    """Draws, of the last evaluation, each layer's load and experts per token, the seeds' mean.

    Returns whether a row has layers of experts; without one nothing is drawn.
    """
    sparse = [entry for entry in entries if any(run.layers for run in entry.results)]
    if not sparse:
        return False
    found = {layer for entry in sparse for run in entry.results for layer in run.layers}
    layers = sorted(found, key=int)
    all_of = [own for entry in sparse for run in entry.results for own in run.layers.values()]
    names = {name for own in all_of for name, value in own.items() if value}
    shown = {name: title for name, title in _SHOWN.items() if name in names}
    width = 1.5 + 0.12 * len(sparse) * len(layers)
    size = (max(9, len(shown) * width), 3.2)
    figure, (axes,) = plt.subplots(1, len(shown), figsize=size, squeeze=False)
    for axis, (name, title) in zip(axes, shown.items(), strict=True):
        for number, entry in enumerate(sparse):
            heights = [_layer_mean(entry, layer, name) for layer in layers]
            offset = (number - (len(sparse) - 1) / 2) * 0.8 / len(sparse)
            places = np.arange(len(layers)) + offset
            colour = _colour(entries.index(entry), len(entries))
            axis.bar(places, heights, 0.8 / len(sparse), color=colour, label=entry.name)
        axis.set_xticks(range(len(layers)), [f"block {layer}" for layer in layers])
        axis.set_title(title, fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    axes[0].axhline(1, color="black", linewidth=0.8)
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    save(figure, path)
    return True


def _layer_mean(entry: Entry, layer: str, name: str) -> float:
    values = [run.layers[layer][name] for run in entry.results if name in run.layers.get(layer, {})]
    return statistics.fmean(values) if values else 0.0


def _colour(number: int, count: int):
    if count > 20:
        return plt.get_cmap("turbo")(number / (count - 1))
    return plt.get_cmap("tab10" if count <= 10 else "tab20")(number)
