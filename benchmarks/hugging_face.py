"""What `transformers` on torch makes of an exported Mixtral: a training step, and greedy decoding.

Needs torch and transformers where it is called, not where it is imported.
"""

import os
import pathlib

import numpy as np

# How `transformers` computes experts: a loop over them, sorted rows in one call, or a copy of its
# expert's matrices for each row, which is made for the few tokens of decoding.
EXPERTS = ("eager", "grouped_mm", "batched_mm")


def load(folder: pathlib.Path, experts: str):
    """Returns the model of a directory in float32, on all cores, with torch's own attention."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return transformers.MixtralForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="sdpa",
        experts_implementation=experts,
    )


def make_step(folder: pathlib.Path, experts: str, compiled: bool, optimizer, tokens_BT: np.ndarray):
    """Returns a call that makes a whole training step and returns its loss.

    Args:
      experts: one of `EXPERTS`.
      compiled: whether `torch.compile` makes the model.
      optimizer: the section of a config here: AdamW, as its keys say.
      tokens_BT: each token's target is the next one; the last of a row has none.
    """
    import torch

    model = load(folder, experts).train()
    names = ("embed", "norm", "lm_head")  # what decays here are kernels alone
    kernels, others = [], []
    for name, parameter in model.named_parameters():
        (others if any(part in name for part in names) else kernels).append(parameter)
    groups = [{"params": kernels}, {"params": others, "weight_decay": 0.0}]
    betas, rate = (optimizer.b1, optimizer.b2), optimizer.learning_rate
    decay = optimizer.weight_decay
    adamw = torch.optim.AdamW(groups, rate, betas, weight_decay=decay, fused=True)
    forward = torch.compile(model) if compiled else model
    tokens = torch.tensor(tokens_BT, dtype=torch.int64)

    def step() -> float:
        adamw.zero_grad(set_to_none=True)
        loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.grad_clip)
        adamw.step()
        return loss.item()

    return step


def make_generation(
    folder: pathlib.Path, experts: str, compiled: bool, prompts_BT: np.ndarray, most: int
):
    """Returns a call that continues prompts by the likeliest tokens, and returns these, [B, N]."""
    import torch

    model = load(folder, experts).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    options = {"max_new_tokens": most, "do_sample": False}
    if compiled:
        model.forward = torch.compile(model.forward)
        options["cache_implementation"] = "static"  # one shape, so compiled once
    prompts = torch.tensor(prompts_BT, dtype=torch.int64)
    mask = torch.ones_like(prompts)

    def generate() -> np.ndarray:
        with torch.no_grad():
            out = model.generate(prompts, attention_mask=mask, **options)
        return out[:, prompts.shape[1] :].numpy()

    return generate
