"""Fashion-MNIST: a V-MoE on 28 x 28 images, for one GPU or a patient laptop.

    apt-get install dataset-fashion-mnist                (Debian, Ubuntu), or the four files of
                                                         github.com/zalandoresearch/fashion-mnist
    python -m moe.data.prepare images --name=fashion_mnist --idx=/usr/share/datasets/fashion-mnist
    python train.py --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
    ... --config.moe.dense=True                          the dense counterpart at equal FLOPs

A starting point, not a tuned recipe: it has not been run to the end, so no accuracy is claimed.
"""

from ml_collections import ConfigDict

from moe.config import default


def get_config() -> ConfigDict:
    config = default()
    config.num_steps = 20_000  # 43 epochs
    config.data.name = "fashion_mnist"
    config.data.augment.update({"flip": True, "crop": 2, "cutout": 8})
    config.model.update({"width": 192, "depth": 6, "mlp_dim": 384, "num_heads": 3})
    config.model.update({"patch_size": 4, "pool": "mean", "position": "sincos", "dropout": 0.1})
    config.moe.update({"layers": "last-2", "expert_dim": 192})
    config.router.name = "sparse_expert_choice"
    config.optimizer.update({"learning_rate": 1e-3, "warmup": 0.05})
    config.checkpoint.every = config.eval.every = 1000
    return config
