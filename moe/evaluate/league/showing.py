"""Shows a comparison everywhere: its tables on the screen, its files, its pictures."""

import pathlib

from moe import outputs
from moe.evaluate.league import charts, stored, tables
from moe.evaluate.league.standings import budgets, standings
from moe.evaluate.league.stored import League
from moe.tasks import Metric


def files_of(metric: Metric, out: pathlib.Path) -> list[pathlib.Path]:
    """Returns what a comparison writes beside its runs."""
    names = ("table.csv", "table.md", stored.FILE)
    names += (f"{metric.name}.png", charts.CURVES, charts.LAYERS)
    return [out / name for name in names]


def write_tables(league: League, out: pathlib.Path) -> None:
    """Writes the tables of the runs that there are."""
    if not league.entries:
        return
    rows = standings(league.entries, league.baseline, league.metric)
    texts = {
        "table.csv": tables.comma_separated(league),
        "table.md": tables.markdown(league, rows),
    }
    for name, text in texts.items():
        outputs.write(out / name, lambda fresh, text=text: fresh.write_text(text))
    stored.write(out, league, rows, budgets(league.entries))


def show(league: League, out: pathlib.Path) -> None:
    """Prints the tables, writes them, draws the pictures."""
    metric, entries = league.metric, league.entries
    stored.check_alike(entries)
    rows = standings(entries, league.baseline, metric)
    write_tables(league, out)
    tables.print_tables(league, rows)
    if any(row.at_flops is None or row.at_seconds is None for row in rows):
        print(
            "at equal FLOPs or time there is nothing where a run has no evaluation before: more of "
            "them by --config.eval.every=N, in runs that are yet to come"
        )
    *written, picture, curves, layers = files_of(metric, out)
    charts.draw_rows(picture, entries, rows, metric)
    charts.draw_curves(curves, entries, metric)
    written += [picture, curves] + [layers] * charts.draw_layers(layers, entries)
    print(f"wrote {', '.join(str(file) for file in written)}")
