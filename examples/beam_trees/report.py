"""Shows what the arms read right: a table with a column for each set, and a picture of it."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from examples import columns
from examples.report import Metric


def show(
    results: Sequence[dict],
    tests: Sequence[str],
    reference: str,
    names: Mapping[str, str],
    title: str,
    out: pathlib.Path,
) -> None:
    """Prints the tables, and writes table.md, results.csv and picture.png into `out`."""
    metrics = [Metric(test, test, percent=True) for test in tests]
    figure = draw(results, tests, names, title)
    columns.show(
        results, metrics, reference, names, title, out, lambda file: figure.savefig(file, dpi=130)
    )


def draw(results: Sequence[dict], tests: Sequence[str], names: Mapping[str, str], title: str):
    """Returns a figure with a line for each arm over the sets, its seeds as points."""
    figure = Figure((8, 4.5), layout="constrained")
    axis = figure.subplots()
    arms = list(dict.fromkeys(result["arm"] for result in results))
    for number, arm in enumerate(arms):
        own = [result for result in results if result["arm"] == arm]
        colour = "0.6" if arm == "commonest" else f"C{number}"
        means = [100 * statistics.fmean(result[test] for result in own) for test in tests]
        label = names[arm].replace("`", "")
        axis.plot(range(len(tests)), means, color=colour, label=label)
        for result in own:
            values = [100 * result[test] for test in tests]
            axis.plot(range(len(tests)), values, "o", color=colour, alpha=0.4, markersize=4)
    axis.set_xticks(range(len(tests)), tests)
    axis.set(title=title, ylabel="read right, %", ylim=(0, 102))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8)
    return figure
