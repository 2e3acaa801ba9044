"""OLMoE-1B-7B (Muennighoff et al. 2024): 16 blocks of width 2048, 64 experts of width 1024, K = 8.

The shapes are those of the published model's config.json: 6,919,161,856 parameters, of which a
token uses 1.28 billion (tests/moe/test_configs.py). A token's weights are not made to add up to 1,
the RMSNorm of queries and of keys is over all heads as one vector, and the head is not the
embedding.

    python plan.py --config=configs/olmoe_1b_7b.py --topology=v5p:4x4x4      does it fit, how fast
    python train.py --config=configs/olmoe_1b_7b.py --workdir=DIR --config.data.name=TEXT

Auxiliary losses, learning rate and batch are the paper's; the schedule here is a cosine to 0. It
has not been trained here.
"""

from ml_collections import ConfigDict

from moe.config import default


def get_config() -> ConfigDict:
    config = default("text")
    config.num_steps = 1_200_000
    config.batch_size = 1024  # rows of 4,096 tokens
    config.data.update({"seq_len": 4096, "vocabulary": 50_304})
    config.model.update({"width": 2048, "depth": 16, "mlp_dim": 1024, "num_heads": 16})
    config.model.update({"qk_norm": "all", "rope_base": 10_000.0, "tied": False, "chunk": 4096})
    config.model.update({"dtype": "bfloat16", "scan": True, "remat": "full", "norm_eps": 1e-5})
    config.moe.update({"layers": "every-1", "num_experts": 64, "expert_dim": 1024})
    config.moe.dispatch = "dropless"
    config.router.name = "topk"
    config.router.topk.update({"k": 8, "noise": 0.0, "importance": 0.0, "load": 0.0})
    config.router.topk.update({"balance": 0.01, "z": 1e-3})
    config.optimizer.update({"learning_rate": 4e-4, "warmup_steps": 2500, "b2": 0.95})
    config.optimizer.update({"weight_decay": 0.1, "accumulate": 4})
    config.mesh.update({"data": -1, "fsdp": 1, "expert": 16, "tensor": 1})
    config.checkpoint.every = config.eval.every = 1000
    config.eval.batch_size = 1024
    return config
