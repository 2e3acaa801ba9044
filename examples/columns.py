"""Makes the tables of an example with several numbers for each arm: a column each."""

import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence

from examples import report
from examples.report import Metric
from moe import outputs


def markdown(
    results: Sequence[dict], metrics: Sequence[Metric], reference: str, names: Mapping[str, str]
) -> str:
    """Returns a row for each arm: mean ± standard deviation, and better or worse if it is.

    Both are said of differences to the reference of runs with the same seed, whose p-values are
    Holm-corrected over the arms of a column; nothing is said where they do not tell them apart.

    Args:
      results: of runs, each with "arm", "width", "seed", "seconds" and the metrics' keys.
      names: of the arms.
    """
    columns = [report.rows(results, metric, reference) for metric in metrics]
    titles = ["arm", *(metric.title for metric in metrics), "seconds"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for rows in zip(*columns, strict=True):
        cells = [names[rows[0].arm]]
        cells += [_cell(row, metric) for row, metric in zip(rows, metrics, strict=True)]
        lines.append("| " + " | ".join([*cells, f"{rows[0].seconds:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def differences(
    results: Sequence[dict], metrics: Sequence[Metric], reference: str, names: Mapping[str, str]
) -> str:
    """Returns a row for each arm but the reference: its paired differences, with 95 % intervals.

    Empty where nothing is compared. The arguments are those of `markdown`; intervals are not
    corrected for their number.
    """
    columns = [report.rows(results, metric, reference) for metric in metrics]
    first = f"difference to {names.get(reference, reference)}"
    titles = [first, *(metric.title for metric in metrics)]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for rows in zip(*columns, strict=True):
        if rows[0].difference:
            found = zip(rows, metrics, strict=True)
            cells = [report.difference_cell(row.difference, metric) for row, metric in found]
            lines.append("| " + " | ".join([names[rows[0].arm], *cells]) + " |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def show(
    results: Sequence[dict],
    metrics: Sequence[Metric],
    reference: str,
    names: Mapping[str, str],
    note: str,
    out: pathlib.Path,
    draw: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Prints the note and both tables; writes table.md, results.csv and picture.png into `out`.

    Args:
      draw: writes the picture into a file; None: of the first metric.
    """
    if draw:
        outputs.write(out / "picture.png", draw)
    else:
        found = report.rows(results, metrics[0], reference)
        report.draw(found, metrics[0], reference, out / "picture.png")
    parts = [note, *(make(results, metrics, reference, names) for make in (markdown, differences))]
    report.write(results, "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n", out)


def _cell(row: report.Row, metric: Metric) -> str:
    values = [value * (100 if metric.percent else 1) for value in row.values.values()]
    digits = 2 if metric.percent else 4
    text = f"{statistics.fmean(values):.{digits}f}" + " %" * metric.percent
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return f"{text}, {row.verdict}" if row.verdict in ("better", "worse") else text
