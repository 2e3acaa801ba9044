"""Small decoder, for one GPU: 12 blocks of width 768, 64 fine-grained experts, K = 8, one shared.

The shape of OLMoE (Muennighoff et al. 2024) at a third of its width: experts of width 256, all of
SwiGLU, QK-norm, no biases; the first block is dense (DeepSeekMoE, Dai et al. 2024). Any set that
`python -m moe.data.prepare text` made, or a folder of .bin shards of GPT-2's tokens, is its data:

    python train.py --config=configs/text_small.py --workdir=runs/text --config.data.name=DIR
    ... --config.moe.dense=True                          the dense counterpart at equal FLOPs
    python plan.py --config=configs/text_small.py --topology=v5e:2x4 --config.data.vocabulary=50304

It has not been trained to its end here: no result is claimed.
"""

from ml_collections import ConfigDict

from moe.config import default


def get_config() -> ConfigDict:
    config = default("text")
    config.num_steps = 10_000
    config.batch_size = 128  # rows of 1,024 tokens
    config.data.seq_len = 1024
    config.model.update({"width": 768, "depth": 12, "mlp_dim": 2048, "num_heads": 12})
    config.model.update({"dtype": "bfloat16", "scan": True, "remat": "dots_no_batch"})
    config.model.update({"rope_base": 10_000.0, "z_loss": 1e-4, "chunk": 4096})
    config.moe.update({"layers": "from-1", "num_experts": 64, "expert_dim": 256})
    config.moe.update({"shared_experts": 1, "dispatch": "dropless"})
    config.router.name = "topk"
    config.router.topk.update({"k": 8, "noise": 0.0, "importance": 0.0, "load": 0.0})
    config.router.topk.update({"balance": 0.01, "z": 1e-3})
    config.optimizer.update({"learning_rate": 6e-4, "warmup_steps": 500, "b2": 0.95})
    config.optimizer.update({"weight_decay": 0.1, "accumulate": 4})
    config.eval.update({"every": 1000, "batch_size": 32})
    config.checkpoint.every = 1000
    return config
