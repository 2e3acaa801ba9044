"""Shows an evaluation to people: a table on the screen, and pictures of the routing."""

import pathlib

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from moe.store import outputs

PERCENT = {"accuracy", "top5_accuracy", "calibration_error", "largest_share", "drop_rate"}


def print_tables(title: str, values: dict[str, float], layers: dict[int, dict[str, float]]) -> None:
    """Prints the scalars of an evaluation, and a row of routing for each layer of experts."""
    console = Console(highlight=False)
    print(title)
    table = Table("", "", show_header=False)
    for name, value in values.items():
        table.add_row(name.replace("_", " "), _text(name, value))
    console.print(table)
    if layers:
        columns = list(next(iter(layers.values())))
        table = Table("block", *(c.replace("_", " ") for c in columns))
        for layer, row in layers.items():
            table.add_row(str(layer), *(_text(c, row[c]) for c in columns))
        console.print(table)


def draw_load(path: pathlib.Path, load: dict[int, np.ndarray]) -> None:
    """Draws each expert's share of its layer's tokens, in units of the fair share 1/E."""
    grid = np.stack([np.asarray(v) / np.sum(v) * len(v) for v in load.values()])
    figure, axis = plt.subplots(figsize=(1.5 + 0.55 * grid.shape[1], 1.2 + 0.55 * grid.shape[0]))
    image = axis.imshow(grid, cmap="RdBu_r", vmin=0, vmax=2)
    if grid.size <= 512:
        for (row, column), value in np.ndenumerate(grid):
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7)
    axis.set_yticks(range(len(load)), [f"block {i}" for i in load])
    axis.set_xticks(range(grid.shape[1]))
    axis.set_xlabel("expert")
    axis.set_title("load of the experts (1 = fair share)", fontsize=9)
    figure.colorbar(image, ax=axis, fraction=0.03)
    _save(figure, path)


def draw_patches(
    path: pathlib.Path,
    images: np.ndarray,
    titles: list[str],
    weights: dict[int, np.ndarray],
    has_cls: bool,
) -> None:
    """Draws test images, and below each, for every layer, its patches in their expert's colour.

    Args:
      images: float [N, S, S, channels] in [-1, 1].
      weights: for each layer [N, T, E]; a patch shows its heaviest expert, with the weight's share
        of the layer's largest as opacity; a patch that no expert took stays white.
    """
    rows, columns = 1 + len(weights), len(images)
    figure, axes = plt.subplots(rows, columns, figsize=(1.2 * columns, 1.3 * rows), squeeze=False)
    for axis, image, title in zip(axes[0], images, titles, strict=True):
        picture = np.clip((image + 1) / 2, 0, 1)
        axis.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray")
        axis.set_title(title, fontsize=8)
    for row, (layer, weight) in zip(axes[1:], weights.items(), strict=True):
        colours = plt.get_cmap("tab10" if weight.shape[-1] <= 10 else "tab20")
        patches = weight[:, has_cls:]
        side = round(patches.shape[1] ** 0.5)
        for axis, patch in zip(row, patches, strict=True):
            rgba = np.array(colours(patch.argmax(-1) % colours.N))
            rgba[:, 3] = np.sqrt(patch.max(-1) / max(weight.max(), 1e-30))
            axis.imshow(rgba.reshape(side, side, 4))
        row[0].set_ylabel(f"block {layer}", fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=colours(e % colours.N)) for e in range(weight.shape[-1])
    ]
    if len(handles) <= 20:
        labels = [str(e) for e in range(len(handles))]
        figure.legend(handles, labels, title="expert", loc="center right", fontsize=8)
        figure.subplots_adjust(right=1 - 0.9 / (1.2 * columns))
    _save(figure, path)


def _save(figure, path: pathlib.Path) -> None:
    outputs.write(path, lambda fresh: figure.savefig(fresh, dpi=130, bbox_inches="tight"))
    plt.close(figure)


def _text(name: str, value) -> str:
    if isinstance(value, str | int):
        return f"{value}"
    if name in PERCENT:
        return f"{value:.2%}"
    return f"{value:,.0f}" if name.endswith("per_second") else f"{value:.4f}"
