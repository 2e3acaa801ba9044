"""Vision transformers of transformers and runs compute the same, in both directions."""

import numpy as np
import pytest
from flax import nnx

from moe.errors import UsageError
from moe.store.checkpoint import named
from tests.moe.conftest import quick_jit
from tests.moe.store.huggingface import models
from tests.moe.store.huggingface.models import FIXTURES, exchange


def test_logits(tmp_path):
    told = models.expected("vit")
    exchange("import", FIXTURES / "vit", tmp_path / "run")
    found = models.logits(tmp_path / "run", told["images"])
    assert np.abs(told["logits"]).max() > 1
    np.testing.assert_allclose(found, told["logits"], rtol=0, atol=1e-4)


def test_a_model_without_a_head(tmp_path, capsys):
    told = models.expected("vit_base")
    exchange("import", FIXTURES / "vit_base", tmp_path / "run")
    run, params = models.opened(tmp_path / "run")
    assert not np.any(params["head"]["kernel"]) and "head is zeros" in capsys.readouterr().out

    def features(params, images):
        model = nnx.merge(run.graphdef, params)
        model.head = lambda x: x
        return model(images).logits

    found = quick_jit(features)(params, told["images"])
    np.testing.assert_allclose(found, told["logits"], rtol=0, atol=1e-4)


def test_there_and_back_and_there(tmp_path):
    exchange("import", FIXTURES / "vit", tmp_path / "run")
    exchange("export", tmp_path / "run", tmp_path / "away")
    exchange("import", tmp_path / "away", tmp_path / "again")
    original, written = models.arrays(FIXTURES / "vit"), models.arrays(tmp_path / "away")
    assert original.keys() == written.keys()
    assert all(np.array_equal(original[key], written[key]) for key in original)
    ours, theirs = (named(models.opened(tmp_path / d)[1]) for d in ("run", "again"))
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours | theirs)


def test_another_image_size_interpolates_the_positions(tmp_path, capsys):
    exchange("import", FIXTURES / "vit", tmp_path / "run")
    exchange("import", FIXTURES / "vit", tmp_path / "large", "--image_size=16")
    assert "interpolated from images of 8 to 16 pixels" in capsys.readouterr().out
    before, after = (models.opened(tmp_path / d)[1]["position"] for d in ("run", "large"))
    assert before.shape == (1, 17, 16) and after.shape == (1, 65, 16)
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    grid, fine = np.asarray(before[0, 1:]).reshape(4, 4, 16), np.asarray(after[0, 1:])
    fine = fine.reshape(8, 8, 16)
    # In the middle a pixel of the coarse grid lies between four of the fine one.
    coarse = fine.reshape(4, 2, 4, 2, 16).mean((1, 3))
    assert np.abs(coarse - grid)[1:-1, 1:-1].max() < np.abs(grid).max() / 2
    assert models.logits(tmp_path / "large", np.ones((1, 16, 16, 1), np.float32)).shape == (1, 10)
    with pytest.raises(UsageError, match="--image_size=9 is no multiple of the patches of 2"):
        exchange("import", FIXTURES / "vit", tmp_path / "odd", "--image_size=9")
