"""This project and its peers on the same inputs, in one process.

python -m benchmarks [--quick] [--only=NAME] [--out=DIR]

Writes DIR/*.csv, DIR/*.png and DIR/tables.md. A peer that is not installed becomes a row that says
so. Where JAX has an accelerator, the same command measures it.
"""

import argparse
import pathlib
import sys
import time

from benchmarks import (
    accelerator,
    accuracy,
    convergence,
    depth,
    exactly_k,
    machine,
    memory,
    moe_layer,
    regression,
    report,
    scaling,
    topk,
    trainers,
    weights,
)

SECTIONS = {
    "topk": topk,
    "scaling": scaling,
    "accuracy": accuracy,
    "regression": regression,
    "convergence": convergence,
    "moe_layer": moe_layer,
    "depth": depth,
    "memory": memory,
    "exactly_k": exactly_k,
    "accelerator": accelerator,
    "weights": weights,
    "trainers": trainers,
}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--only", choices=SECTIONS, help="one section; writes tables-NAME.md")
    parser.add_argument(
        "--out", type=pathlib.Path, help="default docs/benchmarks, or runs/benchmarks with --quick"
    )
    flags = parser.parse_args(argv)
    sys.stdout.reconfigure(line_buffering=True)
    out = flags.out or pathlib.Path("runs/benchmarks" if flags.quick else "docs/benchmarks")
    run([flags.only] if flags.only else list(SECTIONS), out, flags.quick)


def run(names: list[str], out: pathlib.Path, quick: bool) -> None:
    """Runs the sections in turn; each has written its files before the next starts."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / ("tables.md" if names == list(SECTIONS) else f"tables-{'-'.join(names)}.md")
    facts = machine.describe()
    if quick:
        facts["sizes"] = "small ones only (--quick)"
    text = "# Benchmarks\n\n" + "".join(f"- {name}: {fact}\n" for name, fact in facts.items())
    print(text)
    for name in names:
        start = time.perf_counter()
        print(f"{name}:")
        tables = SECTIONS[name].tables(quick)
        for table in tables:
            report.write_csv(table, out)
            text += "\n" + report.markdown(table)
        if hasattr(SECTIONS[name], "plot"):
            SECTIONS[name].plot(tables, out)
        file.write_text(text)
        print(f"{name}: {time.perf_counter() - start:.0f} s\n")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
