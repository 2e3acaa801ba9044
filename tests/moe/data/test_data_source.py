"""Prepared TFDS sets are read as they were written, and every mistake has its message."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from moe.data import from_arrays, open_split, source
from moe.errors import UsageError

NUM_EXAMPLES = 10


def _png(image, palette=False) -> io.BytesIO:
    """Encodes with PIL: TFDS takes encoded bytes as they are, which needs no TensorFlow."""
    file = io.BytesIO()
    picture = Image.fromarray(image)
    (picture.quantize() if palette else picture).save(file, "PNG")
    file.seek(0)
    return file


def _image(i, height=6, width=5) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)


class _Base(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    PAIR = ("picture", "kind")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(self.features()),
            supervised_keys=self.PAIR,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        for i in range(NUM_EXAMPLES):
            yield i, self.example(i)


class FixedPngs(_Base, skip_registration=True):
    """Images of one size, a name for each class, and a feature that is none of our business."""

    def features(self):
        return {
            "picture": tfds.features.Image(shape=(6, 5, 3)),
            "kind": tfds.features.ClassLabel(names=["cat", "dog"]),
            "file_name": tfds.features.Text(),
        }

    def example(self, i):
        return {"picture": _png(_image(i)), "kind": i % 2, "file_name": f"{i}.png"}


class AnySizePngs(_Base, skip_registration=True):
    """Images of any size, some of them with a palette: they must come out as RGB."""

    PAIR = None

    def features(self):
        return {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=10)}

    def example(self, i):
        flat = np.full((4 + i, 7, 3), 20 * i, np.uint8)
        return {"image": _png(flat, palette=i % 2 == 1), "label": i}


class Floats(_Base, skip_registration=True):
    PAIR = None

    def features(self):
        return {
            "image": tfds.features.Tensor(shape=(2, 2, 1), dtype=np.float32),
            "label": tfds.features.Scalar(np.int64),
        }

    def example(self, i):
        return {"image": np.zeros((2, 2, 1), np.float32), "label": i}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    tfds.disable_progress_bar()
    for builder in (FixedPngs, AnySizePngs, Floats):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture(params=["in memory", "per record"])
def fixed(request, data_dir, monkeypatch):
    if request.param == "per record":
        monkeypatch.setattr(source, "MEMORY_LIMIT_BYTES", 0)
    opened = open_split("fixed_pngs", "train", data_dir)
    assert opened.in_memory == (request.param == "in memory")
    return opened


def test_images_and_labels(fixed):
    assert fixed.class_names == ("cat", "dog")
    assert len(fixed) == NUM_EXAMPLES
    # TFDS shuffles the examples when it writes them.
    labels = {_image(i).tobytes(): i % 2 for i in range(NUM_EXAMPLES)}
    for i in range(NUM_EXAMPLES):
        example = fixed[i]
        assert example["image"].shape == (6, 5, 3)
        assert labels.pop(example["image"].tobytes()) == example["label"]
    assert not labels


def test_index_out_of_range(fixed):
    for index in (-1, NUM_EXAMPLES):
        with pytest.raises(IndexError):
            fixed[index]


def test_images_of_any_size_and_mode(data_dir):
    opened = open_split("any_size_pngs:1.0.0", "test", data_dir)
    assert not opened.in_memory
    assert opened.num_classes == 10
    for i in range(NUM_EXAMPLES):
        image, label = opened[i]["image"], opened[i]["label"]
        np.testing.assert_array_equal(image, np.full((4 + label, 7, 3), 20 * label, np.uint8))


@pytest.mark.parametrize(
    "split, length", [("train[:90%]", 9), ("train[90%:]", 1), ("test[2:5]", 3)]
)
def test_slices(data_dir, split, length):
    assert len(open_split("fixed_pngs", split, data_dir)) == length


def test_default_folder(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    assert len(open_split("fixed_pngs", "train")) == NUM_EXAMPLES


def test_arrays_in_memory():
    images = np.zeros((3, 4, 4, 1), np.uint8)
    opened = from_arrays(images, [0, 1, 1], ["a", "b"])
    assert (len(opened), opened.num_classes, opened[2]["label"]) == (3, 2, 1)
    with pytest.raises(UsageError, match="expected uint8"):
        from_arrays(images.astype(np.float32), [0, 1, 1], ["a", "b"])
    with pytest.raises(UsageError, match=r"expected 0\.\.1"):
        from_arrays(images, [0, 1, 2], ["a", "b"])


def _message(*arguments) -> str:
    with pytest.raises(UsageError) as caught:
        open_split(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_set(data_dir):
    assert _message("cifar100", "train", data_dir) == (
        f"data set 'cifar100' is not prepared in {data_dir}: prepare it once with "
        "`pip install 'permoe[prepare]' && python -m moe.data.prepare cifar100 "
        f"--data_dir={data_dir}` (this step alone needs TensorFlow)"
    )
    assert "is not prepared" in _message("no such name!", "train", data_dir)


def test_missing_version_or_config(data_dir):
    assert "(found only fixed_pngs/1.0.0)" in _message("fixed_pngs:3.0.0", "train", data_dir)
    assert "(found only fixed_pngs/1.0.0)" in _message("fixed_pngs/big", "train", data_dir)


@pytest.mark.parametrize("split", ["validation", "train[:", "train[:11]", ""])
def test_unknown_split(data_dir, split):
    message = _message("fixed_pngs", split, data_dir)
    assert message.startswith(f"data set 'fixed_pngs' has no split '{split}': expected one of ")
    assert "train, test" in message


def test_not_images_with_classes(data_dir):
    message = _message("floats", "train", data_dir)
    assert "'floats' is not for image classification" in message
    assert "image: float32(2, 2, 1) Tensor" in message


def test_another_form(data_dir, tmp_path):
    """What an earlier `tfds build` leaves: the same files, but tfrecord."""
    made = tmp_path / "fixed_pngs" / "1.0.0"
    made.mkdir(parents=True)
    for name in ("dataset_info.json", "features.json", "kind.labels.txt"):
        with open(f"{data_dir}/fixed_pngs/1.0.0/{name}") as file:
            (made / name).write_text(file.read().replace("array_record", "tfrecord"))
    message = _message("fixed_pngs", "train", str(tmp_path))
    assert message.startswith(f"data set 'fixed_pngs' lies in {tmp_path} as tfrecord")
    assert f"moe.data.prepare fixed_pngs --data_dir={tmp_path}_array_record`" in message
