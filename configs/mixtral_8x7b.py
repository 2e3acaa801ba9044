"""Mixtral 8x7B (Jiang et al. 2024): 32 blocks of width 4096, 8 experts of SwiGLU in each, K = 2.

The shapes are those of the published model's config.json: 46,702,792,704 parameters, of which a
token uses 12.88 billion (tests/moe/test_configs.py). Heads of keys are a quarter of those of
queries, RoPE turns with base 10^6, and the head is not the embedding.

    python plan.py --config=configs/mixtral_8x7b.py --topology=v5p:4x4x8     does it fit, how fast
    python train.py --config=configs/mixtral_8x7b.py --workdir=DIR --config.data.name=TEXT
                                                                             on every host

Made for 128 chips of v5p, see docs/plan.md: eight devices share the experts of a layer, two the
hidden units of each, and the dense parameters are split over `fsdp`. The recipe of its training was
not published; the one here is the custom for its size. It has not been trained here.
"""

from ml_collections import ConfigDict

from moe.config import default


def get_config() -> ConfigDict:
    config = default("text")
    config.num_steps = 100_000
    config.batch_size = 1024  # rows of 4,096 tokens
    config.data.update({"seq_len": 4096, "vocabulary": 32_000})
    config.model.update({"width": 4096, "depth": 32, "mlp_dim": 14_336})
    config.model.update({"num_heads": 32, "kv_heads": 8, "head_dim": 128, "qk_norm": "none"})
    config.model.update({"rope_base": 1e6, "tied": False, "chunk": 4096, "norm_eps": 1e-5})
    config.model.update({"dtype": "bfloat16", "scan": True, "remat": "full"})
    config.moe.update({"layers": "every-1", "num_experts": 8, "expert_dim": 14_336})
    config.moe.update({"dispatch": "capacity", "capacity_factor": 1.25})
    config.router.name = "topk"
    config.router.topk.update({"k": 2, "noise": 0.0, "importance": 0.0, "load": 0.0})
    config.router.topk.update({"balance": 0.02, "z": 0.0, "renormalise": True})
    config.optimizer.update({"learning_rate": 3e-4, "warmup_steps": 2000, "b2": 0.95})
    config.optimizer.weight_decay = 0.1
    config.mesh.update({"data": -1, "fsdp": 8, "expert": 8, "tensor": 2})
    config.checkpoint.every = config.eval.every = 1000
    config.eval.batch_size = 1024
    return config
