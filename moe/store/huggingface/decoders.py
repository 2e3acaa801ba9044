"""Says what the config.json and the tensors of Mixtral, Qwen3-MoE and OLMoE mean here, and back.

Sources: Jiang et al. 2024 (Mixtral), Yang et al. 2025 (Qwen3), Muennighoff et al. 2024 (OLMoE), and
their files in `transformers`. All turn halves in RoPE, as `moe.nn.rope` does: nothing is permuted.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from moe.models.build import moe_layers
from moe.store.huggingface.names import rules
from moe.store.huggingface.published import count, number, refuse
from moe.store.origins import Rule


class Decoder(NamedTuple):
    """Describes one family.

    Attributes:
      kind: `model_type` of its config.json.
      architecture: its class there.
      qk_norm: of `moe.nn.decoder_block`.
      experts, expert_dim: where config.json has their number and their width.
      defaults: what config.json means where it says nothing.
      rules: whose tensor a parameter is; the first one of a parameter is what an export writes.
    """

    kind: str
    architecture: str
    qk_norm: str
    experts: str
    expert_dim: str
    defaults: Mapping[str, Any]
    rules: tuple[Rule, ...]
    task = "text"
    fresh = ()  # parameters that a directory of this class lacks
    skipped = (r".*\.rotary_emb\.inv_freq",)  # old files kept this table of constants

    def settings(self, published: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the keys of a run's config that a config.json sets.

        Raises:
          UsageError: it asks for what is not computed here, or lacks a size.
        """
        said = {k: v for k, v in published.items() if v is not None or k in _NULLS}
        p = {**_DEFAULTS, **self.defaults, **said}
        _refuse_others(p)
        depth, heads = count(p, "num_hidden_layers"), count(p, "num_attention_heads")
        # `transformers` 5 writes the number of experts under either name.
        experts = count(p, next((key for key in _EXPERTS if key in p), self.experts))
        layers, mixtral = self._layers(p, depth), self.kind == "mixtral"
        window = p["sliding_window"] if mixtral or p["use_sliding_window"] else 0
        return {
            "data.vocabulary": count(p, "vocab_size"),
            "data.seq_len": count(p, "max_position_embeddings"),
            "model.width": count(p, "hidden_size"),
            "model.depth": depth,
            "model.mlp_dim": count(p, "intermediate_size"),
            "model.num_heads": heads,
            "model.kv_heads": p["num_key_value_heads"] or heads,
            "model.head_dim": p["head_dim"] or count(p, "hidden_size") // heads,
            "model.qk_norm": self.qk_norm,
            "model.window": 0 if self.kind == "olmoe" else window or 0,
            "model.rope_base": _rope_base(p),
            "model.norm_eps": number(p, "rms_norm_eps"),
            "model.tied": bool(p["tie_word_embeddings"]),
            "model.dtype": "bfloat16" if _dtype(p) == "bfloat16" else "float32",
            "moe.layers": _spec(layers, depth),
            "moe.num_experts": experts,
            "moe.expert_dim": count(p, self.expert_dim),
            "moe.dispatch": "dropless",
            **_NOT_THERE,
            "router.name": "topk",
            "router.topk.k": count(p, "num_experts_per_tok"),
            "router.topk.renormalise": mixtral or bool(p["norm_topk_prob"]),
            "router.topk.balance": number(p, "router_aux_loss_coef"),
            **{f"router.topk.{other}": 0.0 for other in ("noise", "importance", "load")},
        }

    def published(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the config.json of a run, given its flat config."""
        s = {name: settings[f"model.{name}"] for name in _MODEL}
        topk, base = settings["router.name"] == "topk", float(s["rope_base"])
        depth, experts = s["depth"], settings["moe.num_experts"]
        layers = moe_layers(settings["moe.layers"], depth)
        expert_dim = settings["moe.expert_dim"] or s["mlp_dim"]
        p = {
            "architectures": [self.architecture],
            "model_type": self.kind,
            "hidden_act": "silu",
            "hidden_size": s["width"],
            "intermediate_size": s["mlp_dim"],
            "num_hidden_layers": depth,
            "num_attention_heads": s["num_heads"],
            "num_key_value_heads": s["kv_heads"] or s["num_heads"],
            "vocab_size": settings["data.vocabulary"],
            "max_position_embeddings": settings["data.seq_len"],
            "rms_norm_eps": s["norm_eps"],
            "rope_theta": base,
            "rope_parameters": {"rope_theta": base, "rope_type": "default"},
            "tie_word_embeddings": s["tied"],
            "attention_bias": False,
            self.experts: experts,
            "num_experts_per_tok": int(settings["router.topk.k"]) if topk else 1,
            "router_aux_loss_coef": settings["router.topk.balance"] if topk else 0.0,
        }
        p[self.expert_dim] = expert_dim
        if self.kind != "olmoe":
            p["head_dim"] = s["head_dim"] or s["width"] // s["num_heads"]
            p["sliding_window"] = s["window"] or None
        if self.kind == "mixtral":
            return p
        p["norm_topk_prob"] = bool(topk and settings["router.topk.renormalise"])
        if self.kind == "qwen3_moe":
            p["use_sliding_window"] = bool(s["window"])
            p["decoder_sparse_step"] = 1
            p["mlp_only_layers"] = sorted(set(range(depth)) - layers)
        return p

    def arithmetic(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what of a run's flat config changes a logit, in one form for equal models."""
        return _arithmetic(settings)

    def _layers(self, p: Mapping[str, Any], depth: int) -> set[int]:
        if self.kind != "qwen3_moe":
            return set(range(depth))
        step = count(p, "decoder_sparse_step")
        return {n for n in range(depth) if (n + 1) % step == 0} - set(p["mlp_only_layers"])


_MODEL = ("width", "depth", "mlp_dim", "num_heads", "kv_heads", "head_dim", "window", "rope_base")
_MODEL += ("norm_eps", "tied")
_NULLS = ("num_key_value_heads", "sliding_window")  # null there is not the default
_EXPERTS = ("num_local_experts", "num_experts")
# What no config.json of these families can ask for.
_NOT_THERE = {
    "model.softcap": 0.0,
    "model.attention_softcap": 0.0,
    "model.global_every": 0,
    "moe.shared_experts": 0,
    "depth.layers": "none",
    "moe.dense": False,
}
_DEFAULTS = {
    "hidden_act": "silu",
    "num_key_value_heads": 0,
    "head_dim": 0,
    "sliding_window": 0,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "clip_qkv": None,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": 1.0,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
    "decoder_sparse_step": 1,
    "mlp_only_layers": (),
}


def _arithmetic(settings: Mapping[str, Any]) -> dict[str, Any]:
    names = ("width", "depth", "num_heads", "qk_norm", "window", "rope_base", "norm_eps", "tied")
    names += ("softcap", "attention_softcap")
    found = {f"model.{name}": settings[f"model.{name}"] for name in names}
    heads = settings["model.num_heads"]
    found["model.kv_heads"] = settings["model.kv_heads"] or heads
    found["model.head_dim"] = settings["model.head_dim"] or settings["model.width"] // heads
    if settings["model.window"]:
        found["model.global_every"] = settings["model.global_every"]
    layers = moe_layers(settings["moe.layers"], settings["model.depth"])
    found["moe.layers"] = _spec(set(layers), settings["model.depth"])
    found["moe.dense"] = settings["moe.dense"] and bool(layers)
    found["depth.layers"] = settings["depth.layers"] or "none"
    if layers:
        found["moe.expert_dim"] = settings["moe.expert_dim"] or settings["model.mlp_dim"]
        found["router.name"] = name = settings["router.name"]
        names = ["moe.num_experts", "moe.shared_experts", f"router.{name}.k"]
        names += ["router.topk.renormalise"] if name == "topk" else []
        found |= {key: settings[key] for key in names}
    if len(layers) < settings["model.depth"]:
        found["model.mlp_dim"] = settings["model.mlp_dim"]
    return found


def _refuse_others(p: Mapping[str, Any]) -> None:
    """Raises UsageError where a config.json asks for arithmetic that is not here."""
    if p["hidden_act"] not in ("silu", "swish"):
        refuse("hidden_act", p["hidden_act"], "silu")
    if p["attention_bias"]:
        refuse("attention_bias", True, "false")
    if p["clip_qkv"] is not None:
        refuse("clip_qkv", p["clip_qkv"], "null")
    if p["partial_rotary_factor"] != 1:
        refuse("partial_rotary_factor", p["partial_rotary_factor"], "1")
    for key in ("rope_scaling", "rope_parameters"):
        rope = p[key] or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            refuse(f"{key}.rope_type", kind, "default")


def _rope_base(p: Mapping[str, Any]) -> float:
    return float((p["rope_parameters"] or {}).get("rope_theta", p["rope_theta"]))


def _dtype(p: Mapping[str, Any]) -> str:
    return str(p.get("dtype", p.get("torch_dtype", "float32"))).removeprefix("torch.")


def _spec(layers: set[int], depth: int) -> str:
    """Returns `moe.layers` for these blocks."""
    if not layers:
        return "none"
    return "every-1" if len(layers) == depth else ",".join(map(str, sorted(layers)))


DECODERS = (
    Decoder(
        "mixtral",
        "MixtralForCausalLM",
        "none",
        "num_local_experts",
        "intermediate_size",
        {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_key_value_heads": 8},
        rules(mixtral=True),
    ),
    Decoder(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "head",
        "num_experts",
        "moe_intermediate_size",
        {"rms_norm_eps": 1e-6, "num_key_value_heads": 4, "sliding_window": 4096},
        rules(),
    ),
    Decoder(
        "olmoe",
        "OlmoeForCausalLM",
        "all",
        "num_experts",
        "intermediate_size",
        {"rms_norm_eps": 1e-5, "router_aux_loss_coef": 0.01},
        rules(),
    ),
)
