"""Image sources: parquet, image folders, saved data sets; in memory and streamed; and what is wrong with them."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autorank.errors import ConfigError, DataError, MissingExtraError
from autorank.tasks.images import ImageFeed
from autorank.tasks.memory import ImageArrays
from autorank.tasks.sources import open_data
from tests import sample_data

COUNT, TEST = 60, 20


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return sample_data.images(COUNT)


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return np.arange(COUNT) % 3


@pytest.fixture(scope="module")
def sources(tmp_path_factory, pixels, labels) -> dict[str, str]:
    root = tmp_path_factory.mktemp("sources")
    train, test = slice(0, COUNT - TEST), slice(COUNT - TEST, COUNT)
    sample_data.write_parquet_set(root / "parquet", pixels, labels, TEST)
    names = ("bee", "cat", "dog")
    sample_data.write_folder(root / "folder" / "train", pixels[train], labels[train], names)
    sample_data.write_folder(root / "folder" / "test", pixels[test], labels[test], names)
    sample_data.write_saved(
        root / "saved", {"train": (pixels[train], labels[train]), "test": (pixels[test], labels[test])}, 3
    )
    return {
        "parquet": f"parquet:{root / 'parquet'}",
        "imagefolder": f"imagefolder:{root / 'folder'}",
        "hf saved": f"hf:{root / 'saved'}",
        "hf local": f"hf:{root / 'parquet'}",
    }


KINDS = ["parquet", "imagefolder", "hf saved", "hf local"]
RAW = {"mean": 0, "std": 1}


def content(feed: ImageFeed) -> tuple[np.ndarray, np.ndarray]:
    batches = list(feed.batches(16))
    images = torch.cat([b.inputs[0] for b in batches])
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy(), torch.cat([b.targets for b in batches]).numpy()


def in_any_order(images: np.ndarray, targets: np.ndarray) -> list[bytes]:
    return sorted(image.tobytes() + bytes([target]) for image, target in zip(images, targets, strict=True))


@pytest.mark.parametrize("streaming", [False, True], ids=["memory", "stream"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_pixels_that_were_written(kind, streaming, sources, pixels, labels, tmp_path):
    args = {**RAW, "streaming": streaming, "workers": 2 if streaming else 0}
    splits = open_data(sources[kind], args, tmp_path).splits
    assert set(splits) == {"train", "test"}
    for split, part in (("train", slice(0, COUNT - TEST)), ("test", slice(COUNT - TEST, COUNT))):
        images, targets = content(splits[split])
        assert in_any_order(images, targets) == in_any_order(pixels[part], labels[part])
        if kind != "imagefolder":  # which is ordered by class
            assert np.array_equal(images, pixels[part])
        assert np.array_equal(splits[split].labels, targets)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_and_kept_give_the_same_training_batches(kind, sources, tmp_path):
    feeds = [
        open_data(sources[kind], {"augment": "flip+crop", "streaming": streaming}, tmp_path).splits["train"]
        for streaming in (False, True)
    ]
    for kept, streamed in zip(*(feed.train_batches(5, 12, 7) for feed in feeds), strict=True):
        assert torch.equal(kept.inputs[0], streamed.inputs[0])
        assert torch.equal(kept.targets, streamed.targets)


@pytest.mark.parametrize("streaming", [False, True], ids=["memory", "stream"])
@pytest.mark.parametrize("kind", KINDS)
def test_feeds_travel_without_their_images(kind, streaming, sources, tmp_path):
    feed = open_data(sources[kind], {"streaming": streaming}, tmp_path).splits["train"]
    data = pickle.dumps(feed)
    again = pickle.loads(data)
    assert len(data) < 5000
    assert torch.equal(next(iter(again.batches(9))).inputs[0], next(iter(feed.batches(9))).inputs[0])
    assert again.fingerprint() == feed.fingerprint()


def test_images_are_decoded_once(sources, tmp_path, monkeypatch):
    first = open_data(sources["parquet"], {}, tmp_path).splits["train"]
    stamp = os.stat(first.data.directory / "images.npy").st_mtime_ns
    monkeypatch.setattr("autorank.tasks.encoded.Decoding.write", lambda *a: pytest.fail("decoded again"))
    second = open_data(sources["parquet"], {}, tmp_path).splits["train"]
    assert isinstance(second.data, ImageArrays)
    assert isinstance(second.data.images, np.memmap)
    assert os.stat(second.data.directory / "images.npy").st_mtime_ns == stamp


def test_several_may_decode_at_once(sources, tmp_path):
    with ThreadPoolExecutor(6) as pool:
        feeds = list(pool.map(lambda _: open_data(sources["parquet"], RAW, tmp_path).splits["train"], range(12)))
    assert len({feed.data.directory for feed in feeds}) == 1
    first = content(feeds[0])[0]
    assert all(np.array_equal(content(feed)[0], first) for feed in feeds)
    assert len(list((tmp_path / "images").iterdir())) == 2  # train and test, nothing left over


def test_a_damaged_cache_is_made_again(sources, pixels, tmp_path):
    first = open_data(sources["parquet"], RAW, tmp_path).splits["train"]
    file = first.data.directory / "images.npy"
    file.write_bytes(file.read_bytes()[:-100])
    second = open_data(sources["parquet"], RAW, tmp_path).splits["train"]
    assert np.array_equal(content(second)[0], pixels[: COUNT - TEST])


def test_changed_files_are_another_set(tmp_path, pixels, labels):
    root = tmp_path / "p"
    sample_data.write_parquet_set(root, pixels, labels)
    before = open_data(f"parquet:{root}", RAW, tmp_path).splits["train"]
    sample_data.write_parquet_set(root, 255 - pixels, labels)
    after = open_data(f"parquet:{root}", RAW, tmp_path).splits["train"]
    assert np.array_equal(content(after)[0], 255 - content(before)[0])
    assert after.fingerprint() != before.fingerprint()


def test_a_cache_that_is_a_file(sources, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match=r"cannot be written.*AUTORANK_CACHE"):
        open_data(sources["parquet"], {}, tmp_path / "cache")


def test_sizes_that_differ_late_become_the_default_size(tmp_path):
    """The first images agree, so that the difference is only met while decoding."""
    many = [sample_data.encode(image) for image in sample_data.images(90)]
    odd = sample_data.encode(sample_data.images(1, (6, 9))[0])
    sample_data.write_parquet(tmp_path / "train.parquet", [*many, odd], [0, 1] * 45 + [0])
    for _ in range(2):
        feed = open_data(f"parquet:{tmp_path}", {}, tmp_path / "cache").splits["train"]
        assert feed.data.images.shape == (91, 3, 224, 224)
    assert len(list((tmp_path / "cache" / "images").glob("*/"))) == 1


def test_resize_covers_and_takes_the_centre(tmp_path):
    """A 4 × 8 image with a black left and a white right half: the centre square keeps both halves."""
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 4:] = 255
    sample_data.write_parquet(tmp_path / "train.parquet", [sample_data.encode(image)] * 2, [0, 1])
    feed = open_data(f"parquet:{tmp_path}", {**RAW, "image_size": 4}, tmp_path / "cache").splits["train"]
    assert np.array_equal(content(feed)[0][0], image[:, 2:6])
    wide = open_data(f"parquet:{tmp_path}", {**RAW, "image_size": [4, 8]}, tmp_path / "cache").splits["train"]
    assert np.array_equal(content(wide)[0][0], image)
    cropped = {**RAW, "image_size": [8, 8], "crop_pct": 0.5}
    feed = open_data(f"parquet:{tmp_path}", cropped, tmp_path / "cache").splits["train"]
    reference = Image.fromarray(image).resize((32, 16), Image.Resampling.BILINEAR).crop((12, 4, 20, 12))
    assert np.array_equal(content(feed)[0][0], np.asarray(reference))


@pytest.mark.parametrize(("channels", "shape"), [(None, 1), (3, 3), (1, 1)])
def test_channels(channels, shape, tmp_path):
    pixels, labels = sample_data.digits(30)
    sample_data.write_parquet_set(tmp_path / "p", pixels, labels)
    args = {} if channels is None else {"channels": channels}
    feed = open_data(f"parquet:{tmp_path / 'p'}", args, tmp_path).splits["train"]
    assert next(iter(feed.batches(4))).inputs[0].shape == (4, shape, 8, 8)


def test_sixteen_bit_greys_are_scaled(tmp_path):
    deep = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    (tmp_path / "f" / "a").mkdir(parents=True)
    (tmp_path / "f" / "b").mkdir()
    for place in ("a/1.png", "b/1.png"):
        Image.fromarray(deep).save(tmp_path / "f" / place)
    feed = open_data(f"imagefolder:{tmp_path / 'f'}", RAW, tmp_path).splits["train"]
    assert np.array_equal(content(feed)[0][0, ..., 0], (deep >> 8).astype(np.uint8))


@pytest.mark.parametrize("kind", ["parquet", "imagefolder"])
@pytest.mark.parametrize("streaming", [False, True], ids=["memory", "stream"])
def test_a_corrupt_image_is_named(kind, streaming, tmp_path, pixels, labels):
    args = {"streaming": streaming, "workers": 0}
    if kind == "parquet":
        data = [sample_data.encode(image, "JPEG") for image in pixels]
        data[70 % COUNT] = data[10][:200]
        sample_data.write_parquet(tmp_path / "train.parquet", data, labels.tolist())
        name, words = f"parquet:{tmp_path}", ["train.parquet, row 10", "not a readable image"]
    else:
        sample_data.write_folder(tmp_path / "f", pixels, labels, "abc")
        (tmp_path / "f" / "b" / "0010.png").write_bytes(sample_data.encode(pixels[10])[:150])
        name, words = f"imagefolder:{tmp_path / 'f'}", ["0010.png", "not a readable image"]
    with pytest.raises(DataError) as caught:
        list(open_data(name, args, tmp_path / "cache").splits["train"].batches(8))
    assert all(word in str(caught.value) for word in words), caught.value


def test_split_names_and_columns_by_data_args(tmp_path, pixels, labels):
    data = [sample_data.encode(image) for image in pixels]
    rows = {"coarse": (labels // 2).tolist(), "thumb": [b"x"] * COUNT}
    for name in ("part-a", "part-b", "part-c"):
        sample_data.write_parquet(tmp_path / f"{name}.parquet", data, labels.tolist(), "photo", "fine", False, rows)
    args = {
        "train": "part-a*",
        "validation": "part-b*",
        "test": "part-c.parquet",
        "image_column": "photo",
        "label_column": "coarse",
    }
    splits = open_data(f"parquet:{tmp_path}", args, tmp_path / "cache").splits
    assert set(splits) == {"train", "validation", "test"}
    assert np.array_equal(splits["test"].labels, labels // 2)


def test_a_split_can_be_left_out(sources, tmp_path):
    for kind in KINDS:
        assert set(open_data(sources[kind], {"test": None}, tmp_path).splits) == {"train"}


def test_text_labels_are_numbered_by_the_training_classes(tmp_path, pixels):
    data = [sample_data.encode(image) for image in pixels[:6]]
    sample_data.write_parquet(tmp_path / "train.parquet", data, ["owl", "ant", "bee"] * 2, hub=False)
    sample_data.write_parquet(tmp_path / "test.parquet", data, ["owl", "bee"] * 3, hub=False)
    splits = open_data(f"parquet:{tmp_path}", {}, tmp_path / "cache").splits
    assert splits["train"].labels.tolist() == [2, 0, 1] * 2
    assert splits["test"].labels.tolist() == [2, 1] * 3


def test_folder_with_val_and_without_splits(tmp_path, pixels, labels):
    for part in ("train", "val"):
        sample_data.write_folder(tmp_path / "a" / part, pixels, labels, "xyz")
    assert set(open_data(f"imagefolder:{tmp_path / 'a'}", {}, tmp_path).splits) == {"train", "validation"}
    args = {"test": "val"}
    assert set(open_data(f"imagefolder:{tmp_path / 'a'}", args, tmp_path).splits) == {"train", "test"}
    sample_data.write_folder(tmp_path / "b", pixels, labels, "xyz")
    assert set(open_data(f"imagefolder:{tmp_path / 'b'}", {}, tmp_path).splits) == {"train"}


def test_hf_without_the_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="extra 'hub': pip install datasets"):
        open_data("hf:cifar10", {}, None)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            {"image_sise": 8},
            ["does not know 'image_sise'", "did you mean 'image_size'?", "allowed: mean, std, augment"],
        ),
        ({"image_size": 0}, ["image_size must be a positive whole number", "not 0"]),
        ({"image_size": [8]}, ["image_size"]),
        ({"augment": "mixup"}, ["augment must be 'none' or 'flip' or 'flip+crop', not 'mixup'"]),
        ({"mean": [0.5, 0.5]}, ["mean", "3 for images of 3 channels"]),
        ({"std": [0.5, 0, 0.5]}, ["std must be a number per channel, above 0"]),
        ({"mean": "grey"}, ["mean"]),
        ({"channels": 4}, ["channels must be 1 or 3"]),
        ({"channels": True}, ["channels must be 1 or 3"]),
        ({"crop_pct": 1.5}, ["crop_pct"]),
        ({"streaming": "yes"}, ["streaming must be true, false or null"]),
        ({"workers": -1}, ["workers"]),
        ({"memory_gb": -1}, ["memory_gb"]),
        ({"test": "exam"}, ["test='exam'"]),
        ({"image_column": "picture"}, ["image_column='picture'", "img, label"]),
        ({"label_column": "target"}, ["label_column='target'", "img, label"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_options(args, words, sources, tmp_path):
    with pytest.raises(ConfigError) as caught:
        open_data(sources["parquet"], args, tmp_path)
    assert all(word in str(caught.value) for word in words), caught.value


def _no_label(root: Path) -> str:
    data = [sample_data.encode(image) for image in sample_data.images(2)]
    sample_data.write_parquet(root / "train.parquet", data, [0, None], hub=False)
    return f"parquet:{root}"


def _text(root: Path) -> str:
    (root / "train.parquet").write_text("not parquet at all")
    return f"parquet:{root}"


def _only_test(root: Path) -> str:
    for name in ("test-0", "test-1"):
        sample_data.write_parquet(root / f"{name}.parquet", [sample_data.encode(sample_data.images(1)[0])], [0])
    return f"parquet:{root}"


def _no_bytes(root: Path) -> str:
    sample_data.write_parquet(root / "train.parquet", [sample_data.encode(sample_data.images(1)[0]), None], [0, 1])
    return f"parquet:{root}"


def _no_images(root: Path) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1, 2], "b": [0.5, 1.0]}), root / "train.parquet")
    return f"parquet:{root}"


def _two_labels(root: Path) -> str:
    data = [sample_data.encode(image) for image in sample_data.images(2)]
    sample_data.write_parquet(root / "train.parquet", data, [0, 1], "img", "fine", False, {"coarse": [0, 0]})
    return f"parquet:{root}"


def _strange_class(root: Path) -> str:
    pixels = sample_data.images(4)
    sample_data.write_folder(root / "train", pixels, np.array([0, 0, 1, 1]), "ab")
    sample_data.write_folder(root / "test", pixels, np.array([0, 0, 1, 1]), "ac")
    return f"imagefolder:{root}"


def _one_class(root: Path) -> str:
    sample_data.write_folder(root, sample_data.images(2), np.array([0, 0]), "a")
    return f"imagefolder:{root}"


def _empty_classes(root: Path) -> str:
    (root / "a").mkdir()
    (root / "b").mkdir()
    return f"imagefolder:{root}"


def _text_class(root: Path) -> str:
    data = [sample_data.encode(image) for image in sample_data.images(2)]
    sample_data.write_parquet(root / "train.parquet", data, ["ant", "bee"], hub=False)
    sample_data.write_parquet(root / "test.parquet", data, ["ant", "owl"], hub=False)
    return f"parquet:{root}"


WRONG = {
    "parquet missing": (lambda root: f"parquet:{root / 'none'}", "does not exist"),
    "parquet empty": (lambda root: f"parquet:{root}", "has no .parquet files"),
    "not parquet": (_text, "train.parquet cannot be read as parquet"),
    "no training file": (_only_test, "no file for training (train*.parquet), only test-0.parquet, test-1.parquet"),
    "no label": (_no_label, "row 1 of the train split has no label"),
    "no bytes": (_no_bytes, "train.parquet, row 1, column img holds no image bytes"),
    "no image column": (_no_images, "has no image column; its columns are a, b"),
    "two label columns": (_two_labels, "label_column could be fine or coarse"),
    "unknown text class": (_text_class, "class 'owl' of the test split is not among the training classes"),
    "folder missing": (lambda root: f"imagefolder:{root / 'none'}", "does not exist"),
    "strange class": (_strange_class, "class 'c' is not among the training classes"),
    "one class": (_one_class, "a directory per class"),
    "empty classes": (_empty_classes, "has no images"),
    "hf missing": (lambda root: f"hf:{root / 'none'}", "cannot be loaded"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_sources(case, tmp_path):
    make, words = WRONG[case]
    root = tmp_path / "data"
    root.mkdir()
    with pytest.raises(DataError) as caught:
        open_data(make(root), {}, tmp_path / "cache")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mnist", "csv:x", "parquet:", "digits:small", ""])
def test_unknown_sources(name):
    with pytest.raises(ConfigError, match="must be digits, hf:name, parquet:path, imagefolder:path or python:"):
        open_data(name, {}, None)
