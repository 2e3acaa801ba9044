"""Says what the config.json and the tensors of vision transformers mean here, and back.

Source: Dosovitskiy et al. 2021, and `transformers`' ViT, which computes the same function.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe.errors import UsageError
from moe.models.vit import SIZES
from moe.store.huggingface.published import count, number, refuse
from moe.store.origins import FLAT, SAME, Layout, Rule, linear, permuted

# GELU by its names there, and here.
GELUS = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}


class Vit(NamedTuple):
    """Describes the layout of one class; attributes and methods are as of `decoders.Decoder`."""

    architecture: str
    prefix: str  # of the tensors before the head
    skipped: tuple[str, ...]
    fresh: tuple[str, ...]
    kind = "vit"
    task = "images"

    @property
    def rules(self) -> tuple[Rule, ...]:
        return _rules(self.prefix, bool(self.prefix))

    def settings(self, published: Mapping[str, Any]) -> dict[str, Any]:
        p = {**_DEFAULTS, **{k: v for k, v in published.items() if v is not None}}
        if p["hidden_act"] not in GELUS:
            refuse("hidden_act", p["hidden_act"], f"one of {', '.join(GELUS)}")
        if not p["qkv_bias"]:
            refuse("qkv_bias", False, "true")
        size, patch = count(p, "image_size"), count(p, "patch_size")
        if size % patch:
            raise UsageError(f"config.json says {patch=}, which does not divide image_size={size}")
        return {
            "data.image_size": size,
            "data.channels": count(p, "num_channels"),
            "data.num_classes": _classes(p) if self.prefix else 1,
            "model.width": count(p, "hidden_size"),
            "model.depth": count(p, "num_hidden_layers"),
            "model.mlp_dim": count(p, "intermediate_size"),
            "model.num_heads": count(p, "num_attention_heads"),
            "model.patch_size": patch,
            "model.norm_eps": number(p, "layer_norm_eps"),
            "model.gelu": GELUS[p["hidden_act"]],
            "model.pool": "cls",
            "model.position": "learned",
            "model.head": "linear",
            "moe.layers": "none",
            "depth.layers": "none",
        }

    def published(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        s, sizes = settings, _sizes(settings)
        classes = range(s["data.num_classes"])
        return {
            "architectures": [self.architecture],
            "model_type": self.kind,
            "hidden_act": {"exact": "gelu", "tanh": "gelu_new"}[s["model.gelu"]],
            "qkv_bias": True,
            "image_size": s["data.image_size"],
            "num_channels": s["data.channels"],
            "patch_size": s["model.patch_size"],
            "hidden_size": sizes["model.width"],
            "num_hidden_layers": sizes["model.depth"],
            "intermediate_size": sizes["model.mlp_dim"],
            "num_attention_heads": sizes["model.num_heads"],
            "layer_norm_eps": s["model.norm_eps"],
            "id2label": {str(i): f"LABEL_{i}" for i in classes},
            "label2id": {f"LABEL_{i}": i for i in classes},
        }

    def arithmetic(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what of a run's flat config changes a logit."""
        names = ("patch_size", "norm_eps", "gelu", "pool", "position", "head")
        found = _sizes(settings) | {f"model.{name}": settings[f"model.{name}"] for name in names}
        found |= {f"data.{n}": settings[f"data.{n}"] for n in ("image_size", "channels")}
        layers = ("moe.layers", "depth.layers")
        return found | {key: settings[key] or "none" for key in layers}


_DEFAULTS = {
    "hidden_act": "gelu",
    "qkv_bias": True,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-12,
}


def _sizes(settings: Mapping[str, Any]) -> dict[str, int]:
    """Returns the sizes of a run's transformer: explicit, or else of the named size."""
    names = ("model.width", "model.depth", "model.mlp_dim", "model.num_heads")
    pairs = zip(names, SIZES[settings["model.size"]], strict=True)
    return {name: settings[name] or size for name, size in pairs}


def _classes(p: Mapping[str, Any]) -> int:
    """Returns how many classes a config.json names; two where it names none."""
    names = p.get("id2label")
    return len(names) if isinstance(names, dict) and names else p.get("num_labels", 2)


def interpolated(old: int, new: int) -> Layout:
    """Returns the layout of position embeddings that were learned on a grid of other size.

    The grid is interpolated, cubic; the class token's own position stays.

    Args:
      old, new: patches along a side.
    """

    def read(a, shape):
        a, width = np.asarray(a, np.float32), shape[-1]
        grid = jnp.asarray(a[0, 1:]).reshape(old, old, width)
        grid = jax.image.resize(grid, (new, new, width), "cubic", antialias=new < old)
        grid = np.asarray(grid, np.float32).reshape(1, new * new, width)
        return np.concatenate([a[:, :1], grid], 1)

    return Layout(lambda shape: (1, 1 + old * old, shape[-1]), read, None)


def side(shape: tuple[int, ...]) -> int:
    """Returns the patches along a side of position embeddings [1, 1 + N^2, D]."""
    return math.isqrt(shape[1] - 1)


def _rules(prefix: str, head: bool) -> tuple[Rule, ...]:
    block, layer = "blocks.{n}", f"{prefix}encoder.layer.{{n}}"
    embeddings = f"{prefix}embeddings"
    projection = f"{embeddings}.patch_embeddings.projection"
    rules = [
        Rule("cls", f"{embeddings}.cls_token", SAME),
        Rule("position", f"{embeddings}.position_embeddings", SAME),
        Rule("embed.kernel", f"{projection}.weight", permuted(3, 2, 0, 1)),
        Rule("embed.bias", f"{projection}.bias", SAME),
    ]
    norms = {"norm": f"{prefix}layernorm", f"{block}.norm_attention": f"{layer}.layernorm_before"}
    norms[f"{block}.norm_feed_forward"] = f"{layer}.layernorm_after"
    for ours, theirs in norms.items():
        rules.append(Rule(f"{ours}.scale", f"{theirs}.weight", SAME))
        rules.append(Rule(f"{ours}.bias", f"{theirs}.bias", SAME))
    maps = {
        f"{block}.attention.{name}": (f"{layer}.attention.attention.{name}", linear(), FLAT)
        for name in ("query", "key", "value")
    }
    maps[f"{block}.attention.out"] = (f"{layer}.attention.output.dense", linear(2), SAME)
    maps[f"{block}.feed_forward.wide"] = (f"{layer}.intermediate.dense", linear(), SAME)
    maps[f"{block}.feed_forward.narrow"] = (f"{layer}.output.dense", linear(), SAME)
    if head:
        maps["head"] = ("classifier", linear(), SAME)
    for ours, (theirs, kernel, bias) in maps.items():
        rules.append(Rule(f"{ours}.kernel", f"{theirs}.weight", kernel))
        rules.append(Rule(f"{ours}.bias", f"{theirs}.bias", bias))
    return tuple(rules)


VITS = (
    Vit("ViTForImageClassification", "vit.", (), ()),
    Vit("ViTModel", "", (r"pooler\.dense\.(weight|bias)",), ("head.",)),
)
