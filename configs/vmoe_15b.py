"""V-MoE-15B, the largest of its paper: 48 blocks, every second with 32 experts, K = 2, patch 14.

Riquelme et al. 2021 give 14.7 billion parameters and these shapes but for the widths. Those follow
from the count: an expert of D x F has 2 D F + F + D parameters, and 24 layers of 32 are nearly all
of the model, so D F is about 9.0 million. D = 1408 with 16 heads is the ViT-g of Zhai et al. 2022;
F = 6400 is then the multiple of 256 that meets it: 14,694,149,203 parameters, of which a token uses
1.71 billion (the model's own count, `plan.py` and tests/moe/test_configs.py).

    python plan.py --config=configs/vmoe_15b.py --topology=v5p:4x4x8      does it fit, how fast
    python train.py --config=configs/vmoe_15b.py --workdir=/mnt/BUCKET/vmoe_15b    on every host
    ... --config.moe.dense=True        the dense row: an MLP of the experts' FLOPs in their place

Made for 128 chips of v5p, see docs/plan.md: each chip has one expert of every layer (the axis
`expert`), the dense parameters are split over `fsdp`, and the rest of the pod is `data`.

Departures from the paper, which trained on JFT-3B: ImageNet-21k's classes; the mean of the tokens
in place of a class token, which leaves 256 of them, a multiple of every tile; a capacity factor of
17/16, which makes 136 slots, one of 8; and those of configs/vmoe_b16_imagenet21k.py. It has not
been trained here: no accuracy is claimed.
"""

from ml_collections import ConfigDict

from moe.config import default


def get_config() -> ConfigDict:
    config = default()
    config.batch_size = 4096
    config.num_steps = 90 * 13_050_912 // config.batch_size  # imagenet21k, full[102400:]
    config.loss = "sigmoid"
    config.data.update({"name": "imagenet21k", "image_size": 224, "channels": 3})
    config.data.update({"num_classes": 21_843})
    config.data.update({"train_split": "full[102400:]", "eval_split": "full[:102400]"})
    config.data.augment.update({"flip": True, "resized_crop": (0.05, 1.0), "mixup": 0.5})
    config.model.update({"width": 1408, "depth": 48, "mlp_dim": 6400, "num_heads": 16})
    config.model.update({"patch_size": 14, "pool": "mean", "dtype": "bfloat16"})
    config.model.update({"scan": True, "remat": "full"})
    config.moe.update({"layers": "every-2", "num_experts": 32, "group_size": 8})
    config.moe.update({"capacity_factor": 17 / 16, "eval_capacity_factor": 4.0})
    config.router.name = "topk"
    config.router.topk.update({"k": 2, "noise": 1.0, "importance": 0.005, "load": 0.005})
    config.router.topk.vmoe_losses = True
    config.optimizer.update({"name": "adamw", "learning_rate": 3e-4, "weight_decay": 0.1})
    config.optimizer.update({"schedule": "linear", "warmup_steps": 10_000, "grad_clip": 1.0})
    config.mesh.update({"data": -1, "fsdp": 4, "expert": 32, "tensor": 1})
    config.checkpoint.every = config.eval.every = 1000
    config.eval.batch_size = 4096
    return config
