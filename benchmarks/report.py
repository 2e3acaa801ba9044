"""Tables as CSV and markdown, and what all plots share."""

import csv
import pathlib
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

SOLID_THEN_DASHED = ("-", "--", ":")


class Table(NamedTuple):
    """Rows of one section; the CSV has every column, the markdown those of `show`."""

    name: str  # of the CSV file
    title: str
    note: str  # a paragraph: what was measured, and how to read it
    show: tuple[str, ...]
    rows: list[dict]


def write_csv(table: Table, out: pathlib.Path) -> None:
    """DIR/NAME.csv, with every column that any row has."""
    columns = list(dict.fromkeys(column for row in table.rows for column in row))
    with (out / f"{table.name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.rows)


def markdown(table: Table) -> str:
    """Returns a heading, the note and the table."""
    lines = [f"## {table.title}", "", table.note, "", _line(table.show)]
    lines.append(_line("---" for _ in table.show))
    lines += [_line(_text(row.get(column)) for column in table.show) for row in table.rows]
    return "\n".join(lines) + "\n"


def _line(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def _text(value) -> str:
    """Three digits of a number; what would break a table's cell is escaped."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value).replace("|", "\\|")
    if value == 0 or 1e-2 <= abs(value) < 1e3:
        return f"{value:.3g}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.1e}"


def styles(names) -> dict[str, dict]:
    """Returns a colour and a kind of line for each name, the same in every panel."""
    colours = plt.get_cmap("tab10").colors
    return {
        name: {"color": colours[i % 10], "linestyle": SOLID_THEN_DASHED[i // 10 % 3]}
        for i, name in enumerate(dict.fromkeys(names))
    }


def panels(titles, xlabel: str, ylabel: str):
    """Makes a figure with one log-log panel for each title, and returns it with their axes."""
    columns = 3 if len(titles) == 3 else min(2, len(titles))
    lines = -(-len(titles) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.2 * columns, 3.7 * lines), squeeze=False, sharey=True
    )
    axes = list(axes.flat)
    for spare in axes[len(titles) :]:
        spare.set_visible(False)
    for axis, title in zip(axes, titles, strict=False):
        axis.set(xscale="log", yscale="log", title=title, xlabel=xlabel)
        axis.grid(alpha=0.3)
        axis.xaxis.set_minor_formatter(NullFormatter())
    for axis in axes[: len(titles) : columns]:
        axis.set_ylabel(ylabel)
    return figure, axes[: len(titles)]


def save(figure, axes, path: pathlib.Path) -> None:
    """Writes the figure, with one legend for all panels beside them."""
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.tight_layout()
    figure.legend(
        handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1, 0.5), frameon=False
    )
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
