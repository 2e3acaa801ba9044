"""Makes one table and one picture of an example's runs: means, deviations, paired differences."""

import csv
import pathlib
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from moe import outputs
from moe.evaluate.league.paired import Difference, difference, holm, verdict


class Metric(NamedTuple):
    """Names a number of every run: larger is better unless `higher` is False."""

    key: str
    title: str
    higher: bool = True
    percent: bool = False


class Row(NamedTuple):
    """Holds an arm's values by seed, and what they say against the reference."""

    arm: str
    width: float
    values: dict[int, float]
    seconds: float
    difference: Difference | None
    verdict: str


def choose_widths(results: Sequence[dict], key: str) -> list[dict]:
    """Returns the results of each arm at the width whose mean `key` (of validation) is largest."""
    scores: dict[str, dict[float, list[float]]] = {}
    for result in results:
        scores.setdefault(result["arm"], {}).setdefault(result["width"], []).append(result[key])
    best = {
        arm: max(widths, key=lambda width: statistics.fmean(widths[width]))
        for arm, widths in scores.items()
    }
    return [result for result in results if result["width"] == best[result["arm"]]]


def rows(results: Sequence[dict], metric: Metric, reference: str) -> list[Row]:
    """Returns a row for each arm, in the order of the results.

    Differences to the reference are of runs with the same seed, with 95 % intervals of Student's
    distribution; the verdicts are Holm-corrected over the rows.
    """
    arms = list(dict.fromkeys(result["arm"] for result in results))
    own = {arm: [result for result in results if result["arm"] == arm] for arm in arms}
    values = {arm: {result["seed"]: result[metric.key] for result in own[arm]} for arm in arms}
    others = [arm for arm in arms if arm != reference and reference in arms]
    found = {arm: difference(values[arm], values[reference]) for arm in others}
    adjusted = dict(zip(others, holm([one and one.p for one in found.values()]), strict=True))
    return [
        Row(
            arm,
            own[arm][0]["width"],
            values[arm],
            statistics.fmean(result["seconds"] for result in own[arm]),
            found.get(arm),
            verdict(found[arm], adjusted[arm], metric.higher) if arm in found else "",
        )
        for arm in arms
    ]


def markdown(found: Sequence[Row], metric: Metric, reference: str) -> str:
    """Returns the table: mean and standard deviation, and the difference with its interval."""
    lines = [
        f"| arm | width | seeds | {metric.title} | difference to {reference} | verdict | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        cells = [
            f"`{row.arm}`",
            f"{row.width:g}" if row.width else "",
            str(len(row.values)),
            _mean(list(row.values.values()), metric),
            difference_cell(row.difference, metric),
            row.verdict,
            f"{row.seconds:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float], metric: Metric) -> str:
    text = _number(statistics.fmean(values), metric)
    if len(values) > 1:
        text += f" ± {_number(statistics.stdev(values), metric)}"
    return text


def difference_cell(found: Difference | None, metric: Metric) -> str:
    """Returns a difference with its interval, empty where there is none."""
    if found is None:
        return ""
    text = _number(found.mean, metric, "+")
    if found.low is not None and found.high is not None:
        low, high = (_number(end, metric, "+") for end in (found.low, found.high))
        text += f" ({low} to {high})"
    return text


def _number(value: float, metric: Metric, sign: str = "") -> str:
    return f"{100 * value:{sign}.2f} %" if metric.percent else f"{value:{sign}.4f}"


def draw(found: Sequence[Row], metric: Metric, reference: str, file: pathlib.Path) -> None:
    """Writes a picture: for each arm its seeds as points, their mean as a bar, the reference."""
    height = 0.9 + 0.3 * len(found)
    figure, axis = plt.subplots(figsize=(7, height), layout="constrained")
    scale = 100 if metric.percent else 1
    for place, row in enumerate(found):
        values = [scale * value for value in row.values.values()]
        colour = "C3" if row.arm == reference else "C0"
        axis.plot(values, [place] * len(values), "o", color=colour, alpha=0.4, markersize=4)
        axis.plot(statistics.fmean(values), place, "|", color=colour, markersize=16, mew=2)
        if row.arm == reference:
            axis.axvline(statistics.fmean(values), color="0.85", zorder=0)
    axis.set_yticks(range(len(found)), [row.arm for row in found])
    axis.set_ylim(len(found) - 0.5, -0.5)  # the first arm on top, none at the edge
    axis.set_xlabel(f"{metric.title}, %" if metric.percent else metric.title)
    axis.spines[["top", "right"]].set_visible(False)
    outputs.write(file, lambda fresh: figure.savefig(fresh, dpi=130))
    plt.close(figure)


def show(
    results: Sequence[dict], metric: Metric, reference: str, out: pathlib.Path, note: str = ""
) -> str:
    """Prints the table and writes table.md, results.csv and picture.png into `out`."""
    found = rows(results, metric, reference)
    text = markdown(found, metric, reference)
    if note:
        text = f"{note}\n\n{text}"
    draw(found, metric, reference, out / "picture.png")
    write(results, text, out)
    return text


def write(results: Sequence[dict], text: str, out: pathlib.Path) -> None:
    """Writes table.md and results.csv, a line for each run, into `out`; prints the table."""
    columns = list(dict.fromkeys(key for result in results for key in result))

    def write_csv(fresh: pathlib.Path) -> None:
        with fresh.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(results)

    outputs.write(out / "results.csv", write_csv)
    outputs.write(out / "table.md", lambda fresh: fresh.write_text(text))
    print(f"\n{text}\nwrote {out}/table.md, results.csv and picture.png")
