"""Shows a comparison as tables: on the screen, in Markdown, and each run in CSV."""

import csv
import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from moe.evaluate.league.paired import LEVEL
from moe.evaluate.league.standings import PRUNED, Budgets, Entry, Standing, budgets
from moe.evaluate.league.stored import League

NONE = "-"
WIDTH = 160  # columns, where no terminal says it


def print_tables(league: League, rows: Sequence[Standing]) -> None:
    """Prints how good the rows are, what they cost, and where some are pruned, how far."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    for heads, lines in _tables(league, rows):
        shown = Table(*heads)
        for line in lines:
            shown.add_row(*line)
        console.print(shown)


def markdown(league: League, rows: Sequence[Standing]) -> str:
    """Returns the same tables as text that Markdown shows."""
    parts = []
    for heads, lines in _tables(league, rows):
        cells = [heads, ["---"] * len(heads), *lines]
        parts.append("".join(f"| {' | '.join(line)} |\n" for line in cells))
    missing = [
        f"- {entry.name}, seed {seed} failed: {' '.join(wrong.split())}\n"
        for entry in league.entries
        for seed, wrong in entry.failed.items()
    ]
    return "\n".join([*parts, "".join(missing)] if missing else parts)


def comma_separated(league: League) -> str:
    """Returns a line for each run, with the names of the columns first."""
    entries, text = league.entries, io.StringIO()
    spent, task = budgets(entries), league.learns
    lines = csv.writer(text, lineterminator="\n")
    name = league.metric.name
    heads = ["router", "seed", name, "loss", f"{task.unit}s_per_second", "training_flops"]
    heads += ["experts_per_token", f"{name}_at_equal_flops", f"{name}_at_equal_seconds"]
    pruned = PRUNED if any(run.kept is not None for e in entries for run in e.results) else ()
    heads += [f"pruned_{part}" for part in pruned]
    lines.writerow(heads)
    for entry in entries:
        rate = float("nan") if entry.rate is None else entry.rate
        for run in entry.results:
            experts = "" if run.experts is None else run.experts
            at = (spent.at_flops(run), spent.at_seconds(entry, run))
            at += tuple(getattr(run, part) for part in pruned)
            ends = ["" if value is None else value for value in at]
            lines.writerow(
                [entry.name, run.seed, run.value, run.loss, rate, run.flops, experts, *ends]
            )
    return text.getvalue()


def _tables(league: League, rows: Sequence[Standing]):
    tables = [_quality(league, rows), _cost(league, rows)]
    return [*tables, _pruned(league, rows)] if any(row.kept is not None for row in rows) else tables


def _quality(league: League, rows: Sequence[Standing]) -> tuple[list[str], list[list[str]]]:
    best = league.metric
    heads = ["router", f"test {best.title} ({_seeds(rows)})", "test loss"]
    heads += [f"difference to {league.baseline}", f"{LEVEL:.0%} interval", "p (Holm)", "verdict"]

    def line(row: Standing) -> list[str]:
        mean = f"{row.mean:{best.form}}"
        if row.deviation is not None:
            mean += f" ± {row.deviation:{best.form}}"
        if _uneven(rows):
            mean += f" ({row.seeds})"
        cells = [row.name, mean, f"{row.loss:.4f}"]
        found = row.difference
        if found is None:
            return [*cells, NONE, NONE, NONE, row.verdict]
        cells.append(f"{found.mean:+{best.form}}")
        between = NONE
        if found.low is not None:
            between = f"{found.low:+{best.form}} to {found.high:+{best.form}}"
        p = NONE if row.p_holm is None else f"{row.p_holm:.3f}"
        return [*cells, between, p, row.verdict]

    return heads, [line(row) for row in rows]


def _cost(league: League, rows: Sequence[Standing]):
    entries, unit = league.entries, league.learns.unit
    spent = budgets(entries)
    heads = ["router", f"at {_scaled(spent.flops, 'FLOPs')}", _time_head(spent)]
    heads += [f"FLOPs per {unit}", "experts per token", "parameters"]
    heads += [f"{unit}s/s", "training time"]
    tuned = any(entry.tuned for entry in entries)
    heads += ["chosen on validation"] * tuned

    def line(entry: Entry, row: Standing) -> list[str]:
        form = league.metric.form
        cells = [row.name, *(_or_none(v, form) for v in (row.at_flops, row.at_seconds))]
        cells += [_scaled(row.flops, ""), _or_none(row.experts, ".2f")]
        cells += [_or_none(entry.parameters, ",d"), _or_none(row.rate, ",.0f")]
        cells += [NONE if row.seconds is None else _time(row.seconds)]
        chosen = ", ".join(f"{key.split('.')[-1]}={v}" for key, v in entry.tuned.items())
        return cells + [chosen or NONE] * tuned

    return heads, [line(entry, row) for entry, row in zip(entries, rows, strict=True)]


def _pruned(league: League, rows: Sequence[Standing]) -> tuple[list[str], list[list[str]]]:
    """Returns of rows that are pruned what is left of them, and what they were in training."""
    title = league.metric.title
    heads = ["router", f"test {title}, hardened", "entries left"]
    heads += [f"test {title}, as trained", "entries not 0"]

    def line(row: Standing) -> list[str]:
        mean = f"{row.mean:{league.metric.form}}"
        if row.kept is None:  # nothing is pruned: both are one
            return [row.name, mean, "100%", mean, "100%"]
        shares = (f"{share:.3g}%" for share in (100 * row.kept, 100 * row.nonzero))
        left, nonzero = shares
        return [row.name, mean, left, f"{row.trained:{league.metric.form}}", nonzero]

    return heads, [line(row) for row in rows]


def _seeds(rows: Sequence[Standing]) -> str:
    counts = sorted({row.seeds for row in rows})
    if len(counts) == 1:
        return f"{counts[0]} seed{'s' * (counts[0] != 1)}"
    return f"{counts[0]} to {counts[-1]} seeds"


def _uneven(rows: Sequence[Standing]) -> bool:
    return len({row.seeds for row in rows}) > 1


def _time_head(spent: Budgets) -> str:
    return "at equal time" if spent.seconds is None else f"after {_time(spent.seconds)}"


def _or_none(value: float | None, form: str) -> str:
    return NONE if value is None else f"{value:{form}}"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _scaled(value: float, unit: str) -> str:
    """Returns 3.2e12 FLOPs as "3.2 TFLOPs"."""
    for power, letter in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".rstrip()
