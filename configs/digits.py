"""Digits, the default: a small V-MoE with the paper's router on real images, without a download.

1,797 images of 8 x 8 pixels that scikit-learn ships (1,438 for training, 359 for testing), 16
patches each, 4 blocks of width 64; blocks 1 and 3 have 8 experts of width 64 and K = 2, the work of
one MLP of width 134.

    make train                                           or, in its parts:
    python train.py --config=configs/digits.py --workdir=runs/digits
    python eval.py --workdir=runs/digits
    ... --config.router.name=topk                        another router, all else equal
    ... --config.moe.dense=True                          the dense counterpart at equal FLOPs

Trains in about a minute on two CPU cores (`make train` installs first); docs/league.md has the
accuracy of every router over five seeds.
"""

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
    config.optimizer.update({"learning_rate": 3e-3, "warmup": 1 / 12})
    return config
