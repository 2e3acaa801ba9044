"""Runs of one seed differ in what is compared, and in nothing else: the pairs of a comparison."""

import jax
import numpy as np
import pytest
from flax import nnx

from moe import seeds
from moe.nn.draws import aside
from moe.tasks import task_of
from routers import ROUTERS
from routers.token_choice import TopK
from tests.moe.conftest import build_model, open_source


def parameters(config) -> dict[str, np.ndarray]:
    model = build_model(config, nnx.Rngs(seeds.key(config.seed, "parameters")))
    flat = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return {jax.tree_util.keystr(path): np.asarray(value) for path, value in flat}


class Greedy(TopK):
    """Draws more than other routers do."""

    def __init__(self, dim, num_experts, capacity, *, k: int = 2, rngs):
        rngs.params()
        super().__init__(dim, num_experts, capacity, k=k, rngs=rngs)
        self.second = nnx.Param(jax.random.normal(rngs.params(), (3,)))


class Frugal(TopK):
    """Draws nothing."""

    def __init__(self, dim, num_experts, capacity, *, k: int = 2, rngs):
        super().__init__(dim, num_experts, capacity, k=k, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("task", "other"), [("tiny", "greedy"), ("tiny", "frugal"), ("tiny_text", "greedy")]
)
def test_parameters_outside_the_router_are_equal(task, other, request, monkeypatch):
    monkeypatch.setitem(ROUTERS, "greedy", Greedy)
    monkeypatch.setitem(ROUTERS, "frugal", Frugal)
    make = request.getfixturevalue(task)
    sizes = {"data__image_size": "8", "data__channels": "1", "data__num_classes": "10"}
    sizes = sizes if task == "tiny" else {"data__vocabulary": "64"}
    a, b = (parameters(make(router__name=name, **sizes)) for name in ("topk", other))
    outside = [name for name in a if "'router'" not in name]
    assert outside == [name for name in b if "'router'" not in name] and len(outside) < len(a)
    assert all((a[name] == b[name]).all() for name in outside)


def test_a_dense_block_shares_all_but_its_mlp(tiny):
    sizes = {"data__image_size": "8", "data__channels": "1", "data__num_classes": "10"}
    a, b = (parameters(tiny(moe__dense=dense, **sizes)) for dense in ("false", "true"))
    common = a.keys() & b.keys()
    assert {name for name in common if "'1'" in name and "attention" in name}
    assert all((a[name] == b[name]).all() for name in common)
    assert all("feed_forward" in name for name in a.keys() ^ b.keys())


def test_batches_are_equal(tiny):
    found = []
    for name in ("topk", "soft_moe"):
        config = tiny(router__name=name)
        source = open_source(config, "train")
        config = task_of(config).resolve(config, source)
        found.append(next(task_of(config).train_batches(config, source, 3, range(16))))
    assert all((found[0][key] == found[1][key]).all() for key in found[0])


@pytest.mark.parametrize("drawn", [0, 1, 5])
def test_streams_aside(drawn):
    plain, rngs = nnx.Rngs(7), nnx.Rngs(7)
    expected = [plain.params() for _ in range(4)]
    own = aside(rngs, 2)
    keys = [jax.random.key_data(own.params()).tolist() for _ in range(drawn)]
    assert keys[:1] == [jax.random.key_data(expected[0]).tolist()][:drawn]
    assert len({*map(tuple, keys)}) == drawn
    assert rngs.params() == expected[2]
