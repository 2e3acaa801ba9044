"""Prepared TFDS sets are read as they were written, and every mistake has its message."""

import io
import os
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from moe import config as configs
from moe.data.images import eval_batches, from_arrays, open_split, source, train_batches
from moe.errors import UsageError
from moe.tasks import TASKS

NUM_EXAMPLES = 10


def _png(image, palette=False) -> io.BytesIO:
    """Encodes with PIL: TFDS takes encoded bytes as they are, which needs no TensorFlow."""
    file = io.BytesIO()
    picture = Image.fromarray(image)
    (picture.quantize() if palette else picture).save(file, "PNG")
    file.seek(0)
    return file


_GREYS = np.array([[0, 255, 256], [4660, 9999, 11000]], np.uint16)


def _image(i, height=6, width=5) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)


class _Base(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    PAIR = ("picture", "kind")
    IN_ORDER = False

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(self.features()),
            supervised_keys=self.PAIR,
            disable_shuffling=self.IN_ORDER,
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


class Grey16(_Base, skip_registration=True):
    """Grey images of 16 bits, which are read as 8."""

    IN_ORDER = True

    def features(self):
        return {
            "picture": tfds.features.Image(shape=(2, 3, 1)),
            "kind": tfds.features.ClassLabel(num_classes=10),
        }

    def example(self, i):
        return {"picture": _png(_GREYS + np.uint16(6000 * i)), "kind": i}


class Flawed(_Base, skip_registration=True):
    """Record 3 has no label, which TFDS writes as -1, and record 6 of `test` half an image."""

    IN_ORDER = True

    def features(self):
        return {
            "picture": tfds.features.Image(shape=(6, 5, 3)),
            "kind": tfds.features.ClassLabel(num_classes=4),
        }

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._halved()}

    def example(self, i):
        return {"picture": _png(_image(i)), "kind": -1 if i == 3 else 1}

    def _halved(self):
        for i in range(NUM_EXAMPLES):
            picture = _png(_image(i))
            if i == 6:
                picture.truncate(len(picture.getvalue()) // 2)
            yield i, {"picture": picture, "kind": 1}


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
    for builder in (FixedPngs, AnySizePngs, Grey16, Flawed, Floats):
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


def test_16_bit_images_keep_their_greys(data_dir):
    opened = open_split("grey16", "train", data_dir)
    for i in range(NUM_EXAMPLES):
        image = opened[i]["image"]
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image[..., 0], (_GREYS + 6000 * i) >> 8)


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
        f"--data_dir={data_dir}` (this step alone needs TensorFlow), or from files of your own: "
        "`python -m moe.data.prepare images --help`"
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


@pytest.mark.parametrize("split", ["train[:0%]", "test[4:4]", "train[3:3]+test[5:5]"])
def test_empty_split(data_dir, split):
    message = _message("fixed_pngs", split, data_dir)
    assert message.startswith(f"split '{split}' of data set 'fixed_pngs' is empty: pass a longer")


def _flip(path):
    """Changes one byte among the first records."""
    data = bytearray(path.read_bytes())
    data[400] ^= 255
    path.write_bytes(data)


RECORDS, INFO, FEATURES = "*train.array_record*", "dataset_info.json", "features.json"
DAMAGES = {
    "records cut to half": (RECORDS, lambda path: os.truncate(path, path.stat().st_size // 2)),
    "records cut to nothing": (RECORDS, lambda path: os.truncate(path, 0)),
    "records gone": (RECORDS, os.remove),
    "a flipped byte": (RECORDS, _flip),
    "info empty": (INFO, lambda path: path.write_bytes(b"")),
    "info cut": (INFO, lambda path: os.truncate(path, path.stat().st_size // 2)),
    "info a list": (INFO, lambda path: path.write_text("[]")),
    "info of another kind": (INFO, lambda path: path.write_text('{"name": 3}')),
    "info not text": (INFO, lambda path: path.write_bytes(bytes(range(256)))),
    "info gone": (INFO, os.remove),
    "features empty": (FEATURES, lambda path: path.write_bytes(b"")),
    "features of another kind": (FEATURES, lambda path: path.write_text('{"name": 3}')),
    "features a folder": (FEATURES, lambda path: (os.remove(path), path.mkdir())),
    "features gone": (FEATURES, os.remove),
    "labels cut": ("kind.labels.txt", lambda path: path.write_text("cat\n")),
}


@pytest.fixture(params=DAMAGES)
def damaged(request, data_dir, tmp_path):
    """A copy of the set with one file damaged: the folder, and the file."""
    pattern, damage = DAMAGES[request.param]
    shutil.copytree(f"{data_dir}/fixed_pngs", tmp_path / "fixed_pngs")
    (path,) = tmp_path.glob(f"fixed_pngs/*/{pattern}")
    damage(path)
    return tmp_path, path


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_damaged_files_are_named(damaged, limit, monkeypatch):
    folder, path = damaged
    monkeypatch.setattr(source, "MEMORY_LIMIT_BYTES", limit)
    with pytest.raises(UsageError) as caught:
        opened = open_split("fixed_pngs", "train", str(folder))
        for i in range(len(opened)):  # a record of a large set is read when it is needed
            opened[i]
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    assert f": delete {path.parent} and prepare it again with `pip install" in message


def test_damaged_digits_prepare_themselves_again(tmp_path):
    open_split("digits", "test", str(tmp_path))
    (tmp_path / "digits" / "1.0.0" / INFO).write_text("")
    message = _message("digits", "test", str(tmp_path))
    assert message.endswith(f"delete {tmp_path}/digits/1.0.0, and the next start prepares it again")


def test_files_that_must_not_be_read(data_dir, tmp_path):
    shutil.copytree(f"{data_dir}/fixed_pngs", tmp_path / "fixed_pngs")
    tmp_path.chmod(0o700)
    if user := os.geteuid():
        (tmp_path / "fixed_pngs").chmod(0)
    else:
        os.seteuid(65534)  # nobody, since root may read everything
    try:
        message = _message("fixed_pngs", "train", str(tmp_path))
    finally:
        os.seteuid(user)
        (tmp_path / "fixed_pngs").chmod(0o700)
    assert message.startswith(f"cannot read {tmp_path}/fixed_pngs of data set 'fixed_pngs'")
    assert "Permission denied" in message and "--config.data.data_dir=DIR" in message


def _first_error(batches) -> str:
    with pytest.raises(UsageError) as caught:
        for _ in zip(batches, range(10), strict=False):
            pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


STREAM = {"batch_size": 4, "image_size": 6}
TRAINING = STREAM | {"seed": 0, "start_step": 0, "augment": {"mixup": 0.2}}


@pytest.mark.parametrize(
    "split, record, wrong",
    [
        ("train", 3, "has the label -1, not one of 0..3"),
        ("test", 6, "cannot be read (image file is truncated"),
    ],
)
def test_a_bad_record_is_named(data_dir, monkeypatch, split, record, wrong):
    """Of a set in memory when it is opened, of a large one when its batch is read."""
    start = f"record {record} of split '{split}' of data set 'flawed', in {data_dir}/flawed/1.0.0/"
    message = _message("flawed", split, data_dir)
    assert message.startswith(start) and wrong in message
    monkeypatch.setattr(source, "MEMORY_LIMIT_BYTES", 0)
    opened = open_split("flawed", split, data_dir)
    for batches in (train_batches(opened, **TRAINING), eval_batches(opened, **STREAM)):
        message = _first_error(batches)
        assert message.startswith(start) and wrong in message


def test_size_of_images_that_differ_must_be_given(data_dir):
    config = configs.default()
    config.data.name = "any_size_pngs"
    opened = open_split("any_size_pngs", "train", data_dir)
    with pytest.raises(UsageError, match=r"differ in size: .* --config.data.image_size=SIDE"):
        TASKS["images"].resolve(config, opened)
    assert opened.image_shape == (None, None, 3)
    config.data.image_size = 5
    assert TASKS["images"].resolve(config, opened).data.image_size == 5
