"""How everything is timed: compiled first, then in turns, so that all see the same machine."""

import functools
import importlib.util
import re
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

ONCE = 3.0  # seconds: a slower call is made once and takes no turns
QUICK = 0.05  # seconds: a faster call is made twice in a turn, and the second one counts
PAUSE = 0.003  # seconds: threads of another library spin that long after their call
MAX_ROUNDS = 300


class Candidate(NamedTuple):
    """Holds one way to solve a problem.

    `make(problem)` compiles and returns a function without arguments that solves the problem,
    waits for the result, and returns (value, gradient or None).
    """

    name: str
    make: Callable[[Any], Callable[[], tuple]]
    exact: str = ""  # name of the oracle of the same problem; none if empty
    package: str = ""  # the peer it needs, by the name it is imported under; ours if empty
    runs_on: str = "jax"  # or "torch", "numpy"
    covers: Callable[[Any], bool] = lambda problem: True  # else far too slow to wait for


class Timing(NamedTuple):
    """What became of a candidate: `status` is "ok" or the reason why it has no times."""

    status: str
    seconds: dict[int, float]  # by round
    output: tuple | None


def compiled(function, *arguments):
    """Returns a compiled call of a JAX function on fixed arguments that waits for its result."""
    arguments = jax.device_put(arguments)
    program = _program(function, tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments))
    return lambda: jax.block_until_ready(program(*arguments))


@functools.lru_cache
def _program(function, shapes):
    return jax.jit(function).lower(*shapes).compile()


def with_gradient(function):
    """Returns (x, c) -> function(x) and its derivative in the direction c, backward."""

    def both(x, c):
        y, pull = jax.vjp(function, x)
        return y, pull(c)[0]

    return both


def measure(candidates, problem, budget: float, once: float = ONCE) -> dict[str, Timing]:
    """Solves the problem with every candidate, in turns: A B C A B C ...

    Each takes part in every round until it has used its share of `budget` seconds, and in
    three rounds at least; the first stays for as long as any other does, to be compared with.
    A pause, and a call that is not timed where calls are short, keep what the one before left in
    caches and in waiting threads out of the time of the next. A call that takes more than `once`
    seconds takes no turns.
    """
    prepared = {c.name: _prepare(c, problem, once) for c in candidates}
    runs = {name: run for name, (run, _, _) in prepared.items() if run}
    results = {name: timing for name, (_, _, timing) in prepared.items()}
    share, used = budget / max(1, len(runs)), dict.fromkeys(runs, 0.0)
    for turn in range(MAX_ROUNDS):
        active = [name for name in runs if turn < 3 or used[name] < share]
        if not active:
            break
        reference = next(iter(runs))
        for name in active if reference in active else [reference, *active]:
            time.sleep(PAUSE)
            if prepared[name][1] < QUICK:
                runs[name]()
            seconds = _clock(runs[name])[0]
            used[name] += seconds
            results[name].seconds[turn] = seconds
    return results


def _prepare(candidate: Candidate, problem, once: float):
    """The call to repeat, or None; its seconds, about; and a timing that has its output so far."""
    package = candidate.package
    if package and importlib.util.find_spec(package) is None:
        return None, 0.0, Timing("not installed", {}, None)
    if not candidate.covers(problem):
        return None, 0.0, Timing("left out: too slow here", {}, None)
    try:
        run = candidate.make(problem)
        seconds, output = _clock(run)
        if seconds <= once:
            seconds, _ = _clock(run)  # a first call may still allocate
            return run, seconds, Timing("ok", {}, output)
    except ImportError as error:
        missing = str(error).splitlines()[0]
        return None, 0.0, Timing(missing if package else "not available", {}, None)
    except Exception as error:  # a peer may fail in any way; the others shall go on
        return None, 0.0, Timing(_first_line(error), {}, None)
    return None, seconds, Timing("ok, one call", {0: seconds}, output)


def _clock(run):
    """Seconds of a call, and what it returned."""
    start = time.perf_counter()
    output = run()
    return time.perf_counter() - start, output


def _first_line(error: Exception) -> str:
    """Returns an error's first line; where it quotes another's traceback, that one's first line."""
    lines = str(error).strip().splitlines() or [""]
    quoted = [line for line in lines[1:] if re.match(r"[\w.]*(Error|Exception): ", line)]
    return (quoted[0] if quoted else f"{type(error).__name__}: {lines[0]}")[:120]


def summary(timing: Timing, reference: Timing | None = None) -> dict:
    """Columns of a table: median and lower quartile, and the median of the rounds' ratios."""
    seconds = list(timing.seconds.values())
    columns = {"status": timing.status, "rounds": len(seconds)}
    if seconds:
        columns["ms"] = 1e3 * statistics.median(seconds)
        columns["ms_q1"] = 1e3 * lower_quartile(seconds)
    if reference and seconds and reference.seconds:
        common = timing.seconds.keys() & reference.seconds.keys()
        columns["ratio"] = statistics.median(
            timing.seconds[turn] / reference.seconds[turn] for turn in common
        )
    return columns


def lower_quartile(seconds: list[float]) -> float:
    """Returns the time than which a quarter of the calls were faster."""
    return statistics.quantiles(seconds, n=4, method="inclusive")[0] if seconds[1:] else seconds[0]


def device(runs_on: str) -> str:
    """Returns what a candidate computes on, in the words of its library."""
    if runs_on == "jax":
        return jax.devices()[0].device_kind
    return torch_device() if runs_on == "torch" else "cpu"


def torch_device() -> str:
    """Returns where PyTorch computes: "cuda" if JAX computes there too, else "cpu"."""
    if jax.default_backend() != "gpu" or importlib.util.find_spec("torch") is None:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
