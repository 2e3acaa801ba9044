"""Times a step of training by the number of films in an impression, loss by loss in turns."""

import pathlib
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.cascade.impressions import ITEMS, MovieLens
from examples.cascade.models import Cascade, batch_of
from examples.cascade.training import Settings, step
from moe import outputs

ROUNDS = 15


def compare(
    arms: Sequence[str], films: Sequence[int], width: float, data: MovieLens, settings: Settings
) -> dict[str, list[float]]:
    """Returns the milliseconds of a step of each arm, for impressions of so many films.

    A step is both networks, the loss, the derivatives and Adam. An impression with more films
    than 40 has those several times; it costs what as many different ones would. Each number is the
    median of the rounds, in which the arms take turns.
    """
    graph, params = nnx.split(Cascade(data, rngs=nnx.Rngs(0)))
    state = optax.adam(settings.learning_rate).init(params)
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for count in films:
        whole = _of_so_many(data, settings, count)
        some, key = np.arange(settings.batch), jax.random.key(0)
        steps = {arm: (graph, arm, settings) for arm in arms}
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for round_ in range(ROUNDS + 1):
            for arm, fixed in steps.items():
                start = time.perf_counter()
                jax.block_until_ready(step(fixed, params, state, whole, some, width, key))
                if round_:  # the first one compiles
                    times[arm].append(1e3 * (time.perf_counter() - start))
        for arm in arms:
            found[arm].append(statistics.median(times[arm]))
    return found


def _of_so_many(data: MovieLens, settings: Settings, count: int):
    """Returns a batch of impressions of `count` films, and their truths."""
    part = data.train.take(slice(settings.batch))
    place = np.arange(count) % ITEMS
    batch, first = batch_of(part, data), np.arange(count) < ITEMS
    batch = batch._replace(items=part.items[:, place], facts=batch.facts[:, place])
    return jax.tree.map(jnp.asarray, (batch, part.truth[:, place] & first))


def show(
    found: dict[str, list[float]], films: Sequence[int], reference: str, out: pathlib.Path
) -> None:
    """Prints and writes `out`/time.md: a row for each arm, milliseconds and their ratios."""
    lines = ["| arm | " + " | ".join(f"{count} films" for count in films) + " |"]
    lines.append("|---" * (len(films) + 1) + "|")
    for arm, times in found.items():
        cells = [
            f"{own:.1f} ms ({own / other:.2f})"
            for own, other in zip(times, found[reference], strict=True)
        ]
        lines.append(f"| `{arm}` | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    outputs.write(out / "time.md", lambda fresh: fresh.write_text(text))
    print(f"{text}\nwrote {out}/time.md")
