"""Arrays of different rank never meet silently: a broadcast that was not meant is an error."""

import jax
import jax.numpy as jnp
import pytest

import isotonic
import routers
from moe.nn.dispatch import DISPATCHES
from moe.train.run import set_up
from routers import ROUTERS
from tests.kinds import KINDS
from tests.moe.conftest import open_source

SETTINGS = {"data__augment__mixup": "0.4", "optimizer__ema_decay": "0.9", "model__dropout": "0.1"}
ROWS, KEY = jax.ShapeDtypeStruct((3, 2, 8), jnp.float32), jax.random.key(0)
LABELS = jnp.zeros((3, 2), int)


@pytest.fixture(autouse=True)
def raise_on_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


CASES = [(router, dispatch) for router in ROUTERS for dispatch in DISPATCHES]
QUICK = {(kind, "capacity") for kind in KINDS} | {("topk", dispatch) for dispatch in DISPATCHES}
CASES = [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(("router", "dispatch"), CASES)
def test_steps_of_training_and_evaluation(router, dispatch, tiny):
    config = tiny(router__name=router, moe__dispatch=dispatch, model__position="sincos", **SETTINGS)
    run = set_up(config, open_source(config, "train"))
    batch = run.abstract_batch()
    evaluated = {"image": batch["image"], "label": batch["label"]}
    evaluated["mask"] = jax.ShapeDtypeStruct(batch["label"].shape, jnp.float32)
    with jax.set_mesh(run.mesh):
        jax.eval_shape(run.train_step, run.abstract_state(), batch)
        jax.eval_shape(run.eval_step, run.variables, evaluated)


OPERATORS = {
    "mask": lambda x: routers.sparse_topk_mask(x, 2.5, p=4 / 3),
    "mask, merge": lambda x: routers.sparse_topk_mask(x, 2, p=4 / 3, solver="merge"),
    "mask, steep": lambda x: routers.sparse_topk_mask(x, 2, p=5.0),
    "mask, near 1": lambda x: routers.sparse_topk_mask(x, 2, p=1.05),
    "magnitude": lambda x: routers.sparse_topk_magnitude(x, 3),
    "lapsum": lambda x: routers.lapsum_topk_mask(x, 2),
    "sinkhorn": lambda x: routers.sinkhorn_topk_mask(x, 2),
    "sigmoid": lambda x: routers.sigmoid_topk_mask(x, 2),
    "sorted sinkhorn": lambda x: routers.sorted_sinkhorn_topk(x, 2),
    "sparsemax": routers.sparsemax,
    "entmax": lambda x: routers.entmax(x, alpha=1.5),
    "perturbed": lambda x: routers.perturbed_topk_mask(x, 2, key=KEY),
    "k-th": lambda x: routers.perturbed_kth_value(x, 2, key=KEY),
    "marginals": lambda x: routers.exactly_k_marginals(x, 3),
    "sample": lambda x: routers.exactly_k_sample(x, 3, KEY) * x,
    "top-k loss": lambda x: routers.sparse_topk_loss(x, LABELS, 3),
    "top-k hinge": lambda x: routers.topk_hinge_loss(x, LABELS, KEY, k=3),
    "projection": lambda x: routers.permutahedron_projection(x, jnp.arange(8.0)),
    "rank": routers.soft_rank,
    "sort, pav": lambda x: routers.soft_sort(x, solver="pav", p=3.0),
    **{
        f"regression, {solver}": lambda x, solver=solver: isotonic.isotonic_regression(
            x, jnp.ones(8), solver=solver
        )
        for solver in ("merge", "pav", "dykstra")
    },
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_and_their_derivatives(name):
    jax.eval_shape(jax.grad(lambda x: (OPERATORS[name](x) ** 2).sum()), ROWS)
