"""The default: a small V-MoE with the paper's router on real images that need no download."""

from ml_collections import ConfigDict

from moe.config import default


def get_config() -> ConfigDict:
    config = default()
    config.num_steps = 1200  # 53 epochs
    config.batch_size = 64
    config.data.augment.mixup = 0.4
    config.model.update({"width": 64, "depth": 4, "mlp_dim": 128, "num_heads": 4})
    config.model.update({"patch_size": 2, "pool": "mean", "position": "sincos"})
    config.moe.update({"layers": "last-2", "num_experts": 8, "expert_dim": 64})
    config.router.name = "sparse_expert_choice"
    config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 100})
    return config
