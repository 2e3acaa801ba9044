"""What an accelerator makes of attention, whole training steps and decoding, in a few minutes.

    python -m benchmarks --only=accelerator

Without a GPU or TPU its tables say so; --quick runs it at toy sizes anywhere.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import moe_layer, topk
from benchmarks.candidates import candidates
from benchmarks.report import Table
from benchmarks.timing import Candidate, device, measure, summary
from moe import cli
from moe.errors import UsageError
from moe.evaluate.sampling import Sampler, Sampling
from moe.nn.attention import BACKENDS, Places, attention
from moe.plan.chips import CHIPS
from moe.train.run import Run, set_up

OPERATORS = ("hard", "mask p=2", "mask p=4/3", "magnitude p=2", "lapsum")
SIZES = [(16384, 64, 8), (4096, 1024, 32), (256, 65536, 64)]
ATTENTION = (
    "Causal attention of 4 rows of T tokens in documents of T/4, 8 heads of 64, 2 of keys, "
    "{dtype}, forward and backward. `ratio`: of the time to blockwise's; `error`: largest "
    "difference of the output to blockwise's."
)
STEPS = (
    "Whole training steps on one device, bfloat16: forward, backward, AdamW; random inputs. `mfu`: "
    "the FLOPs that the model asks for, over time and the device's peak, where that is known."
)
DECODING = "Tokens drawn for 32 prompts of 128 tokens, one by one against a cache; random weights."
NONE = "JAX finds no GPU or TPU here: run this where it does."


def tables(quick: bool) -> list[Table]:
    """Returns tables of operators, layers, attention, steps and decoding; one note on a CPU."""
    if jax.default_backend() == "cpu" and not quick:
        return [Table("accelerator", "Accelerator", NONE, ("device",), [])]
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    sizes = [topk.Size(*size, OPERATORS) for size in ([(64, 64, 8)] if quick else SIZES)]
    operators = topk.compare(candidates(), sizes, 0.3 if quick else 4.0)
    masks = Table("accelerator_topk", "Operators", topk.NOTE, topk.SHOW, operators)
    layers = [table._replace(name="accelerator_moe_layer") for table in moe_layer.tables(quick)]
    show = ("T", "candidate", "device", "status", "ms", "ms_q1", "ratio", "error")
    rows = _attention((64,) if quick else (1024, 4096), dtype, 0.3 if quick else 10.0)
    kernels = Table("accelerator_attention", "Attention", ATTENTION.format(dtype=dtype), show, rows)
    runs = [(name, set_up(config, devices=jax.devices()[:1])) for name, config in _models(quick)]
    steps = [_time_steps(name, run, 2 if quick else 10) for name, run in runs]
    show = ("model", "device", "status", "parameters", "ms", "units_per_second", "mfu")
    steps = Table("accelerator_steps", "Steps", STEPS, show, steps)
    decoders = [(name, run) for name, run in runs if run.task.unit == "token"]
    decoding = [_time_decoding(name, run, 4 if quick else 128) for name, run in decoders]
    show = ("model", "device", "status", "tokens_per_second", "ms_a_token")
    decoding = Table("accelerator_decoding", "Decoding", DECODING, show, decoding)
    return [masks, *layers, kernels, steps, decoding]


def _attention(lengths, dtype: str, budget: float) -> list[dict]:
    """Rows of every back end; one that cannot says why."""
    return [row for T in lengths for row in _compare_kernels(T, dtype, budget)]


def _compare_kernels(T: int, dtype: str, budget: float) -> list[dict]:
    rng = np.random.default_rng(0)
    shapes = [(4, T, heads, 64) for heads in (8, 2, 2)]
    arrays = [rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes]
    place = np.broadcast_to(np.arange(T, dtype=np.int32), (4, T))
    places = Places(1 + place // (T // 4), place % (T // 4))
    refused = {name: _refused(name, arrays) for name in BACKENDS if name != "auto"}
    make = lambda name: Candidate(name, lambda _: _attend(name, arrays, places))  # noqa: E731
    timings = measure([make(name) for name, why in refused.items() if not why], None, budget)
    rows = []
    for name, why in refused.items():
        row = {"T": T, "candidate": name, "device": device("jax"), "status": why}
        if not why:
            row |= summary(timings[name], timings["blockwise"])
        if not why and name != "blockwise" and timings[name].output is not None:
            y, expected = (jnp.float32(timings[n].output[0]) for n in (name, "blockwise"))
            row["error"] = float(jnp.abs(y - expected).max())
        rows.append(row)
        print(f"  attention of {T}, {name}: {row.get('ms')} ms, {row['status']}")
    return rows


def _refused(backend: str, arrays) -> str:
    """Returns why a back end cannot attend these rows; "" if it can."""
    places = Places(*(jax.ShapeDtypeStruct(arrays[0].shape[:2], jnp.int32) for _ in range(2)))
    try:
        jax.eval_shape(lambda *a: attention(*a, backend=backend), *arrays, places)
    except UsageError as error:
        return str(error).split(": ", 1)[-1]
    return ""


def _attend(backend: str, arrays, places):
    def loss(q, k, v):
        out = attention(q, k, v, places, backend=backend)
        return (out.astype(jnp.float32) ** 2).sum(), out

    program = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True)).lower(*arrays).compile()

    def call():
        (_, out), gradients = jax.block_until_ready(program(*arrays))
        return out, gradients

    return call


def _models(quick: bool) -> list[tuple[str, ConfigDict]]:
    """Returns V-MoE-S/32 and decoders of widths 512 to 1,280, dense and of 64 experts, K = 4."""
    few = {"model.depth": "2", "model.width": "32", "model.mlp_dim": "64", "model.num_heads": "2"}
    small = few | {"batch_size": "8", "moe.layers": "1"} if quick else {"batch_size": "256"}
    small |= {"data.num_classes": "1000", "data.channels": "3"}
    found = [("V-MoE-S/32", cli.load_config("configs/vmoe_s32_imagenet.py", small))]
    for width in (32,) if quick else (512, 768, 1024, 1280):
        sizes = {
            "batch_size": "16",
            "data.vocabulary": "16384",
            "data.seq_len": "1024",
            "model.width": str(width),
            "model.depth": str(width // 64),
            "model.mlp_dim": str(4 * width),
            "model.num_heads": str(width // 64),
            "moe.num_experts": "64",
            "moe.expert_dim": str(width // 2),
            "moe.shared_experts": "1",
            "router.topk.k": "4",
            "optimizer.accumulate": "1",
        }
        if quick:
            sizes |= few | {"batch_size": "2", "data.seq_len": "64", "moe.num_experts": "4"}
        for dense in ("false", "true"):
            config = cli.load_config("configs/text_small.py", sizes | {"moe.dense": dense})
            kind = "dense" if dense == "true" else "64 experts"
            found.append((f"decoder of width {width}, {kind}", config))
    return found


def _time_steps(name: str, run: Run, count: int) -> dict:
    """Returns the median time of a step; a model that does not fit says so."""
    row = {"model": name, "device": device("jax"), "status": "ok"}
    row["parameters"] = sum(a.size for a in jax.tree.leaves(run.params))
    try:
        state, batch = run.initial_state(), run.put(_batch(run))
        step = run.jit(run.train_step, donate_argnums=0)
        seconds = []
        for _ in range(count + 2):  # the first compiles
            start = time.perf_counter()
            state, sums = step(state, batch)
            jax.block_until_ready((state, sums))
            seconds.append(time.perf_counter() - start)
    except jax.errors.JaxRuntimeError as error:
        return row | {"status": str(error).splitlines()[0][:100]}
    second = float(np.median(seconds[2:]))
    flops, examples = run.task.flops(run.config), run.config.batch_size
    row |= {"ms": 1e3 * second, "units_per_second": run.units / second}
    if peak := _peak(run.config.model.dtype):
        row["mfu"] = flops.training(flops.model) * examples / second / peak
    print(f"  {name}: {row['ms']:.3g} ms a step, MFU {row.get('mfu', float('nan')):.1%}")
    return row


def _batch(run: Run) -> dict[str, np.ndarray]:
    """Makes random inputs of the shapes of a batch: whole rows of one document, all of weight 1."""
    rng = np.random.default_rng(0)

    def draw(name: str, spec) -> np.ndarray:
        if name in ("segments", "bytes", "weight"):
            return np.ones(spec.shape, spec.dtype)
        if name == "positions":
            return np.broadcast_to(np.arange(spec.shape[1], dtype=spec.dtype), spec.shape)
        if spec.dtype == jnp.int32:
            return rng.integers(1000, size=spec.shape, dtype=np.int32)
        return rng.uniform(size=spec.shape).astype(spec.dtype)

    return {name: draw(name, spec) for name, spec in run.abstract_batch().items()}


def _time_decoding(name: str, run: Run, tokens: int) -> dict:
    """Returns the time of a token, after the prompts were read and the step compiled."""
    row = {"model": name, "device": device("jax"), "status": "ok"}
    rows, longest = 32, min(128, run.config.data.seq_len // 2)
    options = {"rows": rows, "longest": longest, "most": tokens + 2, "stops": ()}
    sampler = Sampler(run, Sampling(temperature=1.0, top_p=1.0, seed=0), vocabulary=256, **options)
    prompts = np.random.default_rng(0).integers(256, size=(rows, longest)).tolist()
    try:
        params = run.initial_state()["params"]
        drawn = sampler.draw(params, prompts, range(rows))
        next(drawn), next(drawn)  # the first reads the prompts, the second compiles the step
        start = time.perf_counter()
        count = sum(1 for _ in drawn)
    except jax.errors.JaxRuntimeError as error:
        return row | {"status": str(error).splitlines()[0][:100]}
    seconds = time.perf_counter() - start
    row |= {"tokens_per_second": rows * count / seconds, "ms_a_token": 1e3 * seconds / count}
    print(f"  {name}: {row['tokens_per_second']:,.0f} tokens/s")
    return row


def _peak(dtype: str) -> float | None:
    """Returns the peak FLOP/s of the device at hand, None if it is none of those that are known."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "")
    names = {"v5litepod": "v5e", "v5lite": "v5e", "v6lite": "v6e", "v5": "v5p"}
    known = {name: chip for name, chip in CHIPS.items() if chip.kind != "cpu"}
    for name, chip in {**known, **{alias: CHIPS[name] for alias, name in names.items()}}.items():
        if name in kind:
            return chip.flops(dtype)
    return None
