"""Runs that are pruned: the step, records, evaluation, export, on meshes and in loops."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eval as eval_script
from moe.errors import UsageError
from moe.evaluate.evaluation import evaluate_run
from moe.evaluate.league import results
from moe.nn.pruning import Pruning
from moe.store.checkpoint import named
from moe.store.records import read
from moe.train.pruned import through
from moe.train.run import set_up
from moe.train.trainer import train
from tests.moe.conftest import QUICK, open_source
from tests.moe.store.huggingface import models
from tests.moe.train.test_mesh import SIZES, losses, meshed

DENSE = {"moe__layers": "none", "model__depth": "1", "optimizer__ema_decay": "0.5"}
PRUNED = DENSE | {"prune__keep": "0.1", "num_steps": "8", "eval__every": "4", "log__every": "4"}
ARMS = {
    "relaxed": {"prune__strength": "0.3", "prune__final_strength": "0"},
    "annealed": {},
    "hard": {"prune__strength": "0"},
    "straight": {"prune__strength": "0", "prune__straight_through": "true"},
    "one_shot": {"prune__one_shot": "true"},
}


@pytest.fixture(scope="module")
def pruned_run(data_dir, tmp_path_factory):
    from moe import cli, config
    from tests.moe.conftest import TINY

    settings = {key.replace("__", "."): value for key, value in PRUNED.items()}
    made = cli.apply(config.default(), TINY | {"data.data_dir": str(data_dir)} | settings)
    workdir = tmp_path_factory.mktemp("pruned") / "run"
    train(made, workdir)
    return made, workdir


def test_keeping_all_is_the_step_of_no_pruning(tiny):
    programs = []
    for settings in ({}, {"prune__strength": "0", "prune__straight_through": "true"}):
        run = set_up(tiny(**DENSE, **settings), open_source(tiny(), "train"))
        with jax.set_mesh(run.mesh):
            state, batch = run.abstract_state(), run.abstract_batch()
            programs.append(jax.jit(run.train_step).lower(state, batch).as_text())
        assert "nonzero_share" not in jax.eval_shape(run.train_step, state, batch)[1]
    assert programs[0] == programs[1]


def test_the_gradient_is_that_of_the_loss_at_the_pruned_parameters():
    """Pulled back once, of sums that any number of micro-batches made."""
    kernel, target = np.random.default_rng(0).normal(size=(2, 20, 30)).astype(np.float32)
    pruning = Pruning(keep=0.1, strength=0.3, final_strength=0.0)

    def effective(params, step):
        return pruning.effective(params, step / 10)

    def gradient(params, batch, key, memory):
        return {"wide": {"kernel": 2 * (params["wide"]["kernel"] - target)}}, {"loss": 1.0}

    def loss(kernel):
        pruned = effective({"wide": {"kernel": kernel}}, 3)["wide"]["kernel"]
        return ((pruned - target) ** 2).sum()

    params = {"wide": {"kernel": jnp.asarray(kernel)}}
    grads, sums = through(effective, gradient)(params, None, None, {}, 3)
    expected = jax.grad(loss)(params["wide"]["kernel"])
    np.testing.assert_allclose(grads["wide"]["kernel"], expected, rtol=1e-5, atol=1e-5)
    assert 0.1 < float(sums["nonzero_share"]) < 0.2 and sums["loss"] == 1


@pytest.mark.slow
def test_micro_batches_give_the_gradient_of_the_whole_batch(tiny):
    """And the gradient is that of the loss at the pruned parameters, by the dense ones."""
    found = []
    for parts in ("1", "4"):
        config = tiny(**PRUNED, batch_size="32", optimizer__accumulate=parts)
        source = open_source(config, "train")
        run = set_up(config, source, jax.devices()[:1])
        batch, params = next(run.train_batches(source, 0)), run.initial_state()["params"]
        params["head"]["kernel"] += jax.random.normal(jax.random.key(0), (16, 10))  # not zeros

        def compute(params, batch, run=run):
            return run.gradient(params, batch, jax.random.key(0), {}, 4)

        found.append(run.jit(compute, compiler_options=QUICK)(params, batch))
    (whole, sums), (parts, others) = found
    for name, value in named(whole).items():
        np.testing.assert_allclose(value, named(parts)[name], rtol=1e-4, atol=1e-6)
    for name in ("loss", "nonzero_share"):
        np.testing.assert_allclose(sums[name], others[name], rtol=1e-5)
    kernel = named(whole)["blocks.0.feed_forward.wide.kernel"]
    pruned = named(run.effective(params, 4))
    wide, narrow = (pruned[f"blocks.0.feed_forward.{name}.kernel"] for name in ("wide", "narrow"))
    assert 0.1 < float((wide != 0).mean()) < 0.5
    # A hidden unit whose output is cut off has a derivative where an entry moves the others alone.
    heard, moves = (narrow != 0).any(1), wide != named(params)["blocks.0.feed_forward.wide.kernel"]
    np.testing.assert_array_equal(kernel != 0, (wide != 0) & (heard | moves))


def test_records_and_evaluation_tell_both_networks(pruned_run, tmp_path):
    config, workdir = pruned_run
    rows = read(workdir / "metrics.jsonl")
    shares = [row["train/nonzero_share"] for row in rows if "train/nonzero_share" in row]
    assert 0.45 > shares[0] > shares[1] > 0.1  # of strengths from 3 down to 0.02
    middle, last = [row for row in rows if "eval/accuracy" in row]
    assert middle["eval/nonzero_share"] > last["eval/nonzero_share"] > 0.1
    assert last["eval/hardened/nonzero_share"] == pytest.approx(0.1, abs=0.002)
    copy = shutil.copytree(workdir, tmp_path / "run")
    for row, step in ((middle, 4), (last, None)):
        for harden, phase in ((False, "eval"), (True, "eval/hardened")):
            asked = {"split": None, "overrides": {}, "harden": harden}
            found = evaluate_run(copy, step=step, **asked)
            for name in ("accuracy", "loss", "nonzero_share", "calibration_error"):
                assert found[name] == row[f"{phase}/{name}"], (step, harden, name)
    assert {f.name for f in copy.glob("eval*.json")} == {
        f"eval{step}{hard}.json" for step in ("", "-test-4") for hard in ("", "-hardened")
    }
    found = results.find(config, workdir)
    assert found.value == last["eval/hardened/accuracy"] and found.trained == last["eval/accuracy"]
    assert found.loss == last["eval/hardened/loss"]
    assert found.kept < found.nonzero == last["eval/nonzero_share"]
    assert [value for _, value, _ in found.curve] == [
        row["eval/hardened/accuracy"] for row in (middle, last)
    ]


def told(file):
    """Returns the records without times."""
    return [{k: v for k, v in row.items() if "second" not in k} for row in read(file)]


def test_a_run_that_was_stopped_ends_the_same(pruned_run, tmp_path):
    config, workdir = pruned_run
    copy = shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "8")
    train(config, copy)
    assert told(copy / "metrics.jsonl") == told(workdir / "metrics.jsonl")


def test_hardened_weights_go_out(pruned_run, tmp_path):
    _, workdir = pruned_run
    pruning = Pruning(keep=0.1)
    dense, hard = (
        models.arrays(models.exchange("export", workdir, tmp_path / name, "--format=plain", *flags))
        for name, flags in (("dense", ()), ("hard", ("--harden",)))
    )
    for name, value in dense.items():
        if name.startswith("blocks.") and name.endswith("kernel"):
            kept = pruning.kept(value.size)
            assert (hard[name] != 0).sum() == kept and (value != 0).all()
            np.testing.assert_array_equal(hard[name], np.where(hard[name] != 0, value, 0))
            assert np.abs(value[hard[name] == 0]).max() <= np.abs(value[hard[name] != 0]).min()
        else:
            np.testing.assert_array_equal(hard[name], value)


def test_what_cannot_be_pruned(finished_run, pruned_run, tiny, tmp_path):
    for keep in ("0", "1.5", "-0.1"):
        with pytest.raises(UsageError, match=rf"config.prune.keep={float(keep)}.*in \(0, 1\]"):
            set_up(tiny(prune__keep=keep))
    with pytest.raises(UsageError, match=r"one_shot=True prunes nothing while it trains"):
        set_up(tiny(prune__one_shot="true", prune__straight_through="true"))
    asked = {"step": None, "split": None}
    with pytest.raises(UsageError, match=r"--harden keeps config.prune.keep .* which is 1"):
        evaluate_run(finished_run, overrides={}, harden=True, **asked)
    with pytest.raises(UsageError, match=r"prune.keep is of an evaluation with --harden"):
        evaluate_run(finished_run, overrides={"prune.keep": "0.5"}, **asked)
    with pytest.raises(UsageError, match=r"--harden: .* holds a run that prunes nothing"):
        models.exchange("export", finished_run, tmp_path / "x", "--format=plain", "--harden")


@pytest.mark.slow
def test_any_run_can_be_pruned_in_one_shot(finished_run, tmp_path):
    copy = shutil.copytree(finished_run, tmp_path / "run")
    eval_script.main([f"--workdir={copy}", "--harden", "--config.prune.keep=0.5"])
    assert (copy / "eval-hardened-prune.keep=0.5.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_the_same_losses_on_a_mesh(arm, tiny):
    settings = SIZES | ARMS[arm] | {"prune__keep": "0.2", "num_steps": "12"}
    found, state, run = losses(tiny(**settings, **meshed(1, 2, 2, 2)), steps=12)
    alone, single, _ = losses(tiny(**settings), jax.devices()[:1], steps=12)
    assert found[-1] < found[0] - 0.1  # something is learned
    np.testing.assert_allclose(found, alone, rtol=0, atol=2e-5)
    hard = run.jit(run.hardened)(state["params"])
    other = run.pruning.hardened(jax.device_get(single["params"]))
    for name, value in named(hard).items():
        assert (value != 0).sum() == (named(other)[name] != 0).sum(), name


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["annealed", "straight"])
def test_a_text_has_the_same_losses_on_a_mesh(arm, tiny_text):
    settings = ARMS[arm] | {"prune__keep": "0.2", "optimizer__learning_rate": "0.01"}
    found, _, _ = losses(tiny_text(**settings, **meshed(2, 2, 1, 2)), steps=6)
    alone, _, _ = losses(tiny_text(**settings), jax.devices()[:1], steps=6)
    assert found[-1] < found[0] - 0.1
    np.testing.assert_allclose(found, alone, rtol=0, atol=2e-4 * alone[0])


@pytest.mark.slow
def test_compressed_gradients_of_a_pruned_run_go_on_to_the_bit(tiny, tmp_path):
    """Workers send of the gradient at the pruned parameters; what they keep is in the state."""
    both = {"optimizer__compress__keep": "0.3", "router__name": "sparse_expert_choice"}
    config = tiny(**PRUNED | both | meshed(4, 1, 1, 2))
    assert train(config, tmp_path / "whole")["eval/hardened/loss"] < 2.4
    copy = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(copy / "checkpoints" / "8")
    train(config, copy)
    whole, cut = (told(run / "metrics.jsonl") for run in (tmp_path / "whole", copy))
    assert whole == cut and any("train/nonzero_share" in row for row in whole)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["annealed", "hard"])
def test_scanned_or_not_is_the_same_step(arm, tiny_text):
    def after(**model):
        settings = ARMS[arm] | {"prune__keep": "0.3", "optimizer__warmup_steps": "0"}
        _, state, _ = losses(tiny_text(**settings, **model), jax.devices()[:1], steps=2)
        return named(state["params"])

    looped, single = after(model__scan="true", model__remat="full"), after()
    for name, value in single.items():
        parts = name.split(".")
        whole = looped[".".join([parts[0], "0", *parts[2:]]) if parts[0] == "blocks" else name]
        mine = whole[int(parts[1])] if parts[0] == "blocks" else whole
        np.testing.assert_allclose(mine, value, rtol=0, atol=2e-5, err_msg=name)
