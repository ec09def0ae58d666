"""Folders of images and masks, as CamVid comes: pairs, labels, transforms, and every defect by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_prune.data import FolderSegmentation, Scenes
from lightning_prune.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from lightning_prune.errors import DataError
from tests.data.helpers import write_camvid

CLASSES = ("background", *"0123456789")
SIZE = 48
PARTS = {
    "train": Scenes("train", 4, size=SIZE),
    "val": Scenes("val", 3, size=SIZE),
    "test": Scenes("test", 2, size=SIZE),
}
VOID = 20


def write(root, parts=PARTS, void=VOID):
    return write_camvid(root, parts, void)


def ready(root, **options):
    settings = {"batch_size": 2, "classes": CLASSES, "ignore_label": VOID, "base": SIZE, "crop": 32, "num_workers": 0}
    module = FolderSegmentation(str(root), **{**settings, **options})
    module.setup()
    return module


@pytest.mark.parametrize("in_memory", [None, False])
def test_images_and_masks_are_those_of_the_files(tmp_path, in_memory):
    data = ready(write(tmp_path), in_memory=in_memory)
    assert (data.class_names, data.num_classes) == (CLASSES, 11)
    for part in ("val", "test"):
        assert len(data.parts[part]) == len(PARTS[part])
        for index in range(len(PARTS[part])):
            scene, (image, mask) = PARTS[part][index], data.parts[part][index]
            assert (mask[0] == 255).all()
            assert np.array_equal(mask[1:].numpy(), scene.mask[1:])
            expected = (torch.from_numpy(scene.image) / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
            torch.testing.assert_close(image, expected.permute(2, 0, 1))


def test_what_lies_in_memory_is_not_read_again(tmp_path):
    kept, read = (ready(write(tmp_path / str(in_memory)), in_memory=in_memory) for in_memory in (True, False))
    for in_memory in (True, False):
        for path in (tmp_path / str(in_memory)).rglob("*.png"):
            path.unlink()
    assert kept.parts["train"][0][0].shape == (3, 32, 32)
    with pytest.raises(DataError, match=r"0\.png is not a readable image"):
        read.parts["train"][0]


def test_training_images_are_cropped_and_changed_each_time(tmp_path):
    data = ready(write(tmp_path), crop=(24, 40))
    torch.manual_seed(0)
    first, again = (data.parts["train"][1] for _ in range(2))
    assert first[0].shape == again[0].shape == (3, 24, 40)
    assert not torch.equal(first[0], again[0])
    images, masks = next(iter(data.train_dataloader()))
    assert (images.shape, masks.shape, masks.dtype) == ((2, 3, 24, 40), (2, 24, 40), torch.int64)


def test_evaluation_images_of_any_size_are_resized_and_padded_together(tmp_path):
    write(tmp_path)
    Image.new("RGB", (96, 48)).save(tmp_path / "val/1.png")
    Image.new("L", (96, 48)).save(tmp_path / "valannot/1.png")
    images, masks = next(iter(ready(tmp_path, base=24).val_dataloader()))
    assert images.shape == (2, 3, 24, 48)
    assert (masks[0, :, 24:] == 255).all()
    assert (masks[1] == 0).all()


def test_folders_can_be_named_and_one_part_stands_for_another(tmp_path):
    write(tmp_path, {"train": PARTS["train"], "val": PARTS["val"]})
    data = ready(tmp_path)
    assert data.parts["test"] is data.parts["val"]
    data = ready(tmp_path, folders={"train": ("train", "trainannot"), "test": (str(tmp_path / "val"), "valannot")})
    assert len(data.parts["train"]) == 4
    assert data.parts["val"] is data.parts["test"]
    assert len(data.parts["test"]) == 3


def test_a_palette_and_other_formats_without_loss_are_read(tmp_path):
    write(tmp_path)
    mask = Image.fromarray(PARTS["val"][0].mask)
    mask.putpalette(bytes(768))
    mask.save(tmp_path / "valannot/0.png")
    path = tmp_path / "valannot/1.png"
    with Image.open(path) as image:
        image.save(path.with_suffix(".BMP"))
    path.unlink()
    (tmp_path / "val/._0.png").write_bytes(b"")  # macOS leaves such beside every file of an archive
    data = ready(tmp_path)
    assert np.array_equal(data.parts["val"][0][1].numpy(), PARTS["val"][0].mask)
    assert np.array_equal(data.parts["val"][1][1][1:].numpy(), PARTS["val"][1].mask[1:])


def test_without_an_ignored_label_every_pixel_needs_a_class(tmp_path):
    """Masks of 0 and 255, as many programs write two classes, would else be ignored where the second class is."""
    write(tmp_path, void=None)
    ready(tmp_path, ignore_label=None)
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[9] = 255
    Image.fromarray(mask).save(tmp_path / "trainannot/2.png")
    with pytest.raises(
        DataError, match=r"trainannot/2\.png: 255 is none of 11 classes, 0 to 10: add it to classes, or"
    ):
        ready(tmp_path, ignore_label=None)
    assert (ready(tmp_path, ignore_label=255, in_memory=True).parts["train"].items[2][1] == 255).sum() == SIZE


def damage(root, name, image=None, content=None):
    path = root / name
    path.unlink(missing_ok=True)
    if image is not None:
        image.save(path)
    elif content is not None:
        path.write_bytes(content)


SQUARE = np.zeros((SIZE, SIZE), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "made", "message"),
    [
        (
            "trainannot/1.png",
            {},
            r"train/1\.png has no file of that name beside it in .*trainannot \(1 of 4 have none\)",
        ),
        ("val/2.png", {}, r"valannot/2\.png has no file of that name beside it in .*val \(1 of 3"),
        (
            "valannot/0.png",
            {"image": Image.new("L", (47, 48))},
            r"valannot/0\.png is 47 x 48, but its image is 48 x 48",
        ),
        ("valannot/0.png", {"image": Image.new("RGB", (48, 48))}, r"valannot/0\.png holds colours .*\(mode RGB\)"),
        (
            "valannot/0.png",
            {"image": Image.new("I;16", (48, 48))},
            r"valannot/0\.png holds .*wide numbers \(mode I;16\)",
        ),
        (
            "valannot/0.png",
            {"image": Image.fromarray(SQUARE + 11)},
            r"0\.png: 11 is none of 11 .*, nor ignore_label, 20",
        ),
        ("valannot/0.png", {"content": b"nothing"}, r"valannot/0\.png is not a readable image"),
        ("train/3.png", {"content": b""}, r"train/3\.png is not a readable image"),
        ("train/3.jpg", {"image": Image.new("RGB", (48, 48))}, r"train holds 3\.jpg and 3\.png: remove the one"),
    ],
)
def test_defects_are_named(tmp_path, name, made, message):
    damage(write(tmp_path), name, **made)
    with pytest.raises(DataError, match=message):
        ready(tmp_path)


def test_damage_behind_the_header_is_named_at_once_or_when_it_is_read(tmp_path):
    path = write(tmp_path) / "valannot/0.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"valannot/0\.png is not a readable mask"):
        ready(tmp_path)
    data = ready(tmp_path, in_memory=False)
    with pytest.raises(DataError, match=r"valannot/0\.png is not a readable mask"):
        data.parts["val"][0]


def test_lossy_masks_are_refused(tmp_path):
    path = write(tmp_path) / "valannot/0.png"
    with Image.open(path) as image:
        image.save(path.with_suffix(".jpg"))
    path.unlink()
    with pytest.raises(DataError, match=r"valannot/0\.jpg is a JPEG, which changes numbers"):
        ready(tmp_path)


def test_missing_folders_are_named_with_the_way_out(tmp_path):
    with pytest.raises(DataError, match=r"holds no train and val: put images into train and val, .* or name folders"):
        ready(tmp_path)
    write(tmp_path, {"train": PARTS["train"]})
    with pytest.raises(DataError, match=r"holds no val: put images"):
        ready(tmp_path)
    with pytest.raises(DataError, match=r"the folder .*/masks does not exist"):
        ready(tmp_path, folders={"train": ("train", "trainannot"), "val": ("train", "masks")})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder .*/empty holds no image"):
        ready(tmp_path, folders={"train": ("train", "trainannot"), "val": ("empty", "empty")})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore_label": 10}, "ignore_label is 10, but must be a number that is no class, 11 to 255"),
        ({"ignore_label": 256}, "ignore_label is 256"),
        ({"classes": ()}, "classes must be 1 to 255 names, got 0"),
        ({"folders": {"train": ("a", "b")}}, "folders needs train, and val or test or both, got train"),
        ({"folders": {"train": ("a", "b"), "dev": ("a", "b")}}, "folders needs train, .* got train, dev"),
    ],
)
def test_settings_without_meaning_are_refused(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        ready(tmp_path, **options)
