"""What a config.json says, and when two configs are the same run."""

import json
import pathlib
from typing import Annotated

import pytest
from flax import nnx

from moe import cli, config
from moe.errors import UsageError
from moe.train.trainer import train
from routers import ROUTERS, TopK
from tests.moe.conftest import TINY


def saved(**overrides) -> dict:
    return json.loads(config.to_json(cli.apply(config.default(), TINY | overrides)))


class Own(TopK):
    """A router as a user's config file would register one."""

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity: int,
        *,
        k: int = 1,
        slope: Annotated[float, "[0, 1]"] = 0.5,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_experts, capacity, k=k, rngs=rngs)


def test_a_saved_config_has_what_the_run_uses_and_a_version():
    content = saved(**{"router.name": "sparse_topk"})
    assert content["version"] == config.VERSION
    assert sorted(content["router"]) == ["name", "sparse_topk"]


def test_another_routers_defaults_are_not_part_of_a_run(monkeypatch):
    text = json.dumps(saved())
    monkeypatch.setitem(ROUTERS, "soft_moe", Own)  # other settings and other defaults
    monkeypatch.delitem(ROUTERS, "expert_choice")
    monkeypatch.setitem(ROUTERS, "own", Own)
    now = cli.apply(config.default(), TINY)
    assert config.differences(config.from_json(text), now) == []
    other = cli.apply(config.default(), TINY | {"router.topk.noise": "0.5"})
    assert config.differences(config.from_json(text), other) == ["router.topk.noise=1.0, now 0.5"]


def test_a_config_without_a_version_loads():
    """As older programs wrote it: every router's settings, and keys that have gone."""
    content = saved(**{"optimizer.warmup_steps": "0"})
    del content["version"], content["optimizer"]["warmup"]
    content["compile_cache"] = ""
    content["router"] |= {"gone": {"k": 2, "temper": 0.1}, "soft_moe": {"k": 2.0, "tau": 3}}
    loaded = config.from_json(json.dumps(content))
    now = cli.apply(config.default(), TINY | {"optimizer.warmup_steps": "0"})
    assert config.differences(loaded, now) == []
    assert loaded.data.augment.resized_crop == ()


def test_keys_that_came_later_have_their_defaults():
    content = saved()
    del content["moe"]["dropless_receive"], content["router"]["topk"]["z"], content["log"]
    loaded = config.from_json(json.dumps(content))
    assert (loaded.moe.dropless_receive, loaded.router.topk.z, loaded.log.every) == (2.0, 0.0, 50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"moe": {"experts": 4}},
            "it has config.moe.experts, which this program (version 1) lacks",
        ),
        ({"router": {"name": "topk", "topk": {"kk": 2}}}, "it has config.router.topk.kk"),
        ({"router": {"name": "own"}}, "its router 'own' is none of topk,"),
        ({"version": 99}, "it was written by a newer program: it has version 99"),
        ({"version": "x"}, "it has version 'x'"),
        ({"seed": "zero"}, "config.seed='zero': expected a whole number in [0, 2^63)"),
        ({"seed": -1}, "config.seed=-1: expected a whole number"),
        ({"seed": True}, "config.seed=True: expected a whole number"),
        ({"seed": {"a": 1}}, "it has config.seed.a"),
        ({"moe": 3}, "it has config.moe,"),
        ({"loss": ["softmax"]}, "config.loss=['softmax']: expected softmax, sigmoid"),
    ],
)
def test_what_a_saved_config_may_not_say(change, message):
    content = saved()
    if isinstance(change.get("moe"), dict):
        change = {"moe": content["moe"] | change["moe"]}
    with pytest.raises(UsageError) as error:
        config.from_json(json.dumps(content | change))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_own_router_is_read_once_it_is_registered(monkeypatch):
    monkeypatch.setitem(ROUTERS, "own", Own)
    settings = {"router.name": "own", "router.own.slope": "1"}
    text = json.dumps(saved(**settings))
    assert config.from_json(text).router.own.slope == 1.0
    with pytest.raises(UsageError, match=r"own\.slope=2\.0: expected a number in \[0, 1\]"):
        saved(**settings | {"router.own.slope": "2"})
    monkeypatch.delitem(ROUTERS, "own")
    with pytest.raises(UsageError, match="--config=FILE"):
        config.from_json(text)


def test_the_mistakes_of_an_own_router_keep_their_traceback(tiny, tmp_path, monkeypatch):
    """Too few values to unpack, as a shape that was misread gives; and nothing is written."""

    class Mistaken(Own):
        def __call__(self, x_GTD, *, mask=None, key=None):
            _, _, _, _ = x_GTD.shape
            return super().__call__(x_GTD, mask=mask, key=key)

    monkeypatch.setitem(ROUTERS, "own", Mistaken)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        train(tiny(router__name="own"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_keys_that_a_run_may_change():
    changes = {"checkpoint.keep": "9", "data.data_dir": "/tmp", "eval.every": "7"}
    changes |= {"eval.batch_size": "8", "log.every": "3", "mesh.fsdp": "2", "nonfinite": "skip"}
    one = cli.apply(config.default(), TINY)
    assert config.differences(one, cli.apply(config.default(), TINY | changes)) == []
    # Only whole names count: `evaluation` would not be in the section `eval`.
    assert not config.is_free("evaluation") and not config.is_free("data.name")
    for key, text in {
        "seed": "1",
        "data.name": "x",
        "optimizer.b1": "0.8",
        "loss": "sigmoid",
    }.items():
        (line,) = config.differences(one, cli.apply(config.default(), TINY | {key: text}))
        assert line.startswith(f"{key}=")


def test_a_warmup_is_the_same_however_its_length_was_said():
    steps = TINY | {"num_steps": "200", "optimizer.warmup_steps": "20"}
    share = steps | {"optimizer.warmup_steps": "-1", "optimizer.warmup": "0.1"}
    more = share | {"optimizer.warmup": "0.2"}
    a, b, c = (cli.apply(config.default(), settings) for settings in (steps, share, more))
    assert config.differences(a, b) == []
    assert config.differences(a, c) == ["optimizer.warmup_steps=20, now 40"]


def test_the_page_lists_the_keys_that_may_change():
    page = pathlib.Path("docs/config.md").read_text()
    section = page.split("## What a run may change")[1].split("\n## ")[0]
    listed = {row.split("`")[1] for row in section.splitlines() if row.startswith("| `")}
    assert listed == {
        f"{key}.*" if "." not in key and key != "nonfinite" else key for key in config.FREE_KEYS
    }
