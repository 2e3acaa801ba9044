"""`digits` prepares itself: once, whoever asks, and never by half."""

import os
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from moe.data.images import digits, open_split
from moe.errors import UsageError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def splits(data_dir):
    return {name: open_split("digits", name, data_dir) for name in ("train", "test")}


def _rows(source) -> list[bytes]:
    return [source[i]["image"].tobytes() + bytes([source[i]["label"]]) for i in range(len(source))]


def test_splits_hold_every_image_once(splits):
    data = load_digits()
    scaled = np.round(data.images / 16 * 255).astype(np.uint8)
    expected = [image.tobytes() + bytes([y]) for image, y in zip(scaled, data.target, strict=True)]
    assert sorted(_rows(splits["train"]) + _rows(splits["test"])) == sorted(expected)
    assert set(_rows(splits["train"])).isdisjoint(_rows(splits["test"]))


def test_examples_and_classes(splits):
    example = splits["train"][0]
    assert example["image"].shape == (8, 8, 1)
    assert example["image"].dtype == np.uint8
    assert type(example["label"]) is int
    assert splits["train"].num_classes == 10
    assert splits["train"].class_names == tuple("0123456789")
    assert max(splits["train"][i]["image"].max() for i in range(20)) == 255


def test_splits_are_stratified(splits):
    counts = {
        name: np.bincount([source[i]["label"] for i in range(len(source))], minlength=10)
        for name, source in splits.items()
    }
    everything = counts["train"] + counts["test"]
    assert everything.sum() == 1797
    np.testing.assert_array_equal(counts["test"], np.round(0.2 * everything))


def test_mask_is_stratified_and_seeded():
    labels = np.repeat([0, 1, 2], [10, 20, 5])
    mask = digits.stratified_mask(labels, 0.2, seed=1)
    np.testing.assert_array_equal(np.bincount(labels[mask]), [2, 4, 1])
    np.testing.assert_array_equal(mask, digits.stratified_mask(labels, 0.2, seed=1))
    assert (mask != digits.stratified_mask(labels, 0.2, seed=2)).any()


def test_two_processes_at_once(tmp_path, splits):
    code = (
        "from moe.data.images import open_split; import sys\n"
        "source = open_split('digits', 'test', sys.argv[1])\n"
        "print(len(source), 'tensorflow' in sys.modules)"
    )
    run = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(run, **pipes) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out == f"{len(splits['test'])} False\n"
        # One line at most: whoever came late enough found the set and had nothing to say.
        assert err.count("\n") <= 1
        assert "preparing the data set 'digits'" in err or not err
    assert os.listdir(tmp_path) == ["digits"]
    assert _rows(open_split("digits", "test", str(tmp_path))) == _rows(splits["test"])


def test_the_slower_process_keeps_what_is_there(tmp_path, monkeypatch):
    build = digits._build

    def build_slowly(staging):
        build(staging)
        monkeypatch.setattr(digits, "_build", build)
        digits.prepare(str(tmp_path))  # the faster process

    monkeypatch.setattr(digits, "_build", build_slowly)
    digits.prepare(str(tmp_path))
    assert os.listdir(tmp_path) == ["digits"]
    assert len(open_split("digits", "test", str(tmp_path))) == 359


def test_killed_half_way(tmp_path, monkeypatch, splits):
    def killed(made, final):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "_rename", killed)
    with pytest.raises(KeyboardInterrupt):
        digits.prepare(str(tmp_path))
    # A killed process has no time to clean up.
    (tmp_path / "incomplete.digits.xyz" / "digits" / "1.0.0").mkdir(parents=True)
    monkeypatch.undo()
    assert _rows(open_split("digits", "test", str(tmp_path))) == _rows(splits["test"])


def test_says_one_line_and_only_once(tmp_path, capfd):
    digits.prepare(str(tmp_path))
    out, err = capfd.readouterr()
    assert out == ""
    assert err == f"preparing the data set 'digits' in {tmp_path}/digits/1.0.0 (once, offline)\n"
    digits.prepare(str(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write the data set 'digits'.*data_dir=DIR"):
        open_split("digits", "train", str(tmp_path / "file"))


def test_folder_that_is_not_local():
    with pytest.raises(UsageError, match="expected a folder of a local disk"):
        open_split("digits", "train", "gs://bucket/data")
