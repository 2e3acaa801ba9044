"""Every way to a top-k mask that takes part: this project's, then the peers'."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Candidate, compiled, torch_device, with_gradient


class Problem(NamedTuple):
    """Scores x and a direction c for the derivative, float32 `[rows, n]`."""

    x: np.ndarray
    c: np.ndarray
    k: int

    @property
    def size(self) -> int:
        return self.x.size


def hard_router(x, k):
    """Returns the k largest of the softmax and zeros elsewhere; a sparse mask replaces it."""
    value, index = jax.lax.top_k(jax.nn.softmax(x), k)
    rows = jnp.arange(x.shape[0])[:, None]
    return jnp.zeros_like(x).at[rows, index].set(value)


def _jax(load, *options, **settings):
    """`make` for a function load()(x, k, ...) of JAX; loaded late, since it may be missing."""

    def make(problem):
        function = load()
        step = with_gradient(lambda x: function(x, problem.k, *options, **settings))
        return compiled(step, problem.x, problem.c)

    return make


def _from(module: str, name: str):
    """Loads a function of this project that may not be there yet."""

    def load():
        found = getattr(__import__(module, fromlist=[name]), name, None)
        if found is None:
            raise ImportError(f"{module} has no {name}")
        return found

    return load


def _box_section():
    from jaxopt.projection import projection_box_section

    def mask(x, k):
        low, high = jnp.zeros_like(x[0]), jnp.ones_like(x[0])
        project = functools.partial(
            projection_box_section, hyperparams=(low, high, high, jnp.asarray(k, x.dtype))
        )
        return jax.vmap(project)(x)

    return mask


def _permutahedron():
    # Public top_k gives k rows of n soft indices; the mask itself is this private projection.
    from softjax.projections_permutahedron import _proj_permutahedron

    def mask(x, k, mode):
        w = jnp.broadcast_to(jnp.arange(x.shape[-1]) < k, x.shape).astype(x.dtype)
        return _proj_permutahedron(x, w, softness=1.0, mode=mode)

    return mask


def _ott():
    from ott.tools.soft_sort import topk_mask

    return lambda x, k: topk_mask(x, axis=-1, k=k)


def _paper():
    from benchmarks.paper import dykstra_mask

    return dykstra_mask


def _torch(function):
    """`make` for function(torch, x, k) of PyTorch tensors, differentiated by autograd."""

    def make(problem):
        import torch

        place = torch_device()
        x = torch.tensor(problem.x, device=place, requires_grad=True)
        c = torch.tensor(problem.c, device=place)

        def run():
            y = function(torch, x, problem.k)
            (gradient,) = torch.autograd.grad(y, x, c)
            if place == "cuda":
                torch.cuda.synchronize()
            return y.detach(), gradient

        return run

    return make


def _torch_hard(torch, x, k):
    value, index = torch.topk(torch.softmax(x, -1), k)
    return torch.zeros_like(x).scatter(-1, index, value)


def _entmax(name):
    def function(torch, x, k):
        import entmax

        return getattr(entmax, name)(x, dim=-1)

    return function


def _up_to(size):
    return lambda problem: problem.size <= size


def candidates() -> list[Candidate]:
    """All of them; the first is what the others are compared with."""
    mask = _from("routers.topk", "sparse_topk_mask")
    magnitude = _from("routers.topk", "sparse_topk_magnitude")
    soft = functools.partial(_from, "routers.soft_masks")
    names = ("lapsum_topk_mask", "sinkhorn_topk_mask", "sigmoid_topk_mask")
    lapsum, sinkhorn, sigmoid = (_jax(soft(name)) for name in names)
    return [
        Candidate("hard", _jax(lambda: hard_router), "hard"),
        Candidate("mask p=2", _jax(mask, p=2.0), "mask p=2"),
        Candidate("mask p=3/2", _jax(mask, p=1.5), "mask p=3/2"),
        Candidate("mask p=4/3", _jax(mask, p=4 / 3), "mask p=4/3"),
        Candidate(
            "mask p=2, strength 1/2", _jax(mask, p=2.0, strength=0.5), "mask p=2, strength 1/2"
        ),
        Candidate(
            "mask p=4/3, strength 1/2",
            _jax(mask, p=4 / 3, strength=0.5),
            "mask p=4/3, strength 1/2",
        ),
        Candidate("magnitude p=2", _jax(magnitude, p=2.0), "magnitude"),
        Candidate("lapsum", lapsum, "lapsum"),
        Candidate("sinkhorn", sinkhorn, "sinkhorn"),
        Candidate("sigmoid", sigmoid, "sigmoid"),
        Candidate("dykstra 500, p=2", _jax(_paper), "mask p=2"),
        *_peers(),
    ]


def _peers() -> list[Candidate]:
    softjax = functools.partial(_jax, _permutahedron)
    return [
        Candidate("jaxopt box section, p=2", _jax(_box_section), "mask p=2", "jaxopt"),
        Candidate("softjax, p=2", softjax(mode="c0"), "mask p=2", "softjax"),
        Candidate(
            "softjax, p=3/2", softjax(mode="c1"), "mask p=3/2", "softjax", covers=_up_to(2**15)
        ),
        Candidate("softjax, p=4/3", softjax(mode="c2"), "mask p=4/3", "softjax"),
        Candidate("ott topk_mask", _jax(_ott), "", "ott", covers=_up_to(2**17)),
        Candidate("torch.topk, hard", _torch(_torch_hard), "hard", "torch", "torch"),
    ]


def simplex_candidates() -> list[Candidate]:
    """Returns the candidates for sparsemax and 1.5-entmax, masks that add up to 1."""
    peers = [("sparsemax", "mask p=2"), ("sparsemax_bisect", "mask p=2")]
    peers += [("entmax15", "entmax 1.5"), ("entmax_bisect", "entmax 1.5")]
    return [
        Candidate("hard", _jax(lambda: hard_router), "hard"),
        Candidate("sparsemax", _jax(_alpha(2.0)), "mask p=2"),
        Candidate("entmax, alpha=3/2", _jax(_alpha(1.5)), "entmax 1.5"),
        Candidate("jaxopt projection_simplex", _jax(_simplex), "mask p=2", "jaxopt"),
        *(
            Candidate(f"entmax.{name}", _torch(_entmax(name)), exact, "entmax", "torch")
            for name, exact in peers
        ),
    ]


def _alpha(alpha):
    load = _from("routers.simplex", "entmax")
    return lambda: lambda x, k: load()(x, alpha=alpha)


def _simplex():
    from jaxopt.projection import projection_simplex

    return lambda x, k: jax.vmap(projection_simplex)(x)
