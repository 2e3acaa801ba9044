"""Lists the tensors of Mixtral, Qwen3-MoE and OLMoE, by the parameters that they are read for."""

from moe.store.origins import SAME, Rule, linear

_LAYER = "model.layers.{n}"


def rules(mixtral: bool = False) -> tuple[Rule, ...]:
    """Returns the names of a decoder's tensors, experts single or fused."""
    block, feed = "blocks.{n}", "blocks.{n}.feed_forward"
    found = [
        Rule("embedding", "model.embed_tokens.weight", SAME),
        Rule("norm.scale", "model.norm.weight", SAME),
        Rule("untied", "lm_head.weight", linear()),
        Rule(f"{block}.norm_attention.scale", f"{_LAYER}.input_layernorm.weight", SAME),
        Rule(f"{block}.norm_feed_forward.scale", f"{_LAYER}.post_attention_layernorm.weight", SAME),
        Rule(f"{block}.attention.out.kernel", f"{_LAYER}.self_attn.o_proj.weight", linear(2)),
    ]
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
        name = f"{_LAYER}.self_attn.{theirs}"
        found.append(Rule(f"{block}.attention.{ours}.kernel", f"{name}_proj.weight", linear()))
        found.append(Rule(f"{block}.attention.{ours}_norm.scale", f"{name}_norm.weight", SAME))
    # w1, w2 and w3 are Mixtral's own names; `transformers` 5 has one set for all.
    single = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    fused = (("gate_up_proj", (0, 2)), ("gate_up_proj", (1, 2)), ("down_proj", (0, 1)))
    for place in ("block_sparse_moe", "mlp") if mixtral else ("mlp",):
        mlp = f"{_LAYER}.{place}"
        found.append(Rule(f"{feed}.router.kernel", f"{mlp}.gate.weight", linear()))
        for part, own, (name, share) in zip(("gate", "wide", "narrow"), single, fused, strict=True):
            kernel, experts = f"{feed}.experts.kernel_{part}", f"{mlp}.experts"
            found.append(Rule(kernel, f"{experts}.{{e}}.{own}.weight", linear()))
            found.append(Rule(kernel, f"{experts}.{name}", linear(), share))
    for ours, theirs in (("gate", "gate_proj"), ("wide", "up_proj"), ("narrow", "down_proj")):
        found.append(Rule(f"{feed}.{ours}.kernel", f"{_LAYER}.mlp.{theirs}.weight", linear()))
    return tuple(found)
