"""Shows a comparison everywhere: its tables on the screen, its files, its pictures."""

import pathlib

from moe import outputs
from moe.evaluate.league import charts, stored, tables
from moe.evaluate.league.standings import budgets, standings
from moe.evaluate.league.stored import League
from moe.tasks import Task


def files_of(task: Task, out: pathlib.Path) -> list[pathlib.Path]:
    """Returns what a comparison writes beside its runs."""
    names = ("table.csv", "table.md", stored.FILE)
    names += (f"{task.best.name}.png", charts.CURVES, charts.LAYERS)
    return [out / name for name in names]


def write_tables(league: League, out: pathlib.Path) -> None:
    """Writes the tables of the runs that there are."""
    if not league.entries:
        return
    task, entries = league.learns, league.entries
    rows = standings(entries, league.baseline, task.best)
    texts = {
        "table.csv": tables.comma_separated(task, entries),
        "table.md": tables.markdown(task, entries, rows, league.baseline),
    }
    for name, text in texts.items():
        outputs.write(out / name, lambda fresh, text=text: fresh.write_text(text))
    stored.write(out, league, rows, budgets(entries))


def show(league: League, out: pathlib.Path) -> None:
    """Prints the tables, writes them, draws the pictures."""
    task, entries = league.learns, league.entries
    stored.check_alike(entries)
    rows = standings(entries, league.baseline, task.best)
    write_tables(league, out)
    tables.print_tables(task, entries, rows, league.baseline)
    if any(row.at_flops is None or row.at_seconds is None for row in rows):
        print(
            "at equal FLOPs or time there is nothing where a run has no evaluation before: more of "
            "them by --config.eval.every=N, in runs that are yet to come"
        )
    *written, picture, curves, layers = files_of(task, out)
    charts.draw_rows(picture, entries, rows, task.best)
    charts.draw_curves(curves, entries, task.best)
    written += [picture, curves] + [layers] * charts.draw_layers(layers, entries)
    print(f"wrote {', '.join(str(file) for file in written)}")
