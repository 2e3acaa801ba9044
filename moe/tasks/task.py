"""Defines what a task is: all that training, evaluation, comparison and planning ask of it."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from moe.nn.layer import LayerReport
from moe.tasks.flops import Flops

Batch = dict[str, np.ndarray]
Sums = dict[str, Any]
Reports = dict[int, LayerReport]


class Metric(NamedTuple):
    """Names a scalar of `Task.scalars`, and says how it is read."""

    name: str
    higher: bool  # whether more of it is better
    form: str  # how it is printed, such as ".2%"

    @property
    def key(self) -> str:
        """Returns its name in metrics.jsonl."""
        return f"eval/{self.name}"

    @property
    def title(self) -> str:
        """Returns its name in plain words."""
        return self.name.replace("_", " ")

    def score(self, value: float) -> float:
        """Returns what grows as the model gets better."""
        return value if self.higher else -value


class Shape(NamedTuple):
    """Holds a model's width D, depth L, MLP width F and heads H, as far as a mesh splits them."""

    width: int
    depth: int
    mlp_dim: int
    heads: int


class Source(Protocol):
    """Holds the examples of a split; what one is, its task knows alone."""

    name: str
    split: str

    @property
    def fingerprint(self) -> str: ...  # of what it holds, cheap: processes compare it


class Task:
    """Says what a run learns: from which data, with which model, and how well it does.

    A task is a value without a state: it gets the config each time. It is one entry of
    `moe.tasks.TASKS`; docs/tasks.md makes one in 40 lines.

    Loss and metrics are sums over weights. The loss of a step is sum("loss") / sum("weight") over
    the whole global batch, so that neither micro-batches nor devices of unequal weight change it.

    Attributes:
      unit: of what rates, FLOPs and weights are counted in: "image", "token".
      best: what an evaluation is judged by.
      shown: the scalars of the screen's lines.
      sizes: keys that `resolve` fills in from the data.
      overrides: keys, beside those of any task, that an evaluation may change.
      kept: those of `sizes` that an evaluation on other data keeps; `resolve` says where these do
        not fit.
      pictures: files that `draw` writes.
      ends: how parameters are named that depend on the data; a run that starts from another's
        (`init.workdir`) may have them of other shapes, and makes them anew.
      causal: whether no output may depend on later tokens, so that routers may not look ahead.
    """

    unit: ClassVar[str]
    best: ClassVar[Metric]
    shown: ClassVar[tuple[Metric, ...]]
    sizes: ClassVar[tuple[str, ...]] = ()
    overrides: ClassVar[tuple[str, ...]] = ()
    kept: ClassVar[tuple[str, ...]] = ()
    pictures: ClassVar[tuple[str, ...]] = ()
    ends: ClassVar[tuple[str, ...]] = ()
    causal: ClassVar[bool] = False

    def keys(self) -> dict[str, Any]:
        """Returns the task's own keys, sections of `Key`s; they come after those of any task."""
        raise NotImplementedError

    def check(self, config: ConfigDict) -> None:
        """Raises UsageError where the task's settings do not fit each other, whatever the data."""

    def shape(self, config: ConfigDict) -> Shape:
        """Returns the sizes that a mesh splits."""
        raise NotImplementedError

    def tokens(self, config: ConfigDict) -> int:
        """Returns the positions T of one example that pass the blocks."""
        raise NotImplementedError

    def units(self, config: ConfigDict) -> int:
        """Returns how many units one example counts for."""
        return 1

    def open(self, config: ConfigDict, split: str) -> Source:
        """Opens a split of the config's data."""
        raise NotImplementedError

    def resolve(self, config: ConfigDict, source: Source) -> ConfigDict:
        """Returns the locked config with `sizes` filled in.

        Raises:
          UsageError: what the config says of the data is not so.
        """
        return config

    def files(self, source: Source) -> dict[str, bytes]:
        """Returns what of the data a run keeps in its directory, by the names of files."""
        return {}

    def batch(self, config: ConfigDict, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a training batch of `size` examples, the first axis of each."""
        raise NotImplementedError

    def train_batches(
        self, config: ConfigDict, source: Source, start_step: int, rows: Sequence[int]
    ) -> Iterator[Batch]:
        """Yields the batches from `start_step` on, without end: functions of (seed, step) alone.

        Args:
          rows: the positions in the global batch that are to be made.
        """
        raise NotImplementedError

    def eval_batches(
        self, config: ConfigDict, source: Source, rows: Sequence[int]
    ) -> Iterator[Batch]:
        """Yields each example once, of `eval.batch_size`; the last is filled up with weight 0."""
        raise NotImplementedError

    def build(self, config: ConfigDict, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the model with fresh parameters."""
        raise NotImplementedError

    def sums(
        self, config: ConfigDict, model: nnx.Module, batch, *, train: bool, key=None
    ) -> tuple[Sums, Reports]:
        """Runs the model; returns sums over the examples, and the layers' reports.

        The sums are float32 arrays that add up over examples, among them "loss" and "weight", in
        training, if there is one, the "penalty" that is minimised beside the loss, in evaluation
        "examples", the real ones. The trainer adds its own: steps, skipped, grad_norm, aux_loss,
        and the layers' load, routed, dropped, tokens, chosen, margin and share.
        """
        raise NotImplementedError

    def scalars(self, totals: Sums) -> dict[str, float]:
        """Returns the named means of added sums (numpy), of training or of an evaluation."""
        raise NotImplementedError

    def metrics(self, config: ConfigDict) -> tuple[Metric, ...]:
        """Returns what a comparison can be made by: scalars of every evaluation."""
        return self.shown

    def flops(self, config: ConfigDict) -> Flops:
        """Counts the FLOPs of one example."""
        raise NotImplementedError

    def draw(
        self, config: ConfigDict, graphdef, params, source: Source, files: list[pathlib.Path]
    ) -> None:
        """Draws `pictures` of some examples' routing, each to its file."""


def line(task: Task, phase: str, row: Mapping[str, float]) -> str:
    """Returns the task's shown scalars as text: "loss 0.1234  accuracy 98.00%"."""
    return "  ".join(
        f"{metric.title} {row[f'{phase}/{metric.name}']:{metric.form}}"
        for metric in task.shown
        if f"{phase}/{metric.name}" in row
    )
