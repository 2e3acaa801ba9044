"""A record that cannot be read ends a run in one line, with its last good step saved."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from moe.data.images import source
from moe.data.stream import epoch_order
from moe.errors import UsageError
from moe.store.checkpoint import Checkpoints
from moe.train.trainer import train

N, BATCH = 64, 16
BAD = epoch_order(N, seed=0)(2 * BATCH)  # seed 0 shows it at step 3 first


class HalfCut(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Grey images, of which one in `train` and one in `test` is cut to half."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1)),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        whole = {"train": self._generate_examples(None), "test": self._generate_examples(None)}
        return whole | {
            "cut_train": self._generate_examples(BAD),
            "cut_test": self._generate_examples(BAD),
        }

    def _generate_examples(self, bad):
        for i in range(N):
            file = io.BytesIO()
            grey = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(grey).save(file, "PNG")
            if i == bad:
                file.truncate(len(file.getvalue()) // 2)
            file.seek(0)
            yield i, {"image": file, "label": i % 10}


@pytest.fixture(scope="module")
def half_cut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tfds.disable_progress_bar()
    HalfCut(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.mark.parametrize(
    ("split", "saved"), [("train", 2), pytest.param("eval", 4, marks=pytest.mark.slow)]
)
def test_the_last_good_step_is_saved(half_cut, tiny, tmp_path, monkeypatch, split, saved):
    """Also where the record is met by an evaluation; the cadence of checkpoints asks for none."""
    monkeypatch.setattr(source, "MEMORY_LIMIT_BYTES", 0)  # read as a large set is, by threads
    name = {"train": "cut_train", "eval": "cut_test"}[split]
    config = tiny(
        data__name="half_cut",
        data__data_dir=str(half_cut),
        **{f"data__{split}_split": name},
        model__depth="1",
        moe__layers="0",
        num_steps="8",
        checkpoint__every="100",
        eval__every="4",
    )
    with pytest.raises(UsageError) as caught:
        train(config, tmp_path / "run")
    message = str(caught.value)
    assert message.startswith(
        f"record {BAD} of split '{name}' of data set 'half_cut', in {half_cut}"
    )
    assert "cannot be read (image file is truncated" in message
    assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps() == [saved]
