"""Qwen3-30B-A3B (Yang et al. 2025): 48 blocks of width 2048, 128 experts of width 768, K = 8.

The shapes are those of the published model's config.json: 30,532,122,624 parameters, of which a
token uses 3.35 billion (tests/moe/test_configs.py). 32 heads of width 128 are twice as wide as the
stream, eight share one head of keys and values, each head is normed (QK-norm); RoPE turns with base
10^6, and the head is not the embedding.

    python plan.py --config=configs/qwen3_30b_a3b.py --topology=v5p:4x4x4    does it fit, how fast
    python train.py --config=configs/qwen3_30b_a3b.py --workdir=DIR --config.data.name=TEXT
                                                                             on every host

The balance loss is over the whole batch, as the model's was. The rest of the recipe was not
published; the one here is the custom for its size. It has not been trained here.
"""

from ml_collections import ConfigDict

from moe.config import default


def get_config() -> ConfigDict:
    config = default("text")
    config.num_steps = 100_000
    config.batch_size = 1024  # rows of 4,096 tokens
    config.data.update({"seq_len": 4096, "vocabulary": 151_936})
    config.model.update({"width": 2048, "depth": 48, "mlp_dim": 6144})
    config.model.update({"num_heads": 32, "kv_heads": 4, "head_dim": 128, "qk_norm": "head"})
    config.model.update({"rope_base": 1e6, "tied": False, "chunk": 2048})
    config.model.update({"dtype": "bfloat16", "scan": True, "remat": "full"})
    config.moe.update({"layers": "every-1", "num_experts": 128, "expert_dim": 768})
    config.moe.dispatch = "dropless"
    config.router.name = "topk"
    config.router.topk.update({"k": 8, "noise": 0.0, "importance": 0.0, "load": 0.0})
    config.router.topk.update({"balance": 0.001, "z": 0.0, "renormalise": True})
    config.optimizer.update({"learning_rate": 3e-4, "warmup_steps": 2000, "b2": 0.95})
    config.optimizer.update({"weight_decay": 0.1, "accumulate": 4})
    config.mesh.update({"data": -1, "fsdp": 1, "expert": 64, "tensor": 1})
    config.checkpoint.every = config.eval.every = 1000
    config.eval.batch_size = 1024
    return config
