"""The records of a run: metrics.jsonl, and the same scalars as TensorBoard events."""

import json
import os
import pathlib

from tensorboardX import SummaryWriter

from moe.distributed import is_first


class Records:
    """Appends scalars; opened again at `step`, forgets what came after it.

    A run that was killed after its last checkpoint repeats some steps, whose records would
    otherwise stand twice. Of several processes only the first writes.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        self._writes = is_first()
        if not self._writes:
            return
        self.path = workdir / "metrics.jsonl"
        keep = [row for row in read(self.path) if row["step"] <= step]
        fresh = self.path.with_suffix(".new")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in keep))
        os.replace(fresh, self.path)
        self._file = self.path.open("a")
        self._events = SummaryWriter(str(workdir / "events"), purge_step=step + 1)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if not self._writes:
            return
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        if not self._writes:
            return
        self._file.close()
        self._events.close()


def read(path: pathlib.Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
