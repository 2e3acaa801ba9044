"""Files of one's own become a set like any other, or one line says what is wrong with them."""

import gzip
import io
import json
import pathlib
import shutil
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from moe import config as configs
from moe.data import prepare
from moe.data.images import open_split
from moe.data.images import prepare as images
from moe.errors import UsageError
from moe.tasks import task_of

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist


def pixels(i, height=6, width=5, channels=3) -> np.ndarray:
    shape = (height, width, channels)[: 2 if channels == 1 else 3]
    return np.random.default_rng(i).integers(0, 256, shape, np.uint8)


def encoded(image: np.ndarray, kind="PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def put(file: pathlib.Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def idx(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def an_idx_folder(folder: pathlib.Path, **changes) -> None:
    """Writes five images for training and three for testing; the latter as .gz."""
    for stem, first, count in (("train", 0, 5), ("t10k", 10, 3)):
        made = np.stack([pixels(first + i, channels=1) for i in range(count)])
        files = {f"{stem}-images-idx3-ubyte": idx(made)}
        files[f"{stem}-labels-idx1-ubyte"] = idx(np.arange(count) % 3)
        for name, content in files.items():
            content = changes.get(name.split("-ubyte")[0].replace("-", "_"), content)
            if stem == "t10k":
                name, content = f"{name}.gz", gzip.compress(content)
            put(folder / name, content)


def a_tree(folder: pathlib.Path, sizes=((6, 5),)) -> None:
    for split, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(("2", "10")):
            for i in range(count):
                height, width = sizes[i % len(sizes)]
                number = 100 * (split == "test") + 10 * label + i
                put(folder / split / name / f"{i}.png", encoded(pixels(number, height, width)))
    put(folder / "train" / ".DS_Store", b"of a Mac")
    put(folder / "train" / "2" / "notes.txt", b"no image")


def rows(numbers) -> dict:
    cells = [{"bytes": encoded(pixels(i)), "path": f"{i}.png"} for i in numbers]
    return {"image": cells, "label": [i % 2 for i in numbers]}


def a_parquet(file: pathlib.Path, table: dict, names=("cat", "dog")) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    made = pa.table(table)
    if names:
        features = {"label": {"names": list(names), "_type": "ClassLabel"}}
        made = made.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    pq.write_table(made, file)


def run(*arguments, data_dir) -> None:
    assert prepare.main(["images", *arguments, "--name=mine", f"--data_dir={data_dir}"]) == 0


def contents(split: str, data_dir, name="mine") -> dict[bytes, int]:
    """Returns the label of each image: the order is TFDS's."""
    opened = open_split(name, split, str(data_dir))
    examples = [opened[i] for i in range(len(opened))]
    return {example["image"].tobytes(): example["label"] for example in examples}


def test_idx_files(tmp_path):
    an_idx_folder(tmp_path / "raw")
    run(f"--idx={tmp_path / 'raw'}", "--classes=cat,dog,fly", data_dir=tmp_path)
    opened = open_split("mine", "train", str(tmp_path))
    assert opened.class_names == ("cat", "dog", "fly") and opened.image_shape == (6, 5, 1)
    assert contents("train", tmp_path) == {pixels(i, channels=1).tobytes(): i % 3 for i in range(5)}
    test = {pixels(10 + i, channels=1).tobytes(): i % 3 for i in range(3)}
    assert contents("test", tmp_path) == test
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "raw"]


def test_a_folder_of_files_of_one_size(tmp_path):
    a_tree(tmp_path / "raw")
    run(f"--folder={tmp_path / 'raw'}", data_dir=tmp_path)
    opened = open_split("mine", "train", str(tmp_path))
    assert opened.in_memory and opened.class_names == ("2", "10")
    expected = {pixels(10 * label + i).tobytes(): label for label in (0, 1) for i in range(4)}
    assert contents("train", tmp_path) == expected


def test_a_folder_of_files_that_differ(tmp_path):
    """JPEG beside PNG, grey beside colours, two sizes: read as colours, and a size must be said."""
    a_tree(tmp_path / "raw", sizes=((6, 5), (9, 9)))
    put(tmp_path / "raw" / "train" / "2" / "grey.PNG", encoded(pixels(50, 7, 7, 1)))
    put(tmp_path / "raw" / "train" / "2" / "photo.jpeg", encoded(pixels(51, 8, 8), "JPEG"))
    run(f"--folder={tmp_path / 'raw'}", data_dir=tmp_path)
    opened = open_split("mine", "train", str(tmp_path))
    assert not opened.in_memory and opened.image_shape == (None, None, 3)
    grey = np.repeat(pixels(50, 7, 7, 1)[..., None], 3, 2)
    found = contents("train", tmp_path)
    assert len(found) == 10 and found[grey.tobytes()] == 0
    config = configs.default()
    config.data.name = "mine"
    with pytest.raises(UsageError, match=r"'mine' differ in size: .*--config.data.image_size=SIDE"):
        task_of(config).resolve(config, opened)
    config.data.image_size = 8
    filled = task_of(config).resolve(config, opened).data
    assert (filled.image_size, filled.channels, filled.num_classes) == (8, 3, 2)


def test_parquet_files_of_the_hub(tmp_path):
    a_parquet(tmp_path / "raw" / "train-00000-of-00002-ab12.parquet", rows(range(3)))
    a_parquet(tmp_path / "raw" / "train-00001-of-00002-cd34.parquet", rows(range(3, 7)))
    a_parquet(tmp_path / "raw" / "test" / "0000.parquet", rows(range(10, 13)))
    run(f"--parquet={tmp_path / 'raw' / '**' / '*.parquet'}", data_dir=tmp_path)
    assert open_split("mine", "train", str(tmp_path)).class_names == ("cat", "dog")
    assert contents("train", tmp_path) == {pixels(i).tobytes(): i % 2 for i in range(7)}
    assert contents("test", tmp_path) == {pixels(i).tobytes(): i % 2 for i in range(10, 13)}


def test_parquet_files_of_other_columns(tmp_path):
    table = {"a": [encoded(pixels(i)) for i in range(4)], "fine": [0, 1, 2, 0], "b": [7, 7, 7, 7]}
    a_parquet(tmp_path / "train.parquet", table, names=())
    files = f"--parquet={tmp_path / '*.parquet'}"
    assert prepare.main(["images", files, "--name=mine", f"--out={tmp_path}"]) == 2
    run(files, "--label_column=fine", data_dir=tmp_path)
    assert open_split("mine", "train", str(tmp_path)).class_names == ("0", "1", "2")


def broken(kind: str, raw: pathlib.Path) -> list[str]:
    """Makes files that something is wrong with; returns the arguments."""
    if kind in IDX:
        an_idx_folder(raw, **IDX[kind][0])
        return [f"--idx={raw}", *(["--classes=a,b"] if kind == "few names" else [])]
    if kind in PARQUET:
        table = {k: v for k, v in (rows(range(4)) | PARQUET[kind][0]).items() if v}
        a_parquet(raw / PARQUET[kind][1], table)
        return [f"--parquet={raw / '**' / '*.parquet'}"]
    a_tree(raw)
    FOLDER[kind][0](raw)
    return [f"--folder={raw}"]


FOLDER = {
    "no splits": (shutil.rmtree, "cannot read {raw}"),
    "no classes": (lambda raw: (raw / "val").mkdir(), "{raw}/val is empty, no folder for each cla"),
    "images in a split": (
        lambda raw: put(raw / "dogs" / "1.jpg", b""),
        "{raw}/dogs holds images itself, no folder for each class: expected DIR/SPLIT/CLASS/*.png",
    ),
    "empty class": (
        lambda raw: (raw / "test" / "3").mkdir(),
        "{raw}/test/3 holds no .png, .jpg, .jpeg",
    ),
    "class missing": (
        lambda raw: put(raw / "test" / "3" / "1.png", encoded(pixels(0))),
        "split 'train' of {raw} lacks the class '3'",
    ),
    "a file cut": (
        lambda raw: put(raw / "test" / "2" / "x.png", encoded(pixels(0))[:60]),
        "{raw}/test/2/x.png cannot be read as an image (",
    ),
    "no image file": (
        lambda raw: put(raw / "test" / "2" / "x.jpg", b"text"),
        "{raw}/test/2/x.jpg cannot be read as an image (cannot identify",
    ),
    "a gif": (
        lambda raw: put(raw / "test" / "2" / "x.png", encoded(pixels(0), "GIF")),
        "{raw}/test/2/x.png is GIF; expected PNG or JPEG",
    ),
}
IDX = {
    "counts": (
        {"t10k_labels_idx1": idx(np.arange(2))},
        "holds 3 images and t10k-labels",
    ),
    "out of range": (
        {"t10k_labels_idx1": idx(np.array([0, 1, 9]))},
        "record 2 of {raw}/t10k-labels-idx1-ubyte.gz has the label 9, not one of 0..2",
    ),
    "few names": ({}, "record 2 of {raw}/t10k-labels-idx1-ubyte.gz has the label 2, not one of 0."),
    "idx cut": (
        {"train_images_idx3": idx(np.zeros((5, 6, 5)))[:-1]},
        "says 5 x 6 x 5 bytes and 149",
    ),
    "another kind": ({"train_labels_idx1": b"\0\0\x0d\1"}, "is no IDX file of uint8 with 1 axes"),
    "sizes": ({"train_images_idx3": idx(np.zeros((5, 7, 5)))}, "expected one size"),
    "no images": ({"train_images_idx3": b""}, "is no IDX file of uint8 with 3 or 4 axes: it beg"),
}
PARQUET = {
    "no label": (
        {"label": [0, None, 0, 1]},
        "train.parquet",
        "row 1 of {raw}/train.parquet has no",
    ),
    "label range": ({"label": [0, 1, 2, 0]}, "train.parquet", "row 2 of {raw}/train.parquet has"),
    "no image": (
        {"image": [{"bytes": b"x"}] * 4},
        "train.parquet",
        "row 0 of {raw}/train.parquet",
    ),
    "no column": (
        {"image": None},
        "train.parquet",
        "label: int64: name that of the image",
    ),
    "no split": ({}, "0-0/00.parquet", "the name of {raw}/0-0/00.parquet says no split"),
}


@pytest.mark.parametrize("kind", [*FOLDER, *IDX, *PARQUET])
def test_what_is_wrong_is_one_line_and_leaves_nothing(kind, tmp_path, capsys):
    raw = tmp_path / "raw"
    table = next(table for table in (IDX, PARQUET, FOLDER) if kind in table)
    arguments = broken(kind, raw)
    data_dir = tmp_path / "data"
    code = prepare.main(["images", *arguments, "--name=mine", f"--data_dir={data_dir}"])
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert table[kind][-1].format(raw=raw) in error
    assert not list(data_dir.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--folder=x", "--name=Mine"], "--name=Mine: expected small letters"),
        (["--folder=x", "--name=digits"], "not that of an embedded set"),
        (["--name=a"], "one of the arguments --folder --idx --parquet is required"),
        (["--folder=x", "--idx=y", "--name=a"], "not allowed with argument"),
        (["--folder=x"], "the following arguments are required: --name"),
        (["--parquet={tmp}/*.parquet", "--name=a"], "fits no file"),
        (["--idx={tmp}", "--name=a"], "holds no IDX images: expected pairs such as"),
        (["--idx={tmp}", "--name=a", "--classes=x,x"], "expected different names"),
        (["--folder={tmp}", "--name=a", "--classes=x"], "leave it out"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, tmp_path, capsys):
    arguments = [text.format(tmp=tmp_path) for text in arguments]
    assert prepare.main(["images", *arguments, f"--data_dir={tmp_path / 'data'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def interrupt(_):
    raise KeyboardInterrupt


def test_a_killed_preparation_leaves_nothing_that_could_be_opened(tmp_path, monkeypatch):
    an_idx_folder(tmp_path / "raw")
    argv = [f"--idx={tmp_path / 'raw'}", "--name=mine", f"--data_dir={tmp_path / 'data'}"]
    with monkeypatch.context() as patch:
        patch.setattr(
            images, "_task", lambda *_: lambda _: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            images.main(argv)
    assert not list((tmp_path / "data").iterdir())
    put(tmp_path / "data" / "mine.incomplete" / "build" / "half", b"left by kill -9")
    with pytest.raises(UsageError, match="'mine' is not prepared in"):
        open_split("mine", "train", str(tmp_path / "data"))
    assert images.main(argv) == str(tmp_path / "data" / "mine" / "1.0.0")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine"]
    with pytest.raises(UsageError, match=r"data/mine exists: delete it"):
        images.main(argv)


def test_a_damaged_set_says_its_own_command(tmp_path):
    an_idx_folder(tmp_path / "raw")
    run(f"--idx={tmp_path / 'raw'}", data_dir=tmp_path)
    (tmp_path / "mine" / "1.0.0" / "features.json").write_text("")
    with pytest.raises(UsageError, match=r"again with `python -m moe.data.prepare images --idx="):
        open_split("mine", "train", str(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN.is_dir(), reason="apt-get install dataset-fashion-mnist")
def test_fashion_mnist_of_debian(tmp_path):
    name = ["--name=fashion_mnist", f"--data_dir={tmp_path}"]
    assert prepare.main(["images", f"--idx={DEBIAN}", *name]) == 0
    from moe.data.images.idx import read

    raw = read(DEBIAN / "t10k-images-idx3-ubyte.gz", (3,))
    labels = read(DEBIAN / "t10k-labels-idx1-ubyte.gz", (1,))
    expected = {image.tobytes(): int(label) for image, label in zip(raw, labels, strict=True)}
    assert contents("test", tmp_path, "fashion_mnist") == expected
    assert len(open_split("fashion_mnist", "train", str(tmp_path))) == 60_000
