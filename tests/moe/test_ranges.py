"""Every number of a config has a range, and what is outside is refused before anything happens."""

import pathlib

import pytest

from moe import cli
from moe.config import default, flatten, keys
from moe.errors import UsageError
from moe.hosts.mesh import make_mesh
from moe.ranges import ANY, Key, contains, fit

NUMBERS = sorted(name for name, value in flatten(default()).items() if type(value) in (int, float))
MINUS_ONE = {"init.step", "optimizer.warmup_steps"}  # "the newest", "a share"
MINUS_ONE |= {f"mesh.{axis}" for axis in ("data", "fsdp", "expert", "tensor")}  # "all the rest"
# Where 0 is off, none, or "as the data or another key say".
ZERO = {"seed", "init.step"}
ZERO |= {f"data.{key}" for key in ("image_size", "channels", "num_classes")}
ZERO |= {f"data.augment.{key}" for key in ("crop", "cutout", "mixup")}
ZERO |= {f"model.{key}" for key in ("width", "depth", "mlp_dim", "num_heads", "dropout")}
ZERO |= {"moe.expert_dim", "moe.dropout", "optimizer.learning_rate", "optimizer.weight_decay"}
ZERO |= {
    f"optimizer.{key}"
    for key in ("b1", "b2", "momentum", "grad_clip", "label_smoothing", "ema_decay")
}
ZERO |= {"data.label_noise", "prune.strength", "prune.final_strength", "topk.largest_margin"}
ZERO |= {"optimizer.warmup", "optimizer.warmup_steps", "router.topk.noise"}
ZERO |= {f"depth.{key}" for key in ("alpha", "bound", "final_strength", "start")}
MINUS_ONE |= {"router.threshold.bias", "depth.start"}
OFF = ("importance", "load", "balance", "z", "simbal", "entropy", "sparsity")
OFF += ("null_experts", "final_strength", "rate", "decay", "cutoff", "bias")
ZERO |= {n for n in NUMBERS if n.startswith("router.") and n.rpartition(".")[2] in OFF}


def refusal(overrides: dict[str, str]) -> str:
    """Returns the error's text, "" where the overrides are taken."""
    try:
        cli.apply(default(), overrides)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", NUMBERS)
def test_what_makes_no_sense_is_refused(name):
    for text in ("nan", "inf", "-inf", "1e99", "-1e99", str(10**30), "9" * 400):
        assert f"config.{name}=" in refusal({name: text}), text
    others = {"mesh.data": "1"} if name.startswith("mesh.") else {}  # one -1 at most
    assert bool(refusal(others | {name: "-1"})) == (name not in MINUS_ONE)
    assert bool(refusal({name: "0"})) == (name not in ZERO)


def test_every_number_says_its_range():
    assert [name for name in NUMBERS if keys()[name].within == ANY] == []


@pytest.mark.parametrize(
    ("within", "inside", "outside"),
    [
        ("[0, 1)", (0, 0.5, 0.999), (-1e-9, 1, float("nan"), float("inf"))),
        ("(0, 1e4]", (1e-30, 1e4), (0, 10001)),
        ("-1 or [1, 2^3]", (-1, 1, 8), (0, -0.5, 9)),
        ("[0, 2^63)", (0, 2**63 - 1), (2**63, 10**400)),
    ],
)
def test_ranges_read_as_in_mathematics(within, inside, outside):
    assert all(contains(within, number) for number in inside)
    assert not any(contains(within, number) for number in outside)


def test_whole_numbers_stand_for_real_ones():
    config = cli.apply(default(), {"optimizer.weight_decay": "1"})
    assert config.optimizer.weight_decay == 1.0 and type(config.optimizer.weight_decay) is float
    value = fit("key", [1, 0.5], Key((), "(0, 1]"))
    assert value == (1, 0.5)
    assert type(fit("key", 3, Key(0.0, "[0, 9]"))) is float
    for wrong, key in ((True, Key(1, "[0, 9]")), ("3", Key(1, "[0, 9]")), (2.0, Key(1, "[0, 9]"))):
        with pytest.raises(UsageError, match="expected a whole number in"):
            fit("key", wrong, key)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"moe.layers": "1,1"}, "a list of different ones"),
        ({"moe.dense": "true", "router.topk.k": "9"}, "router.topk.k=9 is above moe.num_experts=8"),
        ({"model.num_heads": "5"}, "model.num_heads=5 does not divide the width 384"),
        ({"model.width": "6", "model.position": "sincos"}, "needs a width of 4 N, not 6"),
        ({"data.image_size": "24"}, "patch_size=16 does not divide the image size 24"),
        ({"data.image_size": "16", "data.augment.crop": "17"}, "crop=17 is above the image size"),
        ({"optimizer.accumulate": "3"}, "batch_size=128 must be a multiple of 3"),
        ({"moe.group_size": "512"}, "batch_size=128 must be a multiple of 512"),
        ({"moe.group_size": "128", "eval.batch_size": "64"}, "eval.batch_size=64 must be a"),
        ({"mesh.fsdp": "-1"}, "config.mesh has -1"),
        ({"optimizer.warmup_steps": "1000"}, "must be below num_steps=1000"),
        ({"data.augment.resized_crop": "(0.5, 2)"}, "expected numbers in (0, 1]"),
        ({"data.augment.resized_crop": "(0.5, 0.4)"}, "lo <= hi"),
    ],
)
def test_values_that_do_not_fit_each_other(overrides, message):
    overrides = {"model.num_heads": "2"} | overrides if "model.width" in overrides else overrides
    assert message in refusal(overrides)


@pytest.mark.parametrize("steps", [1, 2, 20, 100, 1200])
@pytest.mark.parametrize("file", ["digits", "fashion_mnist", "cifar100"])
def test_the_warmup_fits_a_run_of_any_length(file, steps):
    from moe.train.optimizer import warmup_steps

    config = cli.load_config(f"configs/{file}.py", {"num_steps": str(steps)})
    share = 1 / 12 if file == "digits" else 0.05
    assert warmup_steps(config.optimizer, steps) == min(round(share * steps), steps - 1)
    explicit = {"num_steps": str(steps), "optimizer.warmup_steps": str(steps - 1)}
    explicit = cli.load_config(f"configs/{file}.py", explicit)
    assert warmup_steps(explicit.optimizer, steps) == steps - 1


def test_the_documented_ways_of_a_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.local_path("~/runs/a") == tmp_path / "runs" / "a"
    assert cli.local_path(" runs/a b ") == pathlib.Path("runs/a b")
    config = cli.apply(default(), {"init.workdir": "~/dense", "data.data_dir": "~"})
    assert (config.init.workdir, config.data.data_dir) == (f"{tmp_path}/dense", str(tmp_path))
    bad = {"": "is empty", " ": "is empty", "gs://b/run": "is an address", "a\0b": "null byte"}
    bad |= {"a" * 300: "too long", "~no_such_user/x": "home directory", "\udcff": "utf-8"}
    for text, message in bad.items():
        with pytest.raises(UsageError, match=f"--out.*{message}"):
            cli.local_path(text, "--out")
    assert "config.init.workdir=gs://b is an address" in refusal({"init.workdir": "gs://b"})


def test_a_mesh_has_no_negative_sizes():
    with pytest.raises(UsageError, match="expected 1 or more each, and -1 at most once"):
        make_mesh({"data": -2, "fsdp": -2, "expert": 2, "tensor": 1})
    assert dict(make_mesh({"data": -1, "fsdp": 2, "expert": 2, "tensor": 1}).shape)["data"] == 2
