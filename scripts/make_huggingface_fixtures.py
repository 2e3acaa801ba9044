"""Makes the models of tests/moe/store/huggingface/fixtures: random, of a few thousand parameters.

python scripts/make_huggingface_fixtures.py

It needs torch and transformers (made with 5.24 and 2.13), which nothing else here does: what these
compute, logits and 20 greedy tokens, stands beside each model, for tests that have neither. The
options of the families that change arithmetic are all in some model.
"""

import pathlib
import shutil

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

FOLDER = pathlib.Path(__file__).parent.parent / "tests/moe/store/huggingface/fixtures"
VOCABULARY, PROMPT, DRAWN = 272, 8, 20
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 12, "num_hidden_layers": 2, "max_position_embeddings": 64}
SMALL |= {"num_experts_per_tok": 2, "initializer_range": 0.4, "pad_token_id": None}
SENTENCES = {"bos_token_id": 0, "eos_token_id": 1}  # <s>, </s>
ENDS = {"bos_token_id": None, "eos_token_id": 0}  # <|endoftext|>
# Name: class, options, how it is saved.
DECODERS = {
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 6, "sliding_window": 5}
        | {"rms_norm_eps": 1e-3}
        | SENTENCES,
        {"max_shard_size": "12KB"},
    ),
    "mixtral_fused": (
        "Mixtral",
        {"num_local_experts": 3, "num_key_value_heads": 4, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
        | SENTENCES,
        {"save_original_format": False},
    ),
    "qwen3": (
        "Qwen3Moe",
        {"num_experts": 4, "moe_intermediate_size": 20, "num_key_value_heads": 1, "head_dim": 8}
        | {"norm_topk_prob": True, "mlp_only_layers": [1], "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
        | ENDS,
        {},
    ),
    "qwen3_window": (
        "Qwen3Moe",
        {"num_experts": 4, "moe_intermediate_size": 20, "num_key_value_heads": 2, "head_dim": 4}
        | {"use_sliding_window": True, "sliding_window": 4, "decoder_sparse_step": 2}
        | ENDS,
        {"dtype": torch.bfloat16},
    ),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_key_value_heads": 2} | ENDS, {}),
    "olmoe_fused": (
        "Olmoe",
        {"num_experts": 4, "norm_topk_prob": True, "num_key_value_heads": 4} | ENDS,
        {"save_original_format": False, "max_shard_size": "16KB"},
    ),
}
IMAGES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES |= {"intermediate_size": 24, "image_size": 8, "initializer_range": 0.3}
VITS = {
    "vit": (
        "ViTForImageClassification",
        {"patch_size": 2, "num_channels": 1, "num_labels": 10},
    ),
    "vit_base": ("ViTModel", {"patch_size": 4, "num_channels": 3, "hidden_act": "gelu_new"}),
}


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    for number, (name, (kind, options, how)) in enumerate(DECODERS.items()):
        torch.manual_seed(number)
        config = getattr(transformers, f"{kind}Config")(**SMALL | options)
        model = randomized(getattr(transformers, f"{kind}ForCausalLM")(config))
        how = dict(how)
        dtype = how.pop("dtype", torch.float32)
        model.to(dtype).save_pretrained(FOLDER / name, **how)
        train_tokenizer(FOLDER / name, ["<s>", "</s>"] if "mixtral" in name else ["<|endoftext|>"])
        # Read anew: a cast rounds what is no parameter too, the frequencies of RoPE.
        model = type(model).from_pretrained(FOLDER / name, dtype=torch.float32).eval()
        np.savez_compressed(FOLDER / f"{name}.npz", **continued(model))
    for number, (name, (kind, options)) in enumerate(VITS.items()):
        torch.manual_seed(100 + number)
        model = randomized(getattr(transformers, kind)(transformers.ViTConfig(**IMAGES | options)))
        model.save_pretrained(FOLDER / name)
        pixels = torch.rand(3, options["num_channels"], 8, 8)
        with torch.no_grad():
            out = model(pixels)
        told = out.logits if "num_labels" in options else out.last_hidden_state[:, 0]
        images = pixels.permute(0, 2, 3, 1).numpy()
        np.savez_compressed(FOLDER / f"{name}.npz", images=images, logits=told.numpy())
    for left in FOLDER.glob("*/generation_config.json"):
        left.unlink()


def randomized(model):
    """Draws what starts as ones or zeros at random too, so that each parameter has a say."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.3)
    return model.eval()


def continued(model) -> dict[str, np.ndarray]:
    """Returns tokens, their logits, and what the model draws greedily after some of them."""
    tokens = torch.randint(3, VOCABULARY, (2, 16))
    with torch.no_grad():
        logits = model(tokens).logits
    drawn = tokens[:, :PROMPT]
    gaps = []
    for _ in range(DRAWN):  # without a cache: the reference is the whole model each time
        with torch.no_grad():
            best = model(drawn).logits[:, -1].topk(2)
        gaps.append((best.values[:, 0] - best.values[:, 1]).min().item())
        drawn = torch.cat([drawn, best.indices[:, :1]], 1)
    assert min(gaps) > 1e-3, f"a tie of {min(gaps)}: take another seed"
    return {
        "tokens": tokens.numpy().astype(np.int32),
        "logits": logits.numpy(),
        "drawn": drawn[:, PROMPT:].numpy().astype(np.int32),
    }


def train_tokenizer(folder: pathlib.Path, special: list[str]) -> None:
    """Writes a byte-level tokenizer.json, a little smaller than the models' vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 4, **options)
    tokenizer.train_from_iterator(["the cat and the hat", "then there"] * 9, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


if __name__ == "__main__":
    main()
