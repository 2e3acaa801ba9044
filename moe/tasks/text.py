"""Learns to predict the next token of a text: a causal decoder on packed documents."""

import json
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from moe.data.text import Mixture, TextSource, eval_batches, open_text, train_batches
from moe.data.text.tokenizer import FILE, MARKS, fingerprint
from moe.errors import UsageError, raise_all
from moe.models.build import expert_settings, moe_layers, skip_layers, skip_settings
from moe.models.decoder import Decoder, build_decoder, window_of
from moe.nn.attention import BACKENDS
from moe.nn.cross_entropy import cross_entropy
from moe.nn.decoder_block import QK_NORMS
from moe.ranges import RATE, SIZE, Key
from moe.tasks.flops import Flops, attended, count_passing, dense_width, sum_experts
from moe.tasks.task import Batch, Metric, Reports, Shape, Sums, Task
from moe.tasks.text_page import write_page
from moe.tasks.text_pictures import draw_text, fullest, split_pieces
from routers import ROUTERS

LOSS = Metric("loss", higher=False, form=".4f")
SHOWN_ROWS, SHOWN_TOKENS = 4, 1024  # in the pictures; no more tokens in all, but of one row


class Text(Task):
    """Predicts the next token by softmax cross-entropy, in nats; judged in bits per byte of text.

    Bits per byte do not depend on the tokenizer: they are the loss of the targets that stand for
    text, over ln 2 and their UTF-8 bytes. Marks of a document's end count on neither side.
    """

    unit = "token"
    best = Metric("bits_per_byte", higher=False, form=".4f")
    shown = (LOSS, best, Metric("accuracy", higher=True, form=".2%"))
    causal = True
    sizes = ("data.vocabulary",)
    kept = ("data.vocabulary",)  # a model may have more tokens than its tokenizer
    ends = ("embedding", "untied")
    overrides = ("model.attention",)  # a back end that is not everywhere, of one result
    pictures = ("text.png", "text.html")

    def keys(self):
        return {
            "data": {
                # "stdlib", a folder of tokens or of .bin files, or several: "A:0.7,B:0.3"
                "name": Key("stdlib"),
                "seq_len": Key(256, "[1, 1e7]"),  # T, tokens of a row; documents are packed
                "vocabulary": Key(0, SIZE),  # V; 0: that of the data's tokenizer
                "tokenizer": Key(""),  # its fingerprint, filled in at the start
            },
            "model": {
                "name": Key("decoder", ("decoder",)),
                "width": Key(256, "[1, 1e5]"),
                "depth": Key(4, "[1, 1e3]"),
                "mlp_dim": Key(1024, "[1, 1e6]"),
                "num_heads": Key(4, "[1, 1e4]"),
                "kv_heads": Key(0, "0 or [1, 1e4]"),  # of keys and values; 0: num_heads
                "head_dim": Key(0, "0 or [2, 1e4]"),  # 0: width / num_heads
                "qk_norm": Key("head", QK_NORMS),
                "window": Key(0, "0 or [1, 1e7]"),  # tokens that a query sees; 0: all before it
                "global_every": Key(0, "0 or [1, 1e3]"),  # each so-many-th block sees all
                "rope_base": Key(10_000.0, "[1, 1e9]"),
                "norm_eps": Key(1e-6, "[1e-12, 1]"),  # of RMSNorm
                "tied": Key(True),  # whether the head is the embedding
                "softcap": Key(0.0, "0 or [1e-3, 1e6]"),  # of the head's logits
                "attention_softcap": Key(0.0, "0 or [1e-3, 1e6]"),
                "attention": Key("auto", BACKENDS),
                "dropout": Key(0.0, RATE),
                "z_loss": Key(0.0, "[0, 1e3]"),  # weight of the head's
                "chunk": Key(1024, "[1, 1e7]"),  # tokens of a device whose logits exist at a time
            },
            "moe": {
                "layers": Key("every-1"),
                "shared_experts": Key(0, "[0, 1e4]"),  # experts that every token passes
            },
        }

    def check(self, config: ConfigDict) -> None:
        raise_all(_misfits(config))

    def shape(self, config: ConfigDict) -> Shape:
        model = config.model
        return Shape(model.width, model.depth, model.mlp_dim, model.kv_heads or model.num_heads)

    def tokens(self, config: ConfigDict) -> int:
        return config.data.seq_len

    def units(self, config: ConfigDict) -> int:
        return config.data.seq_len

    def open(self, config: ConfigDict, split: str) -> TextSource | Mixture:
        return open_text(config.data.name, split, config.data.data_dir or None)

    def resolve(self, config: ConfigDict, source: TextSource | Mixture) -> ConfigDict:
        config = ConfigDict(config.to_dict())
        data, own = config.data, source.vocabulary
        tokenizer = fingerprint(source.tokenizer)
        if data.tokenizer not in ("", tokenizer):
            raise UsageError(
                f"the text {data.name!r} has another tokenizer ({tokenizer}) than the model was "
                f"made for ({data.tokenizer}): prepare it with the tokenizer.json of the model's "
                "own text"
            )
        if data.vocabulary and data.vocabulary < own:
            raise UsageError(
                f"config.data.vocabulary={data.vocabulary} is less than the {own} tokens of "
                f"{data.name!r}: say {own} or more, or 0 for as many"
            )
        data.vocabulary, data.tokenizer = data.vocabulary or own, tokenizer
        return config.lock()

    def files(self, source: TextSource | Mixture) -> dict[str, bytes]:
        if not source.tokenizer:
            return {}
        marks = {"begin": source.begin, "end": source.end}
        return {FILE: source.tokenizer, MARKS: json.dumps(marks).encode()}

    def batch(self, config: ConfigDict, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        shape = size, config.data.seq_len
        names = ("tokens", "targets", "bytes", "segments", "positions")
        whole = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
        return whole | {"weight": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def train_batches(
        self, config: ConfigDict, source, start_step: int, rows: Sequence[int]
    ) -> Iterator[Batch]:
        return train_batches(
            source,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
            seq_len=config.data.seq_len,
            rows=rows,
        )

    def eval_batches(self, config: ConfigDict, source, rows: Sequence[int]) -> Iterator[Batch]:
        size, length = config.eval.batch_size, config.data.seq_len
        return eval_batches(source, batch_size=size, seq_len=length, rows=rows)

    def build(self, config: ConfigDict, rngs: nnx.Rngs) -> Decoder:
        model, moe = config.model, config.moe
        names = ("kv_heads", "head_dim", "window", "global_every", "qk_norm", "attention_softcap")
        names += ("attention", "dropout", "scan", "remat", "rope_base", "tied", "softcap")
        names += ("norm_eps",)
        return build_decoder(
            vocab=config.data.vocabulary,
            width=model.width,
            depth=model.depth,
            heads=model.num_heads,
            mlp_dim=model.mlp_dim,
            tokens=config.data.seq_len,
            expert_layers=moe_layers(moe.layers, model.depth),
            skip_layers=skip_layers(config.depth, model.depth, config.data.seq_len),
            skip=skip_settings(config.depth),
            experts=None if moe.dense else expert_settings(moe, config.router),
            expert_dim=moe.expert_dim,
            dense_dim=dense_width(config, model.mlp_dim),
            shared_experts=moe.shared_experts,
            dtype=jnp.dtype(model.dtype),
            rngs=rngs,
            **{name: model[name] for name in names},
        )

    def sums(
        self, config: ConfigDict, model: Decoder, batch, *, train: bool, key=None
    ) -> tuple[Sums, Reports]:
        places = {name: batch[name] for name in ("segments", "positions")}
        out = model(batch["tokens"], **places, train=train, key=key)
        settings = {name: config.model[name] for name in ("chunk", "softcap", "z_loss")}
        loss = cross_entropy(out.hidden_BTD, model.head(), batch["targets"], **settings)
        weight_BT = batch["weight"]
        text_BT = weight_BT * (batch["bytes"] > 0)
        sums = {
            "loss": (loss.nats * weight_BT).sum(),
            "weight": weight_BT.sum(),
            "correct": (loss.correct * weight_BT).sum(),
            "nats_of_text": (loss.nats * text_BT).sum(),
            "bytes": batch["bytes"].sum().astype(jnp.float32),
        }
        if train and config.model.z_loss:
            sums["penalty"] = (loss.z * weight_BT).sum()
        if not train:
            sums["examples"] = (weight_BT.sum(1) > 0).sum().astype(jnp.float32)
        return sums, out.reports

    def scalars(self, totals: Sums) -> dict[str, float]:
        """Returns loss (nats a token), perplexity, accuracy, and bits per byte where bytes are
        known."""
        n = float(totals["weight"])
        loss = float(totals["loss"]) / n
        values = {"loss": loss, "perplexity": float(np.exp(min(loss, 80.0)))}
        values["accuracy"] = float(totals["correct"]) / n
        if totals["bytes"] > 0:
            bits = float(totals["nats_of_text"]) / np.log(2)
            values = {"bits_per_byte": float(bits / totals["bytes"])} | values
        if "penalty" in totals:
            values["z_loss"] = float(totals["penalty"]) / n
        return values

    def metrics(self, config: ConfigDict) -> tuple[Metric, ...]:
        return (*self.shown, Metric("perplexity", higher=False, form=".2f"))

    def flops(self, config: ConfigDict) -> Flops:
        """Counts one row's, with T tokens, width D, MLP width F, H heads of d and K of keys.

        Per block: projections 4 T D d (H + K), attention 4 H d for each pair of a query and a key
        that it sees were the row one document, SwiGLU 6 T D F; the head 2 T D V. Of a block that
        tokens skip these are for the slots of a row, and its router is 2 T D.
        """
        model, moe, tokens = config.model, config.moe, config.data.seq_len
        dim, depth, hidden, kv_heads = self.shape(config)
        layers, passing = moe_layers(moe.layers, depth), count_passing(config, depth, tokens)
        head_dim, heads = _head_dim(config), model.num_heads
        windows = [window_of(i, model.window, model.global_every) for i in range(depth)]
        pairs = sum(attended(n, window) for n, window in zip(passing, windows, strict=True))
        router, experts, slots = sum_experts(config, layers, passing, dim, hidden, products=3)
        shared = moe.shared_experts * (moe.expert_dim or hidden) * (not moe.dense)
        widths = [shared if i in layers else hidden for i in range(depth)]
        skipped = skip_layers(config.depth, depth, tokens)
        return Flops(
            embed=0,
            attention=4 * sum(passing) * dim * head_dim * (heads + kv_heads)
            + 4 * heads * head_dim * pairs,
            mlp=6 * dim * sum(n * width for n, width in zip(passing, widths, strict=True)),
            router=router + 2 * tokens * dim * len(skipped),
            experts=experts,
            slots=slots,
            head=2 * tokens * dim * config.data.vocabulary,
        )

    def draw(self, config: ConfigDict, graphdef, params, source, files: list[pathlib.Path]) -> None:
        """Shows the first rows of the split with the experts of each token, as picture and page."""
        length = min(config.data.seq_len, SHOWN_TOKENS)
        rows = min(SHOWN_ROWS, SHOWN_TOKENS // length)
        batch = next(eval_batches(source, batch_size=rows, seq_len=config.data.seq_len))
        names = ("tokens", "segments", "positions")
        shown = {name: batch[name][:, :length] for name in names}  # nothing later has a say

        def route(params, tokens, **places):
            reports = nnx.merge(graphdef, params)(tokens, **places).reports
            return {number: report.weights_BTE for number, report in reports.items()}

        weights = jax.device_get(jax.jit(route)(params, **shown))
        sizes = [int((row > 0).sum()) for row in shown["segments"]]
        rows = [(i, size) for i, size in enumerate(sizes) if size]  # others are padding
        texts = [split_pieces(source, shown["tokens"][i, :size].tolist()) for i, size in rows]
        told = [{n: w[i, :size].astype(float) for n, w in weights.items()} for i, size in rows]
        picture, page = files
        full = fullest(texts, len(weights))
        draw_text(picture, texts[full], told[full])
        write_page(page, f"{source.name} {source.split}: experts of tokens", texts, told)


def _misfits(config: ConfigDict) -> Iterator[str]:
    """Yields what does not fit in the settings of the model, or looks ahead."""
    model, moe, router = config.model, config.moe, config.router.name
    kv_heads = model.kv_heads or model.num_heads
    if model.num_heads % kv_heads:
        yield f"config.model.kv_heads={kv_heads} does not divide num_heads={model.num_heads}"
    if not model.head_dim and model.width % model.num_heads:
        yield (
            f"config.model.num_heads={model.num_heads} does not divide the width "
            f"{model.width}; or say --config.model.head_dim"
        )
    elif (head_dim := _head_dim(config)) % 2:
        yield f"config.model.head_dim={head_dim} must be even: RoPE turns pairs"
    if moe.group_size != 1:
        yield (
            f"config.moe.group_size={moe.group_size} must be 1 in a causal model: tokens of "
            "one row must not compete with those of another"
        )
    sparse = moe.layers not in ("none", "") and not moe.dense
    why = ROUTERS[router].why_not_causal(config.router[router].to_dict())
    if sparse and why:
        yield f"config.router.name={router!r} looks ahead in a text: {why}"


def _head_dim(config: ConfigDict) -> int:
    return config.model.head_dim or config.model.width // config.model.num_heads
