"""How the time of a top-k mask grows with the length of a row, at an equal number of scores."""

from benchmarks.candidates import candidates
from benchmarks.report import Table, panels, save, styles
from benchmarks.topk import SHOW, Size, compare

SCORES = 2**17
NAMES = ("hard", "mask p=2", "mask p=4/3", "magnitude p=2", "dykstra 500, p=2")
NAMES += ("jaxopt box section, p=2", "softjax, p=2", "softjax, p=4/3", "ott topk_mask")
NAMES += ("torch.topk, hard",)


def tables(quick: bool) -> list[Table]:
    """Returns rows of the chosen candidates at n = 16, 64, ..., 65536."""
    scores, lengths = (2**12, (16, 64)) if quick else (SCORES, [4**i for i in range(2, 9)])
    sizes = [Size(max(1, scores // n), n, max(2, n // 8)) for n in lengths]
    found = [c for c in candidates() if c.name in NAMES]
    rows = compare(found, sizes, 0.3 if quick else 6.0)
    note = f"{scores} scores in rows of n, k = max(2, n/8). Columns as for the masks."
    return [Table("scaling", "Time against the length of a row", note, SHOW, rows)]


def plot(tables: list[Table], out) -> None:
    """Draws scaling.png, milliseconds against n."""
    rows = [row for row in tables[0].rows if "ms" in row]
    scores = rows[0]["rows"] * rows[0]["n"]
    figure, axes = panels(
        [f"top-k mask of {scores:,} scores, forward + backward"], "length of a row, n", "ms"
    )
    for name, style in styles(row["candidate"] for row in rows).items():
        mine = [row for row in rows if row["candidate"] == name]
        mine = [[row[column] for row in mine] for column in ("n", "ms")]
        axes[0].plot(*mine, marker="o", markersize=4, label=name, **style)
    save(figure, axes, out / "scaling.png")
