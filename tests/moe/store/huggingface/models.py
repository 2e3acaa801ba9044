"""The fixtures, and what a run computes, for the tests of import and export.

scripts/make_huggingface_fixtures.py made them by `transformers`.
"""

import pathlib

import jax
import numpy as np
from flax import nnx

from moe.evaluate.evaluation import restore
from moe.evaluate.sampling import Sampler, Sampling
from moe.store.huggingface import __main__ as huggingface
from moe.store.huggingface import tensors
from moe.store.workdir import saved_config
from moe.train.run import set_up
from tests.moe.conftest import quick_jit

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
DECODERS = ("mixtral", "mixtral_fused", "qwen3", "qwen3_window", "olmoe", "olmoe_fused")
VITS = ("vit", "vit_base")


def exchange(action, source, out, *flags):
    huggingface.main([action, f"--from={source}", f"--out={out}", *flags])
    return out


def expected(name):
    """What `transformers` computed: tokens or images, logits, drawn tokens."""
    return np.load(FIXTURES / f"{name}.npz")


def opened(workdir):
    """The run of a directory on one device, and its parameters."""
    saved = saved_config(workdir).copy_and_resolve_references()
    run = set_up(saved.lock(), devices=jax.devices()[:1])
    return run, restore(workdir, run, None)[0]


def logits(workdir, inputs):
    run, params = opened(workdir)

    def compute(params, inputs):
        model = nnx.merge(run.graphdef, params)
        out = model(inputs)
        return out.logits if run.config.task == "images" else model.logits(out.hidden_BTD)

    return np.asarray(quick_jit(compute)(params, inputs))


def drawn(workdir, prompts, most):
    run, params = opened(workdir)
    sampler = Sampler(
        run,
        Sampling(temperature=0),
        rows=len(prompts),
        longest=prompts.shape[1],
        most=most,
        vocabulary=run.config.data.vocabulary,
        stops=(),
    )
    rows = list(sampler.draw(params, prompts.tolist(), [0] * len(prompts)))
    return np.stack([row.token_B for row in rows], 1)


def arrays(directory):
    """{name: array} of a directory's safetensors."""
    found = tensors.read(tensors.find(directory))
    return {name: part(()).astype(np.float32) for name, part in found}
