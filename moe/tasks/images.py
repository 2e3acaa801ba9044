"""Learns to classify images: a vision transformer on prepared TFDS sets."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from moe.data.images import (
    Augment,
    ImageSource,
    eval_batches,
    open_split,
    parse_groups,
    train_batches,
    with_label_noise,
)
from moe.data.images.transforms import fit, to_float
from moe.errors import check_all, raise_all
from moe.models.build import feed_forward, moe_layers, skip_layers, skip_settings
from moe.models.vit import HEADS, POOLS, POSITIONS, SIZES, VisionTransformer
from moe.nn.blocks import Block
from moe.nn.skip import Skip
from moe.ranges import RATE, SIZE, Key, annotated
from moe.tasks import classification, topk
from moe.tasks.flops import Flops, count_passing, dense_width, sum_experts
from moe.tasks.pictures import draw_patches
from moe.tasks.task import Batch, Metric, Reports, Shape, Sums, Task
from moe.tasks.topk import TopK

SHOWN_IMAGES = 12  # in the routing picture
LOSS_NOISE = 0x10551055  # folded into a step's key: the model splits that into 0, 1, ...


class Images(Task):
    """Classifies images by softmax or sigmoid cross-entropy, or by a loss of the k best guesses."""

    unit = "image"
    best = Metric("accuracy", higher=True, form=".2%")
    shown = (Metric("loss", higher=False, form=".4f"), best)
    sizes = ("data.image_size", "data.channels", "data.num_classes")
    overrides = ("data.image_size",)
    pictures = ("patches.png",)
    ends = ("head.",)

    def keys(self):
        return {
            "loss": Key("softmax", classification.LOSSES),
            "topk": {f.name: annotated(f.default, f.type) for f in dataclasses.fields(TopK)},
            "data": {
                "name": Key("digits"),  # any TFDS image classification set in array_record form
                "image_size": Key(0, "0 or [1, 1e4]"),  # 0: that of the data set
                "channels": Key(0, "0 or [1, 1e3]"),  # 0: that of the data set
                "num_classes": Key(0, SIZE),  # the same
                # Of the training split, for `topk.largest_margin`; (): counted where that is set.
                "class_counts": Key((), "[0, 1e12]"),
                # Share of the training labels that are drawn anew, among classes that look alike.
                "label_noise": Key(0.0, "[0, 1]"),
                "label_groups": Key(""),  # such as "0,6;2,4"; "": any class
                "augment": {
                    f.name: annotated(f.default, f.type) for f in dataclasses.fields(Augment)
                },
            },
            "model": {
                "name": Key("vit", ("vit",)),
                "size": Key("S", tuple(SIZES)),  # the explicit sizes below win where not 0
                "width": Key(0, "0 or [1, 1e5]"),
                "depth": Key(0, "0 or [1, 1e3]"),
                "mlp_dim": Key(0, SIZE),
                "num_heads": Key(0, "0 or [1, 1e4]"),
                "patch_size": Key(16, "[1, 1e4]"),
                "pool": Key("cls", POOLS),
                "head": Key("linear", HEADS),
                "head_scale": Key(60.0, "[1e-3, 1e4]"),  # of the cosine head's scores
                "position": Key("learned", POSITIONS),
                "dropout": Key(0.0, RATE),
                "norm_eps": Key(1e-6, "[1e-12, 1]"),  # of LayerNorm
                "gelu": Key("tanh", ("tanh", "exact")),  # see `moe.nn.mlp.activate`
            },
            "optimizer": {"label_smoothing": Key(0.0, RATE)},
        }

    def check(self, config: ConfigDict) -> None:
        augment = config.data.augment
        groups = lambda: parse_groups(config.data.label_groups, config.data.num_classes)  # noqa: E731
        check_all(
            [lambda: Augment.from_mapping(augment), groups, lambda: raise_all(_misfits(config))]
        )

    def shape(self, config: ConfigDict) -> Shape:
        return model_sizes(config)

    def tokens(self, config: ConfigDict) -> int:
        return _patches(config) + (config.model.pool == "cls")

    def open(self, config: ConfigDict, split: str) -> ImageSource:
        return open_split(config.data.name, split, config.data.data_dir or None)

    def resolve(self, config: ConfigDict, source: ImageSource) -> ConfigDict:
        height, width, channels = source.image_shape
        sizes = {
            "image_size": min(height or 0, width or 0),
            "channels": channels,
            "num_classes": source.num_classes,
        }
        raise_all(_unlike(config, sizes))
        parse_groups(config.data.label_groups, source.num_classes)
        config = ConfigDict(config.to_dict())
        for key, value in sizes.items():
            config.data[key] = config.data[key] or value
        margins = config.loss == "topk_hinge" and config.topk.largest_margin
        if margins and not config.data.class_counts:
            config.data.class_counts = _as_trained(config, source).class_counts()
        return config.lock()

    def batch(self, config: ConfigDict, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        data = config.data
        shapes = {"image": ((size, data.image_size, data.image_size, data.channels), jnp.float32)}
        shapes["label"] = ((size,), jnp.int32)
        if data.augment.mixup > 0:
            shapes |= {"label_mixed": ((size,), jnp.int32), "mix": ((size,), jnp.float32)}
        return {key: jax.ShapeDtypeStruct(*shape) for key, shape in shapes.items()}

    def train_batches(
        self, config: ConfigDict, source: ImageSource, start_step: int, rows: Sequence[int]
    ) -> Iterator[Batch]:
        return train_batches(
            _as_trained(config, source),
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
            image_size=config.data.image_size,
            augment=config.data.augment,
            rows=rows,
        )

    def eval_batches(
        self, config: ConfigDict, source: ImageSource, rows: Sequence[int]
    ) -> Iterator[Batch]:
        size = config.data.image_size
        return eval_batches(source, batch_size=config.eval.batch_size, image_size=size, rows=rows)

    def build(self, config: ConfigDict, rngs: nnx.Rngs) -> VisionTransformer:
        model, data = config.model, config.data
        width, depth, mlp_dim, heads = model_sizes(config)
        layers = moe_layers(config.moe.layers, depth)
        dtype = jnp.dtype(model.dtype)
        dense = dense_width(config, mlp_dim)
        exact = model.gelu == "exact"
        mlp = feed_forward(config.moe, config.router, layers, width, mlp_dim, dense, dtype, exact)
        skipped = skip_layers(config.depth, depth, self.tokens(config))
        skip = functools.partial(Skip, width, **skip_settings(config.depth))

        def block(number: int, tokens: int, rngs: nnx.Rngs) -> Block:
            inner = mlp(number, tokens, rngs)
            rest = {"dropout": model.dropout, "norm_eps": model.norm_eps}
            rest["skip"] = functools.partial(skip, tokens) if number in skipped else None
            return Block(width, heads, inner, **rest, dtype=dtype, rngs=rngs)

        return VisionTransformer(
            image_size=data.image_size,
            channels=data.channels,
            num_classes=data.num_classes,
            patch_size=model.patch_size,
            width=width,
            block=block,
            kinds=[(i in layers, i in skipped) for i in range(depth)],
            scan=model.scan,
            remat=model.remat,
            pool=model.pool,
            position=model.position,
            head=model.head,
            head_scale=model.head_scale,
            dropout=model.dropout,
            norm_eps=model.norm_eps,
            dtype=dtype,
            rngs=rngs,
        )

    def sums(
        self, config: ConfigDict, model: VisionTransformer, batch, *, train: bool, key=None
    ) -> tuple[Sums, Reports]:
        if not train:
            mask = batch["mask"]
            out = model(batch["image"], mask=mask > 0)
            losses = _losses(config, out.logits, batch)
            k = config.topk.k
            return classification.sums(out.logits, batch["label"], losses, mask, k), out.reports
        out = model(batch["image"], train=True, key=key)
        noise = None if key is None else jax.random.fold_in(key, LOSS_NOISE)
        losses = _losses(config, out.logits, batch, config.optimizer.label_smoothing, noise)
        correct = (out.logits.argmax(-1) == classification.main_label(batch)).sum()
        sums = {"loss": losses.sum(), "weight": len(losses), "correct": correct}
        sums = {name: jnp.float32(value) for name, value in sums.items()}
        return sums, out.reports

    def scalars(self, totals: Sums) -> dict[str, float]:
        return classification.scalars(totals)

    def metrics(self, config: ConfigDict) -> tuple[Metric, ...]:
        return (*self.shown, *classification.metrics(config.topk.k))

    def flops(self, config: ConfigDict) -> Flops:
        """Counts one image's, with T tokens, width D and MLP width F.

        Per block: attention 8 T D^2 + 4 T^2 D, MLP 4 T D F; experts as `count_experts`. Of a block
        that tokens skip these are for the slots of a row, and its router is 2 T D.
        """
        dim, depth, hidden, _ = model_sizes(config)
        patches, tokens = _patches(config), self.tokens(config)
        layers, passing = moe_layers(config.moe.layers, depth), count_passing(config, depth, tokens)
        router, experts, slots = sum_experts(config, layers, passing, dim, hidden)
        skipped = skip_layers(config.depth, depth, tokens)
        return Flops(
            embed=2 * patches * config.model.patch_size**2 * config.data.channels * dim,
            attention=sum(8 * n * dim**2 + 4 * n**2 * dim for n in passing),
            mlp=sum(4 * n * dim * hidden for i, n in enumerate(passing) if i not in layers),
            router=router + 2 * tokens * dim * len(skipped),
            experts=experts,
            slots=slots,
            head=2 * dim * config.data.num_classes,
        )

    def draw(
        self, config: ConfigDict, graphdef, params, source: ImageSource, files: list[pathlib.Path]
    ) -> None:
        """Draws the first image of each class with its patches' experts."""
        labels = np.array([source[i]["label"] for i in range(min(len(source), 1000))])
        first = [int(np.flatnonzero(labels == c)[0]) for c in np.unique(labels)][:SHOWN_IMAGES]
        images = np.stack(
            [to_float(fit(source[i]["image"], config.data.image_size)) for i in first]
        )
        forward = jax.jit(lambda params, images: nnx.merge(graphdef, params)(images))
        # A group is whole examples: the picture's are repeated to fill it.
        repeat = config.moe.group_size
        out = forward(params, np.repeat(images, repeat, axis=0))
        weights = {i: np.asarray(r.weights_BTE[::repeat]) for i, r in out.reports.items()}
        predicted = np.asarray(out.logits[::repeat].argmax(-1))
        names = source.class_names
        titles = [
            names[p] if p == labels[i] else f"{names[p]} (is {names[labels[i]]})"
            for i, p in zip(first, predicted, strict=True)
        ]
        (file,) = files
        draw_patches(file, images, titles, weights, config.model.pool == "cls")


def _as_trained(config: ConfigDict, source: ImageSource) -> ImageSource:
    data = config.data
    return with_label_noise(source, data.label_noise, data.label_groups, config.seed)


def _losses(config: ConfigDict, logits, batch, smoothing: float = 0.0, key=None) -> jax.Array:
    """Returns each example's loss, [B]; `key` is that of a loss with noise."""
    if config.loss not in topk.LOSSES:
        return classification.losses(config.loss, logits, batch, smoothing)
    settings, counts = TopK(**config.topk), config.data.class_counts
    scale = config.model.head_scale if config.model.head == "cosine" else 1.0

    def of_label(label):
        return settings.losses(config.loss, logits, label, counts, key, scale)

    return classification.losses_of_labels(of_label, batch)


def model_sizes(config: ConfigDict) -> Shape:
    """Returns the sizes of the transformer: explicit, or else of the named size."""
    model = config.model
    explicit = (model.width, model.depth, model.mlp_dim, model.num_heads)
    pairs = zip(explicit, SIZES[model.size], strict=True)
    return Shape(*(own or named for own, named in pairs))


def _misfits(config: ConfigDict) -> Iterator[str]:
    """Yields what does not fit in the settings of the model and the augmentation."""
    model, size = config.model, config.data.image_size
    width, _, _, heads = model_sizes(config)
    if width % heads:
        yield f"config.model.num_heads={heads} does not divide the width {width}"
    if model.position == "sincos" and width % 4:
        yield f"config.model.position='sincos' needs a width of 4 N, not {width}"
    counts, smoothing = config.data.class_counts, config.optimizer.label_smoothing
    yield from TopK(**config.topk).misfits(config.loss, config.data.num_classes, counts, smoothing)
    if not size:
        return  # the data set will say it
    if size % model.patch_size:
        patch = model.patch_size
        yield f"config.model.patch_size={patch} does not divide the image size {size}"
    for key in ("crop", "cutout"):
        pixels = config.data.augment[key]
        if pixels > size:
            yield f"config.data.augment.{key}={pixels} is above the image size {size}"


def _unlike(config: ConfigDict, sizes: dict[str, int]) -> Iterator[str]:
    """Yields what the config says of the data set that is not so; an image size of 0: many."""
    name = config.data.name
    if not sizes["image_size"] and not config.data.image_size:
        yield (
            f"the images of data set {name!r} differ in size: pass the side in pixels of the "
            "square that they are to be brought to, as --config.data.image_size=SIDE"
        )
    for key in ("channels", "num_classes"):
        if config.data[key] not in (0, sizes[key]):
            yield f"config.data.{key}={config.data[key]}, but data set {name!r} has {sizes[key]}"


def _patches(config: ConfigDict) -> int:
    return (config.data.image_size // config.model.patch_size) ** 2
