"""Draws examples with the experts that their tokens went to."""

import pathlib

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from moe import outputs


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
    experts = max(weight.shape[-1] for weight in weights.values())
    colours = plt.get_cmap("tab10" if experts <= 10 else "tab20")
    figure, axes = plt.subplots(rows, columns, figsize=(1.2 * columns, 1.3 * rows), squeeze=False)
    for axis, image, title in zip(axes[0], images, titles, strict=True):
        picture = np.clip((image + 1) / 2, 0, 1)
        axis.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray")
        axis.set_title(title, fontsize=8)
    for row, (layer, weight) in zip(axes[1:], weights.items(), strict=True):
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
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours(e % colours.N)) for e in range(experts)]
    if len(handles) <= 20:
        labels = [str(e) for e in range(len(handles))]
        figure.legend(handles, labels, title="expert", loc="center right", fontsize=8)
        figure.subplots_adjust(right=1 - 0.9 / (1.2 * columns))
    save(figure, path)


def save(figure, path: pathlib.Path) -> None:
    """Writes a picture whole, and closes it."""
    outputs.write(path, lambda fresh: figure.savefig(fresh, dpi=130, bbox_inches="tight"))
    plt.close(figure)
