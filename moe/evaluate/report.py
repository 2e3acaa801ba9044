"""Shows an evaluation to people: a table on the screen, and pictures of the routing."""

import pathlib

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from moe.tasks.pictures import save

PERCENT = {"calibration_error", "largest_share", "drop_rate", "nonzero_share"}


def print_tables(title: str, values: dict[str, float], layers: dict[int, dict[str, float]]) -> None:
    """Prints the scalars of an evaluation, and a row of routing for each layer of experts."""
    console = Console(highlight=False)
    print(title)
    table = Table("", "", show_header=False)
    for name, value in values.items():
        table.add_row(name.replace("_", " "), _text(name, value))
    console.print(table)
    if layers:
        columns = list(dict.fromkeys(c for row in layers.values() for c in row))
        table = Table("block", *(c.replace("_", " ") for c in columns))
        for layer, row in layers.items():
            table.add_row(str(layer), *(_text(c, row.get(c, "")) for c in columns))
        console.print(table)


def draw_load(path: pathlib.Path, load: dict[int, np.ndarray]) -> None:
    """Draws each expert's share of its layer's tokens, in units of the fair share 1/E.

    Layers with fewer experts than others end earlier; one that no token passed is empty.
    """
    grid = np.full((len(load), max(map(len, load.values()))), np.nan)
    for row, v in zip(grid, load.values(), strict=True):
        row[: len(v)] = np.asarray(v) / max(np.sum(v), 1e-30) * len(v)
    figure, axis = plt.subplots(figsize=(1.5 + 0.55 * grid.shape[1], 1.2 + 0.55 * grid.shape[0]))
    image = axis.imshow(grid, cmap="RdBu_r", vmin=0, vmax=2)
    if grid.size <= 512:
        for (row, column), value in np.ndenumerate(grid):
            shown = "" if np.isnan(value) else f"{value:.2f}"
            axis.text(column, row, shown, ha="center", va="center", fontsize=7)
    axis.set_yticks(range(len(load)), [f"block {i}" for i in load])
    axis.set_xticks(range(grid.shape[1]))
    axis.set_xlabel("expert")
    axis.set_title("load of the experts (1 = fair share)", fontsize=9)
    figure.colorbar(image, ax=axis, fraction=0.03)
    save(figure, path)


def draw_experts(path: pathlib.Path, layers: dict[int, dict[str, float]]) -> None:
    """Draws how many experts a token was sent to in each layer, and its share of the budget."""
    figure, axis = plt.subplots(figsize=(1.5 + 0.6 * len(layers), 3))
    places, names = range(len(layers)), [f"block {i}" for i in layers]
    axis.bar(places, [row["experts_per_token"] for row in layers.values()], color="tab:blue")
    if all("budget" in row for row in layers.values()):
        shares = [row["budget"] for row in layers.values()]
        axis.plot(places, shares, "D--", color="black", label="k, of one budget")
        axis.axhline(sum(shares) / len(shares), color="grey", lw=0.8, label="mean k")
        axis.legend(fontsize=8, frameon=False)
    axis.set_xticks(places, names, rotation=90 if len(layers) > 6 else 0)
    axis.set_ylabel("experts per token")
    axis.grid(axis="y", alpha=0.3)
    save(figure, path)


def _text(name: str, value) -> str:
    if isinstance(value, str | int):
        return f"{value}"
    if name in PERCENT or name.endswith("accuracy"):
        return f"{value:.2%}"
    return f"{value:,.0f}" if name.endswith("per_second") else f"{value:.4f}"
