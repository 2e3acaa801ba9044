"""V-MoE-B/16 on ImageNet-21k: experts in every second block, 32 experts, K = 2, 300 epochs.

The recipe published with V-MoE (Riquelme et al. 2021) in the repository google-research/vmoe, file
vmoe_paper/pretrain_imagenet21k.py, for ViT-B/16 and "Every 2"; its checkpoint, fine-tuned at 384
pixels, is reported with 85.6 % on ILSVRC 2012 and 98.7 % on CIFAR-10. That file has 8 experts; 32
are the paper's.

    python plan.py --config=configs/vmoe_b16_imagenet21k.py --topology=v5e:4x8   fits, and how fast
    python train.py --config=configs/vmoe_b16_imagenet21k.py --workdir=runs/vmoe_b16
    ... --config.router.name=sparse_expert_choice        the paper's router on the same model
    ... --config.moe.dense=True                          the dense counterpart at equal FLOPs

ImageNet-21k is not in TFDS: `imagenet21k` is a set of your own in its array_record form, with the
split `full`, 21,843 classes.

Departures: no RandAugment (the recipe uses RandAugment(2, 20)); the linear decay ends at 0, not at
1e-5; mixup pairs neighbours of the shuffled stream, with a weight for each pair, not one for each
device; the head's bias starts at 0, not at -10; MLPs start from LeCun's law and each expert from a
draw of its own, not from Xavier's law and all experts of a layer alike; bfloat16, not float32; in
evaluation the largest square is scaled to 224, not the middle of an image scaled to 256. It has not
been run to the end here, so no accuracy is claimed for it.
"""

from ml_collections import ConfigDict

from moe.config import default


def get_config() -> ConfigDict:
    config = default()
    config.batch_size = 4096
    config.num_steps = 300 * 13_050_912 // config.batch_size  # full[102400:]
    config.loss = "sigmoid"
    config.data.update({"name": "imagenet21k", "image_size": 224, "channels": 3})
    config.data.update({"num_classes": 21_843})
    config.data.update({"train_split": "full[102400:]", "eval_split": "full[:102400]"})
    config.data.augment.update({"flip": True, "resized_crop": (0.05, 1.0), "mixup": 0.5})
    config.model.update({"size": "B", "patch_size": 16, "pool": "cls", "dtype": "bfloat16"})
    config.model.update({"scan": True, "remat": "dots"})
    config.moe.update({"layers": "every-2", "num_experts": 32, "group_size": 8})
    config.moe.update({"capacity_factor": 1.05, "eval_capacity_factor": 4.0})
    config.router.name = "topk"
    config.router.topk.update({"k": 2, "noise": 1.0, "importance": 0.005, "load": 0.005})
    config.router.topk.vmoe_losses = True
    config.optimizer.update({"name": "adamw", "learning_rate": 8e-4, "weight_decay": 0.1})
    config.optimizer.update({"schedule": "linear", "warmup_steps": 10_000, "grad_clip": 1.0})
    config.mesh.update({"data": -1, "fsdp": 1, "expert": 8, "tensor": 1})
    config.checkpoint.every = config.eval.every = 1000
    config.eval.batch_size = 4096
    return config
