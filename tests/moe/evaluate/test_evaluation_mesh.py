"""A checkpoint of any mesh evaluates on the devices at hand, and starts a run on others."""

import jax
import numpy as np
import pytest

from moe import cli
from moe import config as configs
from moe.errors import UsageError
from moe.evaluate import evaluation
from moe.hosts import mesh as meshes
from moe.hosts.mesh import AXES
from moe.store.checkpoint import Checkpoints
from moe.tasks.images import Images
from moe.train.origins import start_from_checkpoint
from moe.train.run import set_up
from tests.moe import launch
from tests.moe.test_configs import IMAGES, SHRUNK, source

SMALL = {key: value for key, value in SHRUNK.items() if not key.startswith(("mesh.", "eval."))}
POD = range(128)  # as many devices as the largest config's mesh is made for


def pod_config(file):
    """A shipped config with its own mesh in numbers, no -1; small in all else."""
    config = cli.load_config(str(file), SMALL | {"data.channels": "3", "data.num_classes": "7"})
    config.mesh.update(meshes.shrink(config.mesh, POD))
    return config


@pytest.fixture(autouse=True)
def data(monkeypatch):
    images = source(3)
    monkeypatch.setattr(Images, "open", lambda *_: images)


def use_devices(count, monkeypatch):
    devices = jax.devices()[:count]
    monkeypatch.setattr(jax, "devices", lambda: devices)


@pytest.mark.parametrize("count", [1, 6, 8])
@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.stem)
def test_a_pods_config_fits_the_devices_at_hand(file, count, monkeypatch):
    use_devices(count, monkeypatch)
    saved = pod_config(file)
    run = set_up(evaluation.override(saved, {}))
    assert run.mesh.size == count
    for axis in ("fsdp", "expert", "tensor"):
        assert saved.mesh[axis] % run.mesh.shape[axis] == 0
    share = -(-saved.eval.batch_size // np.prod([saved.mesh[axis] for axis in meshes.EXAMPLES]))
    assert run.config.eval.batch_size < (share + saved.moe.group_size) * count
    if saved.mesh.expert >= 8 == count:
        assert run.mesh.shape["expert"] == 8


def test_a_mesh_that_fits_is_kept_and_one_that_is_asked_for_is_taken(monkeypatch):
    saved = pod_config("configs/vmoe_15b.py")
    assert meshes.shrink(saved.mesh, POD) == saved.mesh.to_dict()
    asked = evaluation.override(saved, {"mesh.expert": "4"})
    assert asked.mesh.to_dict() == {"data": -1, "fsdp": 1, "expert": 4, "tensor": 1}
    with pytest.raises(UsageError, match=r"asks for a multiple of 16 devices .* there are 8"):
        set_up(evaluation.override(saved, {"mesh.fsdp": "16"}))


def write_run(config, workdir):
    """Makes a run's directory, whatever mesh its config asks for; returns the parameters in it."""
    copy = config.copy_and_resolve_references()
    with copy.unlocked():
        copy.mesh.update(dict.fromkeys(AXES, 1))
    run = set_up(copy, devices=jax.devices()[:1])
    state, checkpoints = run.initial_state(), Checkpoints(workdir / "checkpoints")
    checkpoints.save(0, state, {})
    checkpoints.close()
    (workdir / "config.json").write_text(configs.to_json(config))
    return state["params"]


@pytest.mark.slow
@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.stem)
def test_a_pods_checkpoint_evaluates_the_same_on_one_device_and_on_eight(
    file, tmp_path, monkeypatch
):
    write_run(pod_config(file), tmp_path)
    arguments = {"step": None, "split": None, "overrides": {}}
    eight = evaluation.evaluate_run(tmp_path, **arguments)
    use_devices(1, monkeypatch)
    alone = evaluation.evaluate_run(tmp_path, **arguments)
    assert alone["examples"] == eight["examples"] == 70
    assert alone["loss"] == pytest.approx(eight["loss"], rel=1e-2)  # bfloat16 in some


@pytest.mark.slow
def test_a_pods_checkpoint_evaluates_on_a_laptop(tmp_path, tiny):
    """In a process of its own, which has one device."""
    config = tiny(mesh__data="4", mesh__expert="2")
    config.data.update({"image_size": 8, "channels": 1, "num_classes": 10})
    write_run(config, tmp_path)
    (screen,) = launch.succeed(launch.Hosts(1, "eval.py", [f"--workdir={tmp_path}"]))
    assert f"{tmp_path}, step 0: digits test, 359 examples\n" in screen


@pytest.mark.slow
def test_a_run_starts_from_a_pods_checkpoint(tmp_path, monkeypatch):
    """init.workdir: the other run's mesh asks for 128 devices, and here is one."""
    use_devices(1, monkeypatch)
    config = pod_config("configs/vmoe_15b.py")
    written = write_run(config, tmp_path / "pod")
    config.mesh.update(configs.default().mesh)
    config.init.workdir = str(tmp_path / "pod")
    run = set_up(config)
    fresh = {"params": jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), run.params)}
    state, _ = start_from_checkpoint(run, fresh)
    jax.tree.map(np.testing.assert_array_equal, state["params"], written)
