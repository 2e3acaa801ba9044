"""Every bit of a seed counts, and no two uses of it draw the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe import seeds
from moe.errors import UsageError
from moe.tasks.images import Images
from moe.train.run import set_up
from moe.train.step import make_train_step
from tests.moe.conftest import open_source

SEEDS = (0, 1, 1 << 31, 1 << 32, (1 << 32) + 1, 1 << 62, (1 << 63) - 1)


def words(key) -> tuple:
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_no_two_roots_are_equal():
    keys = {words(seeds.key(seed, use)) for seed in SEEDS for use in seeds.USES}
    assert len(keys) == len(SEEDS) * len(seeds.USES)
    streams = {
        tuple(seeds.root(seed, use, *numbers).generate_state(4))
        for seed in SEEDS
        for use in seeds.USES
        for numbers in ((), (0,), (1,), (1 << 32,), (0, 0))
    }
    assert len(streams) == 5 * len(SEEDS) * len(seeds.USES)


def test_parameters_and_steps_share_no_key(tiny, monkeypatch):
    """The keys that a run hands to its model, and those that it hands to its steps."""

    class Caught(Exception):
        pass

    def catch(config, rngs):
        raise Caught([words(rngs.params()) for _ in range(16)])

    def gradient(params, batch, key, memory, step):
        return params, {"loss": jnp.zeros(()), "key": jax.random.key_data(key)}

    used = []
    for seed in ("0", str(1 << 32)):
        config = tiny(seed=seed)
        run = set_up(config, open_source(config, "train"), jax.devices()[:1])
        with monkeypatch.context() as patch:
            patch.setattr(Images, "build", lambda self, config, rngs: catch(config, rngs))
            patch.setattr(run.__class__, "jit", lambda self, f, **options: f)
            with pytest.raises(Caught) as caught:
                run.initial_state()
            step = make_train_step(gradient, optax.identity(), run.config.seed, None)
            state = {"params": {"w": jnp.zeros(1)}, "opt_state": optax.EmptyState()}
            steps = [step(state | {"step": jnp.int32(i)}, None)[1]["key"] for i in range(16)]
        used += [*caught.value.args[0], *(tuple(np.asarray(key).tolist()) for key in steps)]
    assert len(set(used)) == len(used) == 64


def test_a_training_step_with_its_root_key_is_one_program_for_all_seeds(tiny):
    texts, constant = [], []
    for seed in ("0", "1"):
        run = set_up(tiny(seed=seed), open_source(tiny(), "train"), jax.devices()[:1])
        arguments = run.abstract_state(), run.abstract_batch()
        root = jax.eval_shape(lambda: jax.random.key(0))
        step = jax.jit(
            lambda state, batch, root, run=run: run.train_step(state, batch, False, root)
        )
        texts.append(step.lower(*arguments, root).as_text())
        constant.append(jax.jit(run.train_step).lower(*arguments).as_text())
    assert texts[0] == texts[1]
    assert constant[0] != constant[1]


def test_seeds_that_differ_in_their_upper_half_give_other_parameters(tiny):
    config = tiny()
    source = open_source(config, "train")
    states = []
    for seed in ("0", str(1 << 32), "0"):
        run = set_up(tiny(seed=seed), source, jax.devices()[:1])
        states.append(jax.device_get(run.initial_state()["params"]["embed"]["kernel"]))
    assert (states[0] == states[2]).all()
    assert not (states[0] == states[1]).any()


@pytest.mark.parametrize("seed", [-1, 1 << 63, 1 << 64])
def test_seeds_out_of_range(seed):
    with pytest.raises(
        UsageError, match=rf"seed={seed}: expected a whole number from 0 to 2\^63-1"
    ):
        seeds.root(seed, "steps")


def test_a_seed_means_the_same_on_every_machine():
    """The first words of each root, as they were when this was written."""
    first = [int(seeds.root(3, use).generate_state(1)[0]) for use in seeds.USES]
    then = [819382448, 1645421708, 3451799802, 118549108, 2942680743, 523213049, 2426322228]
    assert first == then
