"""Trains and decodes a small Mixtral here and by `transformers` on torch: one model, in turns."""

import pathlib
import tempfile
from typing import NamedTuple

import jax
import numpy as np

from benchmarks import hugging_face
from benchmarks.report import Table
from benchmarks.timing import Candidate, device, measure, summary
from moe import cli
from moe.config import to_json
from moe.evaluate.sampling import Sampler, Sampling
from moe.store import pieces
from moe.store.checkpoint import named
from moe.store.huggingface.exporting import export_run
from moe.train.run import Run, set_up

OURS, THEIRS = "permoe", "transformers"
TOLERANCE = 1e-4  # of a loss, in nats
COMPARED = 3  # steps: later ones differ where a rounding changes which expert a token takes
PROMPT = 32
SLOW = 60.0  # seconds of a call that takes no turns
NOTE = (
    "A Mixtral of {parameters:.1f} million parameters: D = {width}, {depth} layers, {experts} "
    "experts of F = {hidden}, K = 2, {heads} heads of {head_dim} ({kv_heads} of keys), V = "
    "{vocabulary}, which keeps the head at {head:.0%} of the FLOPs; float32, all cores. "
)
STEPS = NOTE + (
    "A step: forward, backward, clipping, AdamW, on {rows} rows of T = {length} random tokens, no "
    "auxiliary loss. `ratio`: of the time to permoe's. `error`: largest difference of the loss to "
    "permoe's in the first three steps."
)
DECODING = NOTE + (
    "{tokens} greedy tokens after a prompt of {prompt}, the reading of the prompt included; "
    "`ratio`: of the time to permoe's. `equal`: share of the tokens that are permoe's."
)
STEP_SHOW = ("candidate", "device", "status", "ms", "ms_q1", "ratio", "error", "tokens_per_second")
DECODING_SHOW = ("rows", "candidate", "device", "status", "ms", "ms_q1", "ratio", "equal")
DECODING_SHOW += ("tokens_per_second",)
SIZES = {"model.width": "256", "model.depth": "8", "model.num_heads": "8", "model.kv_heads": "4"}
SIZES |= {"model.head_dim": "32", "model.mlp_dim": "512", "moe.expert_dim": "512"}
SIZES |= {"data.vocabulary": "2048", "data.seq_len": "512", "batch_size": "8"}
QUICK = SIZES | {"model.width": "32", "model.depth": "2", "model.head_dim": "4"}
QUICK |= {"model.mlp_dim": "64", "moe.expert_dim": "64", "data.seq_len": "64", "batch_size": "2"}
QUICK |= {"data.vocabulary": "512"}
# Nothing is dropped or averaged away on either side, and nothing computed twice to save memory.
ALIKE = {"moe.dispatch": "dropless", "router.topk.balance": "0.0", "model.dtype": "float32"}
ALIKE |= {"model.scan": "false", "model.remat": "none", "eval.batch_size": "8"}
ALIKE |= {"optimizer.warmup_steps": "0", "optimizer.schedule": "constant", "model.chunk": "1024"}
ALIKE |= {f"mesh.{axis}": "1" for axis in ("fsdp", "expert", "tensor")}


class Problem(NamedTuple):
    """Holds a run and its parameters here, and the same model's directory for `transformers`."""

    run: Run
    params: dict
    folder: pathlib.Path


def tables(quick: bool) -> list[Table]:
    """Returns a table of training steps and one of decoding."""
    config = cli.load_config("configs/mixtral_8x7b.py", (QUICK if quick else SIZES) | ALIKE)
    run = set_up(config, devices=jax.devices()[:1])
    tokens, rows = (4, (2,)) if quick else (128, (1, 8))
    with tempfile.TemporaryDirectory() as folder:
        problem = _export(run, pathlib.Path(folder))
        facts = _facts(run) | {"tokens": tokens, "prompt": PROMPT}
        steps = _compare_steps(problem, 1.0 if quick else 240.0)
        steps = Table("trainers_steps", "Training steps", STEPS.format(**facts), STEP_SHOW, steps)
        found = [row for n in rows for row in _compare_decoding(problem, n, tokens, quick)]
    note = DECODING.format(**facts)
    return [steps, Table("trainers_decoding", "Decoding", note, DECODING_SHOW, found)]


def _export(run: Run, folder: pathlib.Path) -> Problem:
    """Draws parameters and writes them as `transformers` reads them."""
    params = run.initial_state()["params"]
    arrays = {name: np.asarray(value) for name, value in named(params).items()}
    shapes = {name: value.shape for name, value in arrays.items()}
    writer = pieces.Writer(folder / "run" / "checkpoints" / "0", shapes, set())
    for name, value in arrays.items():
        writer.write(name, value)
    writer.finish()
    (folder / "run" / "config.json").write_text(to_json(run.config))
    export_run(folder / "run", folder / "there")
    return Problem(run, params, folder / "there")


def _compare_steps(problem: Problem, budget: float) -> list[dict]:
    """Trains with every candidate on one batch; rows of the times and of what the losses were."""
    config, losses = problem.run.config, {}
    shape = config.batch_size, config.data.seq_len
    tokens = np.random.default_rng(0).integers(config.data.vocabulary, size=shape, dtype=np.int32)

    def candidate(name: str, make, package: str = "") -> Candidate:
        def recorded(problem):
            step, seen = make(problem), losses.setdefault(name, [])

            def call():
                seen.append(step())
                return (seen[-1],)

            call()  # compiles
            return call

        return Candidate(name, recorded, package=package, runs_on="torch" if package else "jax")

    def theirs(experts: str, compiled: bool):
        make = lambda p: hugging_face.make_step(  # noqa: E731
            p.folder, experts, compiled, config.optimizer, tokens
        )
        return candidate(_name(experts, compiled), make, THEIRS)

    # batched_mm copies an expert's matrices for each token: 13 GB a layer.
    peers = [theirs("eager", False), theirs("grouped_mm", False), theirs("grouped_mm", True)]
    found = [candidate(OURS, lambda p: _make_step(p, tokens)), *peers]
    timings, rows = measure(found, problem, budget, once=SLOW), []
    for one in found:
        row = {"candidate": one.name, "device": device(one.runs_on)}
        row |= summary(timings[one.name], timings[OURS])
        if "ms" in row:
            row["tokens_per_second"] = 1e3 * tokens.size / row["ms"]
            row |= compare_losses(losses[one.name], losses[OURS])
        rows.append(row)
        print(f"  step, {one.name}: {row.get('ms')} ms, {row['status']}")
    return rows


def compare_losses(theirs: list[float], ours: list[float]) -> dict:
    """Returns the first loss, and by how much the first steps' differ: too much is the status."""
    pairs = list(zip(theirs[:COMPARED], ours, strict=False))
    error = max(abs(a - b) for a, b in pairs)
    row = {"loss": theirs[0], "error": error}
    return row if error <= TOLERANCE else row | {"status": f"another loss, by {error:.1e}"}


def _make_step(problem: Problem, tokens_BT):
    """Returns a call of the run's own training step that returns its loss."""
    run = problem.run
    ones = np.ones_like(tokens_BT)
    place = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    weight = np.where(place < tokens_BT.shape[1] - 1, 1, 0).astype(np.float32)
    batch = {"tokens": tokens_BT, "targets": np.roll(tokens_BT, -1, 1), "bytes": ones}
    batch = run.put(batch | {"segments": ones, "positions": place, "weight": weight})
    step = run.jit(run.train_step, donate_argnums=0)
    state = run.initial_state()

    def call() -> float:
        nonlocal state
        state, sums = step(state, batch)
        loss = float(sums["loss"] / sums["weight"])
        jax.block_until_ready(state)
        return loss

    return call


def _compare_decoding(problem: Problem, rows: int, tokens: int, quick: bool) -> list[dict]:
    """Continues so many prompts with every candidate; rows of the times and of equal tokens."""
    shape = rows, PROMPT
    vocabulary = problem.run.config.data.vocabulary
    prompts = np.random.default_rng(1).integers(vocabulary, size=shape, dtype=np.int32)

    def theirs(experts: str, compiled: bool) -> Candidate:
        make = lambda p: _outputs(  # noqa: E731
            hugging_face.make_generation(p.folder, experts, compiled, prompts, tokens)
        )
        return Candidate(_name(experts, compiled), make, package=THEIRS, runs_on="torch")

    found = [Candidate(OURS, lambda p: _outputs(_make_generation(p, prompts, tokens)))]
    found += [theirs(experts, False) for experts in hugging_face.EXPERTS]
    found.append(theirs("batched_mm", True))
    timings, told = measure(found, problem, 1.0 if quick else 60.0, once=SLOW), []
    for one in found:
        timing = timings[one.name]
        row = {"rows": rows, "candidate": one.name, "device": device(one.runs_on)}
        row |= summary(timing, timings[OURS])
        if timing.output and timings[OURS].output:
            row["equal"] = float((timing.output[0] == timings[OURS].output[0]).mean())
            row["tokens_per_second"] = 1e3 * rows * tokens / row["ms"]
        told.append(row)
        print(f"  {rows} rows, {one.name}: {row.get('ms')} ms, {row['status']}")
    return told


def _make_generation(problem: Problem, prompts, most: int):
    """Returns a call of the run's own sampler that returns the tokens, [B, N]."""
    run = problem.run
    options = {"rows": len(prompts), "longest": prompts.shape[1], "most": most, "stops": ()}
    options["vocabulary"] = run.config.data.vocabulary
    sampler = Sampler(run, Sampling(temperature=0.0), **options)

    def generate() -> np.ndarray:
        drawn = sampler.draw(problem.params, prompts.tolist(), range(len(prompts)))
        return np.stack([rows.token_B for rows in drawn], 1)

    return generate


def _outputs(call):
    call()  # compiles
    return lambda: (call(),)


def _name(experts: str, compiled: bool) -> str:
    return f"{THEIRS}, {experts}{', torch.compile' if compiled else ''}"


def _facts(run: Run) -> dict:
    """Returns the numbers of the notes."""
    config, flops = run.config, run.task.flops(run.config)
    model, count = config.model, sum(a.size for a in jax.tree.leaves(run.params))
    facts = {"parameters": count / 1e6, "head": flops.head / flops.model}
    facts |= {"width": model.width, "depth": model.depth, "heads": model.num_heads}
    facts |= {"head_dim": model.head_dim, "kv_heads": model.kv_heads}
    facts |= {"experts": config.moe.num_experts, "hidden": config.moe.expert_dim}
    facts |= {"vocabulary": config.data.vocabulary, "rows": config.batch_size}
    return facts | {"length": config.data.seq_len}
