"""V-MoE-S/32 on ImageNet-1k from scratch: experts in the last two, 8 experts, K = 2, 300 epochs.

The recipe published with V-MoE (Riquelme et al. 2021) in the repository google-research/vmoe, file
vmoe_s32_last2_ilsvrc2012_randaug_light1.py, which reports 73.1 % on its test split (the official
validation images) and 76.8 % on its validation split (1 % of the training images) after 5 h 50 min
on a TPUv3-32. Its S has 8 blocks of width 512, unlike the S of other papers.

    pip install 'permoe[prepare]' && python -m moe.data.prepare imagenet2012
    python train.py --config=configs/vmoe_s32_imagenet.py --workdir=runs/vmoe_s32
    ... --config.router.name=sparse_expert_choice        the paper's router on the same model
    ... --config.moe.dense=True                          the dense counterpart at equal FLOPs

Departures: no RandAugment (the recipe uses RandAugment(2, 10)); the linear decay ends at 0, not at
1e-5; mixup pairs neighbours of the shuffled stream, with a weight for each pair, not one for each
device; no pre-logits layer, and the head's bias starts at 0, not at -ln 1000; MLPs start from
LeCun's law and each expert from a draw of its own, not from Xavier's law and all experts of a layer
alike; an expert has 105 slots in training, not the next multiple of 4; bfloat16, not float32; in
evaluation the largest square is scaled to 224, not the middle of an image scaled to 256. It has not
been run to the end here, so no accuracy is claimed for it.
"""

from ml_collections import ConfigDict

from moe.config import default


def get_config() -> ConfigDict:
    config = default()
    config.batch_size = 8192
    config.num_steps = 300 * 1_268_355 // config.batch_size  # train[:99%]
    config.loss = "sigmoid"
    config.data.update({"name": "imagenet2012", "image_size": 224})
    config.data.update({"train_split": "train[:99%]", "eval_split": "validation"})
    config.data.augment.update({"flip": True, "resized_crop": (0.05, 1.0), "mixup": 0.2})
    config.model.update({"width": 512, "depth": 8, "mlp_dim": 2048, "num_heads": 8})
    config.model.update({"patch_size": 32, "pool": "cls", "dtype": "bfloat16"})
    config.moe.update({"layers": "last-2", "num_experts": 8, "dropout": 0.2, "group_size": 8})
    config.moe.update({"capacity_factor": 1.05, "eval_capacity_factor": 4.0})
    config.router.name = "topk"
    config.router.topk.update({"k": 2, "noise": 1.0, "importance": 0.005, "load": 0.005})
    config.router.topk.vmoe_losses = True
    config.optimizer.update({"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.1})
    config.optimizer.update({"schedule": "linear", "warmup_steps": 10_000, "grad_clip": 1.0})
    config.checkpoint.every = config.eval.every = config.log.every * 20
    config.eval.batch_size = 4096
    return config
