"""CIFAR-100 from scratch: a small V-MoE on 32 x 32 images, for one accelerator.

    pip install 'permoe[prepare]' && python -m moe.data.prepare cifar100
    python train.py --config=configs/cifar100.py --workdir=runs/cifar100
    ... --config.moe.dense=True                          the dense counterpart at equal FLOPs

A starting point, not a tuned recipe: it has not been run to the end, so no accuracy is claimed.
"""

from ml_collections import ConfigDict

from moe.config import default


def get_config() -> ConfigDict:
    config = default()
    config.num_steps = 40_000  # 205 epochs
    config.batch_size = 256
    config.data.name = "cifar100"
    config.data.augment.update({"flip": True, "crop": 4, "cutout": 8, "mixup": 0.2})
    config.model.update({"width": 256, "depth": 8, "mlp_dim": 512, "num_heads": 4})
    config.model.update({"patch_size": 4, "pool": "mean", "position": "sincos", "dropout": 0.1})
    config.moe.update({"layers": "every-2", "expert_dim": 256})
    config.router.name = "sparse_expert_choice"
    config.optimizer.update({"learning_rate": 1e-3, "warmup": 0.05, "label_smoothing": 0.1})
    config.checkpoint.every = config.eval.every = 1000
    return config
