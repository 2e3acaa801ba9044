"""What an exchange of weights needs: the peak of the host's memory, and time."""

import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from benchmarks.report import Table
from moe import cli
from moe.config import to_json
from moe.store import pieces
from moe.store.huggingface.shapes import shapes_of

SHOW = ("parameters", "what", "files", "file_mb", "run_mb", "peak_mib", "seconds")
NOTE = (
    "A Mixtral of random weights, as bfloat16 in files of at most 104 MB, and as a run in float32; "
    "each exchange in a process of its own. `peak_mib`: the most that it held, libraries included, "
    "which the model of some thousand parameters shows alone."
)
SMALL = {"model.width": "32", "model.mlp_dim": "64", "moe.expert_dim": "64", "model.depth": "2"}
SMALL |= {"model.num_heads": "4", "model.kv_heads": "2", "model.head_dim": "8"}
SMALL |= {"data.vocabulary": "512", "data.seq_len": "64", "model.scan": "false"}
LARGE = SMALL | {"model.width": "1024", "model.mlp_dim": "1536", "moe.expert_dim": "1536"}
LARGE |= {"model.depth": "6", "model.num_heads": "16", "model.kv_heads": "8"}
LARGE |= {"model.head_dim": "64", "data.vocabulary": "25088"}
EXCHANGE = """
import resource, sys, time
from moe.store.huggingface import tensors
from moe.store.huggingface.__main__ import main
tensors.SHARD = 104_000_000
start = time.perf_counter()
main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print("measured", peak, time.perf_counter() - start)
"""


def tables(quick: bool) -> list[Table]:
    """Returns a table of exports and imports, of a small model and a large one."""
    rows = []
    for sizes in (SMALL,) if quick else (SMALL, LARGE):
        with tempfile.TemporaryDirectory() as folder:
            rows += _exchange(pathlib.Path(folder), sizes)
    return [Table("weights", "Weights in and out", NOTE, SHOW, rows)]


def _exchange(folder: pathlib.Path, sizes: dict[str, str]) -> list[dict]:
    """Exports a random run and imports what came out; a row for each."""
    count = _make_run(folder / "run", sizes)
    rows, there = [], folder / "there"
    for what, source, out, more in (
        ("export", folder / "run", there, ["--dtype=bfloat16"]),
        ("import", there, folder / "back", []),
    ):
        command = [sys.executable, "-c", EXCHANGE, what, f"--from={source}", f"--out={out}", *more]
        screen = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak, seconds = map(float, screen.split("measured")[1].split())
        files = list(there.glob("*.safetensors"))
        row = {"parameters": count, "what": what, "files": len(files), "peak_mib": peak}
        row |= {"file_mb": sum(file.stat().st_size for file in files) / 1e6, "seconds": seconds}
        rows.append(row | {"run_mb": 4 * count / 1e6})
        print(f"  {what} of {count:,} parameters: {peak:.0f} MiB, {seconds:.1f} s")
    return rows


def _make_run(workdir: pathlib.Path, sizes: dict[str, str]) -> int:
    """Makes a run's directory with random parameters, an expert at a time; returns their number."""
    config = cli.load_config("configs/mixtral_8x7b.py", sizes)
    shapes, rng = shapes_of(config), np.random.default_rng(0)
    experts = {name for name in shapes if ".experts." in name}
    writer = pieces.Writer(workdir / "checkpoints" / "0", shapes, experts)
    for name, shape in shapes.items():
        for place in range(shape[0]) if name in experts else (None,):
            piece = shape if place is None else shape[1:]
            writer.write(name, rng.standard_normal(piece, np.float32) * 0.02, place)
    writer.finish()
    (workdir / "config.json").write_text(to_json(config))
    return sum(int(np.prod(shape)) for shape in shapes.values())
