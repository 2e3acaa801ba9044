"""Local updates on data that differ between clients: FedAvg's wrong limit, and FedLin's right one.

python -m examples.local_updates [--seeds=N] [--rounds=N] [--classes=N] [--out=DIR]

Clients hold scikit-learn's digits, each its own classes alone, and train one logistic regression.
The table has how far each method ends from the minimiser, which Newton's method knows, also after
as many numbers as gradient descent sends. Writes DIR/local_updates.md and DIR/local_updates.png.
"""

import argparse
import functools
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from examples.clients import Method, descend, fedavg_limit, quadratics
from moe import cli, outputs
from moe.errors import UsageError

RATE, STEPS, DECAY = 0.1, 10, 1e-2
METHODS = (
    Method("gradient descent", 1, RATE),
    Method("gradient descent", 1, 8 * RATE),  # nearly the best of any rate
    Method("FedAvg", STEPS, RATE),
    Method("FedLin", STEPS, RATE, True),
    Method("FedLin, 10 % sent, EF21", STEPS, RATE, True, 0.1, "ef21"),
    Method("FedLin, 10 % sent, error feedback", STEPS, RATE, True, 0.1, "ef"),
    Method("FedLin, 10 % sent, no memory", STEPS, RATE, True, 0.1),
)
CLASSES, TEST = 10, 360
# Two clients on a line, of whose limits the closed form is known.
A, C, LINE_RATE, LINE_STEPS = np.array([1.0, 10.0]), np.array([0.0, 1.0]), 0.02, 5


class Clients(NamedTuple):
    """Holds images with a constant pixel [W, n, D] and labels [W, n], and those of the test."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def split_by_class(seed: int, classes: int) -> Clients:
    """Deals the digits to clients by class, `classes` to each and as many images of every class."""
    digits, rng = load_digits(), np.random.default_rng(seed)
    x = np.concatenate([digits.data / 16, np.ones((len(digits.data), 1))], 1)
    y = digits.target
    order = rng.permutation(len(y))
    test, rest = order[:TEST], order[TEST:]
    n = min((y[rest] == k).sum() for k in range(CLASSES))
    rows = [
        np.concatenate([rest[y[rest] == k][:n] for k in own])
        for own in rng.permutation(CLASSES).reshape(-1, classes)
    ]
    return Clients(x[rows], y[rows], x[test], y[test])


def loss(w, x, y):
    """Returns the mean cross-entropy of logits x W, plus DECAY |W|^2 / 2, which makes it convex."""
    logits = x @ w.reshape(x.shape[-1], CLASSES)
    own = jnp.take_along_axis(logits, y[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - own).mean() + DECAY / 2 * (w**2).sum()


def minimiser(x, y):
    """Returns the weights of least loss over all examples, by Newton's method in NumPy."""
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1)
    count, size = x.shape
    w, eye = np.zeros((size, CLASSES)), np.eye(CLASSES)
    for _ in range(8):
        p = np.exp(x @ w - (x @ w).max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = x.T @ (p - eye[y]) / count + DECAY * w
        px = (x[:, :, None] * p[:, None, :]).reshape(count, w.size)
        hessian = DECAY * np.eye(w.size) - px.T @ px / count
        for k in range(CLASSES):  # weights of one class are every tenth
            hessian[k::CLASSES, k::CLASSES] += x.T @ (p[:, k, None] * x) / count
        w -= np.linalg.solve(hessian, gradient.reshape(-1)).reshape(w.shape)
    return jnp.asarray(w.reshape(-1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(method: Method, rounds: int, x, y):
    """Returns the weights between rounds, from 0, and the loss over all clients there."""
    each = jax.vmap(jax.grad(loss))
    start = jnp.zeros(x.shape[-1] * CLASSES)
    path = descend(lambda w: each(w, x, y), start, len(x), method, rounds)
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1)
    return path, jax.lax.map(lambda w: loss(w, x, y), path)


def measure(seed: int, classes: int, rounds: int) -> dict[Method, dict[str, np.ndarray]]:
    """Returns each method's loss above the least between rounds, and how it ends."""
    data = split_by_class(seed, classes)
    best = minimiser(data.x, data.y)
    least = loss(best, data.x.reshape(-1, data.x.shape[-1]), data.y.reshape(-1))
    found = {}
    for method in METHODS:
        path, losses = train(method, rounds, data.x, data.y)
        logits = data.x_test @ np.asarray(path[-1]).reshape(-1, CLASSES)
        found[method] = {
            "gap": np.asarray(losses - least),
            "distance": np.asarray(jnp.linalg.norm(path[-1] - best) / jnp.linalg.norm(best)),
            "accuracy": (logits.argmax(-1) == data.y_test).mean(),
        }
    return found


def table(found: list[dict], rounds: int) -> str:
    """Returns the rows as Markdown, means and standard deviations over seeds."""
    size = (load_digits().data.shape[1] + 1) * CLASSES
    lines = [
        f"| method | H | rate | a client sends a round | loss above the least, round {rounds} "
        f"| after {rounds * size:,} numbers | distance to the minimiser | test accuracy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        gap, distance, accuracy = (
            np.array([seed[method][key] for seed in found])
            for key in ("gap", "distance", "accuracy")
        )
        last, fair = gap[:, -1], gap[:, rounds * size // method.numbers(size)]
        lines.append(
            f"| {method.name} | {method.steps} | {method.rate:g} "
            f"| {method.numbers(size):,} numbers | {last.mean():.1e} ± {last.std(ddof=1):.0e} "
            f"| {fair.mean():.1e} | {distance.mean():.2%} ± {distance.std(ddof=1):.2%} "
            f"| {accuracy.mean():.2%} ± {accuracy.std(ddof=1):.2%} |"
        )
    return "\n".join(lines) + "\n"


def draw(found: list[dict], file: pathlib.Path) -> None:
    """Draws two clients on a line with their limits, and the digits' losses of the first seed."""
    figure = Figure((13, 4.2), layout="constrained")
    line, digits = figure.subplots(1, 2)
    gradients = quadratics(jnp.asarray(A), jnp.asarray(C))
    for name, corrected, limit in (
        ("FedAvg", False, fedavg_limit(A, C, LINE_STEPS, LINE_RATE)),
        ("FedLin", True, (A * C).sum() / A.sum()),
    ):
        method = Method(name, LINE_STEPS, LINE_RATE, corrected)
        path = descend(gradients, jnp.zeros(1), 2, method, 12)
        (drawn,) = line.plot(path[:, 0], "o-", markersize=3, label=f"{name}, limit {limit:.5f}")
        line.axhline(limit, color=drawn.get_color(), linestyle="--", linewidth=1)
    line.set(title="two quadratics", xlabel="round", ylabel="x", ylim=(0.6, 0.93))
    line.legend(loc="lower right")
    for method in METHODS:
        digits.semilogy(
            np.maximum(found[0][method]["gap"], 1e-13), label=f"{method.name}, rate {method.rate:g}"
        )
    title = "digits split by class, logistic regression"
    digits.set(title=title, xlabel="round", ylabel="loss above the least")
    digits.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    outputs.write(file, lambda fresh: figure.savefig(fresh, dpi=110))


def main(argv) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.local_updates",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--classes", type=int, default=2, help="of a client: 1, 2 or 5")
    parser.add_argument("--out", default="runs/local_updates")
    flags, rest = cli.parse(parser, argv)
    if rest:
        raise UsageError(f"there are no settings --config.{next(iter(rest))} here; see --help")
    for name, value, good in (
        ("seeds", flags.seeds, flags.seeds >= 2),
        ("rounds", flags.rounds, flags.rounds >= 1),
        ("classes", flags.classes, flags.classes in (1, 2, 5)),
    ):
        if not good:
            expected = {"seeds": "2 or more", "rounds": "1 or more", "classes": "1, 2 or 5"}[name]
            raise UsageError(f"--{name}={value}: expected {expected}")
    out = cli.local_path(flags.out, "--out")
    files = out / "local_updates.md", out / "local_updates.png"
    for file in files:
        outputs.check(file)
    start = time.perf_counter()
    with jax.enable_x64(True):
        found = [measure(seed, flags.classes, flags.rounds) for seed in range(flags.seeds)]
        text = table(found, flags.rounds)
        outputs.write(files[0], lambda fresh: fresh.write_text(text))
        draw(found, files[1])
    print(text + f"{time.perf_counter() - start:.0f} s; wrote {files[0]} and {files[1]}")


if __name__ == "__main__":
    cli.run(main)
