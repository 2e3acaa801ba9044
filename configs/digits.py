"""Digits."""

from ml_collections import ConfigDict

from moe.config import default


def get_config() -> ConfigDict:
    config = default()
    config.num_steps = 1000
    config.batch_size = 64
    config.model.update({"width": 64, "depth": 4, "mlp_dim": 128, "num_heads": 4})
    config.model.update({"patch_size": 2, "pool": "mean"})
    config.moe.update({"layers": "1,3", "num_experts": 8, "expert_dim": 64})
    config.router.name = "sparse_expert_choice"
    config.optimizer.update({"learning_rate": 3e-3, "weight_decay": 0.05, "warmup_steps": 100})
    config.data.augment.crop = 1
    return config
