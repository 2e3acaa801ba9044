"""What the largest arrays of a language model cost: logits, and the weights of attention."""

import ctypes
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import Table
from benchmarks.timing import Candidate, device, measure, summary
from moe.nn.attention import Places, attention
from moe.nn.cross_entropy import cross_entropy

SHOW = ("candidate", "device", "status", "xla_mib", "peak_mib", "ms", "ratio", "error")
COLUMNS = (
    "`xla_mib`: temporary memory of forward and backward, from the compiler's own analysis; "
    "`peak_mib`: what a call added to the memory in use, measured. Large sizes are compiled only. "
    "`ratio`: of the time to the first candidate's. `error`: largest difference of a "
    "derivative to the first candidate's, relative to the largest."
)
LOGITS = (
    "Cross entropy of {tokens:,} tokens of width {width}, {dtype}, and its derivatives by tokens "
    "and head; `cross_entropy` takes {chunk} tokens at a time. "
) + COLUMNS
ATTENTION = (
    "Causal attention of one row of T tokens, 8 heads of 64, 2 of keys, {dtype}, and its "
    "derivatives; the plain softmax holds all T x T weights. "
) + COLUMNS
MEASURED = {"V": 32_768, "T": 1024}  # the largest that is run


def tables(quick: bool) -> list[Table]:
    on_cpu = jax.default_backend() == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"
    tokens, width, chunk = (64, 8, 16) if quick else (2048, 256, 256)
    vocabularies = (512,) if quick else (32_768, 131_072)
    lengths = (64,) if quick else (1024, 4096, 16_384)
    rows = []
    for V in vocabularies:
        problem = _loss_inputs(tokens, width, V, dtype)
        chunked = functools.partial(_chunked, chunk)
        found = {"all logits at once": _whole, "cross_entropy": chunked}
        rows += _compare(found, problem, {"V": V}, quick)
    note = LOGITS.format(tokens=tokens, width=width, dtype=dtype, chunk=chunk)
    logits = Table("logits", "Logits", note, ("V", *SHOW), rows)
    rows = []
    for T in lengths:
        found = {"plain softmax": _softmax, "attention": _attention}
        rows += _compare(found, _attention_inputs(T, dtype), {"T": T}, quick)
    note = ATTENTION.format(dtype=dtype)
    return [logits, Table("attention", "Attention", note, ("T", *SHOW), rows)]


def _compare(losses: dict, shapes: dict, facts: dict, quick: bool) -> list[dict]:
    """Rows of the losses, functions of `shapes`, which are differentiated by the floats."""
    programs, rows = {}, []
    for name, loss in losses.items():
        programs[name] = jax.jit(jax.grad(loss, (0, 1, 2)[: shapes["floats"]]))
        programs[name] = programs[name].lower(*shapes["specs"]).compile()
    bytes_of = {n: p.memory_analysis().temp_size_in_bytes for n, p in programs.items()}
    fits = programs if all(size <= MEASURED[name] for name, size in facts.items()) else {}
    inputs = _draw(shapes["specs"]) if fits else None
    found = [Candidate(n, lambda _, p=p: _call(p, inputs)) for n, p in fits.items()]
    timings = measure(found, None, 0.2 if quick else 20.0)
    first = next(iter(fits), None)
    for name in losses:
        row = {**facts, "candidate": name, "device": device("jax")}
        row |= {"status": "compiled only", "xla_mib": bytes_of[name] / 2**20}
        if name in fits:
            row |= summary(timings[name], timings[first])
            row["peak_mib"] = _peak(fits[name], inputs)
            if name != first and timings[name].output is not None:
                row["error"] = _error(timings[name].output[0], timings[first].output[0])
        rows.append(row)
        text = ", ".join(f"{key} {row.get(key)}" for key in ("xla_mib", "peak_mib", "ms"))
        print(f"  {facts}, {name}: {text}")
    return rows


def _call(program, inputs):
    return lambda: (jax.block_until_ready(program(*inputs)), None)


def _error(found, expected) -> float:
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(found, expected))  # noqa: B905


def _loss_inputs(tokens: int, width: int, V: int, dtype: str) -> dict:
    specs = [((1, tokens, width), dtype), ((width, V), "float32"), ((1, tokens), "int32")]
    return {"specs": [jax.ShapeDtypeStruct(*spec) for spec in specs], "floats": 2}


def _attention_inputs(T: int, dtype: str) -> dict:
    specs = [((1, T, heads, 64), dtype) for heads in (8, 2, 2)]
    return {"specs": [jax.ShapeDtypeStruct(*spec) for spec in specs], "floats": 3}


def _draw(specs):
    rng = np.random.default_rng(0)

    def draw(spec):
        if spec.dtype == jnp.int32:
            return rng.integers(100, size=spec.shape, dtype=np.int32)
        return rng.standard_normal(spec.shape, np.float32).astype(spec.dtype)

    return [jax.device_put(draw(spec)) for spec in specs]


def _whole(hidden, head, targets):
    logits = jnp.einsum(
        "btd,dv->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    lse = jax.nn.logsumexp(logits, -1)
    return (lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]).mean()


def _chunked(chunk: int, hidden, head, targets):
    return cross_entropy(hidden, head, targets, chunk=chunk).nats.mean()


def _softmax(q, k, v):
    k, v = (jnp.repeat(a, 4, 2) for a in (k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) / 8
    place = jnp.arange(q.shape[1])
    seen = (place[:, None] >= place[None])[None, None]
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), -1).astype(v.dtype)
    return (jnp.einsum("bhts,bshd->bthd", weights, v).astype(jnp.float32) ** 2).sum()


def _attention(q, k, v):
    place = jnp.arange(q.shape[1])[None]
    out = attention(q, k, v, Places(jnp.ones_like(place), place))
    return (out.astype(jnp.float32) ** 2).sum()


def _peak(program, inputs) -> float | None:
    """Returns the MiB that a call adds to the memory in use; None where nothing tells."""
    stats = jax.devices()[0].memory_stats()
    if stats is not None:
        return None  # a device's allocator holds what it had: `xla_mib` is exact there
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is no longer in use
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
        before = _status("VmRSS")
        jax.block_until_ready(program(*inputs))
        return (_status("VmHWM") - before) / 1024
    except (OSError, AttributeError):  # not Linux
        return None


def _status(name: str) -> int:
    """Returns a number of this process's status, KiB."""
    text = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+)", text)[1])
