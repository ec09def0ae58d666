"""MNIST's files, written by hand: what is read of them, how it is split, and every damage by name."""

from __future__ import annotations

import gzip

import pytest
import torch

from lightning_prune.data import IDXDataModule
from lightning_prune.errors import DataError
from tests.data.helpers import idx, write_mnist

SIZE = (6, 4)  # height, width


def pixels(count):
    """Images whose pixels count up, each from its own number on."""
    return b"".join(bytes(range(index, index + SIZE[0] * SIZE[1])) for index in range(count))


def packed(content):
    """Gzip without the time in its header: every process must collect the same tests."""
    return gzip.compress(content, compresslevel=1, mtime=0)


def write(root, **options):
    return write_mnist(root, size=SIZE, **options)


def ready(root, **options):
    settings = {"batch_size": 4, "classes": ("even", "odd"), "mean": 0.0, "std": 1.0, **options}
    module = IDXDataModule(str(root), **settings)
    module.setup()
    return module


def numbers(part):
    """Which images a part holds, by their first pixels."""
    return part.tensors[0][:, 0, 0, 0].tolist()


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_images_and_labels_are_those_of_the_files(tmp_path, ending):
    data = ready(write(tmp_path, ending=ending), val_share=0)
    image, label = data.parts["train"][3]
    assert image.shape == (1, *SIZE)
    torch.testing.assert_close(image.flatten(), torch.arange(3, 3 + 24) / 255)
    assert label == 1
    assert numbers(data.parts["test"]) == [100, 101, 102, 103]
    assert data.parts["val"] is data.parts["test"]
    assert (data.class_names, data.num_classes) == (("even", "odd"), 2)
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype, labels.dtype) == ((4, 1, *SIZE), torch.float32, torch.int64)


def test_emnists_names_labels_and_orientation(tmp_path):
    root = write(tmp_path, prefix="emnist-letters-", part="test", ending=".gz")
    for name, count in (("train", 20), ("test", 4)):
        path = root / f"emnist-letters-{name}-labels-idx1-ubyte.gz"
        path.write_bytes(packed(idx(bytes(1 + index % 2 for index in range(count)), count)))
    data = ready(root, prefix="emnist-letters-", first_label=1, transposed=True, val_share=0)
    image, label = data.parts["train"][3]
    assert label == 1
    torch.testing.assert_close(image[0], (torch.arange(3, 3 + 24) / 255).view(SIZE).T)


def test_mnist_is_padded_and_standardised_by_its_own_statistics(tmp_path):
    write(tmp_path)
    data = IDXDataModule(str(tmp_path), padding=2, classes=("even", "odd"))
    data.setup()
    assert data.normalisation == ((0.1307,), (0.3081,))
    image, _ = data.parts["test"][0]
    assert image.shape == (1, SIZE[0] + 4, SIZE[1] + 4)
    expected = torch.full((10, 8), -0.1307 / 0.3081)
    expected[2:-2, 2:-2] = (torch.arange(100, 124).view(SIZE) / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(image[0], expected)


def test_a_share_of_each_class_is_held_out_by_seed(tmp_path):
    write(tmp_path)
    first, again, other = (ready(tmp_path, val_share=0.2, seed=seed) for seed in (0, 0, 1))
    train, val = (numbers(first.parts[part]) for part in ("train", "val"))
    assert sorted(train + val) == list(range(20))
    assert sorted(number % 2 for number in val) == [0, 0, 1, 1]
    assert numbers(again.parts["val"]) == val != numbers(other.parts["val"])
    assert numbers(first.parts["test"]) == [100, 101, 102, 103]
    assert first.parts["val"].tensors[1].tolist() == [number % 2 for number in val]


def test_training_images_alone_are_shifted(tmp_path):
    data = ready(write(tmp_path), val_share=0, shift=1)
    torch.manual_seed(0)
    places = set()
    for _ in range(5):
        for number, (image, _) in enumerate(data.parts["train"]):
            found = (image[0] * 255).round() == number + 9  # row 2, column 1
            places.add(tuple(found.nonzero()[0].tolist()))
            assert found.sum() == 1
    assert places == {(row, column) for row in (1, 2, 3) for column in (0, 1, 2)}
    assert all(torch.equal(data.parts["test"][0][0], data.parts["test"][0][0]) for _ in range(5))


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, b"", r"begins with nothing, not with 00 00 08 03"),
        (IMAGES, b"<html>", r"begins with 3c 68 74 6d, not with 00 00 08 03, as bytes in 3 dimensions do"),
        (IMAGES, idx(bytes(20), 20), r"begins with 00 00 08 01, not with 00 00 08 03"),
        (IMAGES, idx(pixels(20), 20, *SIZE, kind=13), r"begins with 00 00 0d 03"),
        (IMAGES, packed(idx(pixels(20), 20, *SIZE)), r"begins with 1f 8b .*: it is packed, so its name must"),
        (IMAGES, idx(pixels(20), 20, *SIZE)[:10], r"is cut: its header has 10 of 16 bytes"),
        (IMAGES, idx(pixels(20)[:-1], 20, *SIZE), r"is cut: it has 479 instead of 480 bytes \(20 x 6 x 4\)"),
        (
            IMAGES,
            idx(b"", 2**32 - 1, 2**32 - 1, 2**32 - 1),
            r"is cut: it is 16 bytes long instead of 79228162458924105",
        ),
        (IMAGES, idx(pixels(20), 20, *SIZE) + b"x", r"goes on after 480 bytes \(20 x 6 x 4\), as its header says"),
        (IMAGES, idx(pixels(19), 19, *SIZE), r"has 19 images, but .*train-labels-idx1-ubyte has 20 labels"),
        (LABELS, idx(bytes([*[0] * 9, 7, *[1] * 10]), 20), r"label 10 of 20 is 7, but the 2 classes have 0 to 1: set"),
        ("t10k-images-idx3-ubyte", idx(bytes(4 * 25), 4, 5, 5), r"differ in size: 4 x 6 and 5 x 5"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (write(tmp_path) / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        ready(tmp_path)
    assert ("differ" in message and str(tmp_path) in str(caught.value)) or name in str(caught.value)


PACKED = packed(idx(pixels(20), 20, *SIZE))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(pixels(20), 20, *SIZE), r"ubyte\.gz is no gzip file, or damaged \(Not a gzipped file"),
        (PACKED[:-12], r"ubyte\.gz is no gzip file, or damaged \(Compressed file ended"),
        (PACKED[:-8] + bytes(8), r"ubyte\.gz is no gzip file, or damaged \(CRC check failed"),
        (PACKED[:20] + b"\xff" * 20 + PACKED[40:], r"ubyte\.gz is no gzip file, or damaged \("),
        (packed(idx(pixels(20)[:-1], 20, *SIZE)), r"ubyte\.gz is cut: it has 479 instead of 480 bytes"),
        (packed(idx(pixels(20), 20, *SIZE) + b"x"), r"ubyte\.gz goes on after 480 bytes"),
    ],
)
def test_damaged_packed_files_are_named(tmp_path, content, message):
    (write(tmp_path, ending=".gz") / f"{IMAGES}.gz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        ready(tmp_path)


def test_no_more_is_unpacked_than_the_header_promises(tmp_path):
    """A file of 100 kB that would become 100 MB, and a header that promises what no file of its length can hold."""
    path = write(tmp_path, ending=".gz") / f"{IMAGES}.gz"
    path.write_bytes(packed(idx(pixels(20), 20, *SIZE) + bytes(10**8)))
    with pytest.raises(DataError, match="goes on after 480 bytes"):
        ready(tmp_path)
    path.write_bytes(packed(idx(b"", 2**31, 2**10, 2**10)))
    with pytest.raises(DataError, match=r"is cut: it is \d\d bytes long instead of 2251799813685248 bytes"):
        ready(tmp_path)


def test_missing_files_are_named_with_the_way_out(tmp_path):
    with pytest.raises(
        DataError, match=r"holds no train-images-idx3-ubyte, with or without \.gz .* set root, and pref"
    ):
        ready(tmp_path)
    (write(tmp_path) / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"holds no t10k-labels-idx1-ubyte"):
        ready(tmp_path)
    (tmp_path / "t10k-labels.idx1-ubyte").write_bytes(idx(bytes(4), 4))  # as some archives have it
    assert ready(tmp_path).parts["test"].tensors[1].tolist() == [0] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": -1}, r"got -1, 0 and 1\.0"),
        ({"shift": -2}, r"got 0, -2 and 1\.0"),
        ({"std": 0.0}, r"std above 0, got 0, 0 and 0\.0"),
        ({"val_share": 1.0}, r"val_share must be in \[0, 1\), got 1\.0"),
        ({"val_share": 0.01}, r"val_share=0\.01 of the 10 images of class 'even' is 0"),
    ],
)
def test_settings_without_meaning_are_refused(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        ready(write(tmp_path), **options)
