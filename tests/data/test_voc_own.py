"""Sets of one's own in Pascal VOC's layout, without a year above it; and test parts of their own."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image

from lightning_prune.data import COCODetection, Scenes, VOCDetection, VOCSegmentation, write_voc
from lightning_prune.errors import DataError
from tests.data.helpers import write_coco

DIGITS = tuple("0123456789")
SIZE = 48
PARTS = {
    "train": Scenes("train", 4, size=SIZE),
    "val": Scenes("val", 3, size=SIZE),
    "test": Scenes("test", 2, size=SIZE),
}
KINDS = {VOCDetection: {"size": None, "augment": "none"}, VOCSegmentation: {"base": SIZE, "crop": SIZE}}


@pytest.fixture
def root(tmp_path):
    """What ``VOC2012`` holds, in a folder of another name."""
    for part, scenes in PARTS.items():
        folder = write_voc(scenes, tmp_path, part)
    return folder.rename(tmp_path / "digits")


def ready(root, kind=VOCDetection, **options):
    settings = {"train_on": ["train"], "evaluate_on": ["val"], "classes": DIGITS, "num_workers": 0, **KINDS[kind]}
    module = kind(str(root), 2, **{**settings, **options})
    module.setup()
    return module


def test_image_sets_without_a_year_lie_in_the_folder_itself(root):
    data = ready(root)
    for part in ("train", "val"):
        found = [target["boxes"].tolist() for _, target in data.parts[part]]
        assert found == [scene.boxes.tolist() for scene in map(PARTS[part].__getitem__, range(len(PARTS[part])))]
    masks = ready(root, VOCSegmentation)
    assert masks.parts["val"][1][1].tolist() == PARTS["val"][1].mask.tolist()
    assert masks.parts["test"] is masks.parts["val"]


def test_both_ways_to_name_image_sets_can_be_mixed(root, tmp_path):
    shutil.copytree(root, root / "VOCdevkit/VOC2012")
    assert len(ready(root, train_on=["train", "2012/val"]).parts["train"]) == 7


def test_images_of_any_format_are_found_by_their_names(root):
    for index, ending in enumerate((".jpeg", ".png", ".JPG")):
        path = root / f"JPEGImages/val_{index:06d}.jpg"
        with Image.open(path) as image:
            image.load()
        path.unlink()
        image.save(path.with_suffix(ending))
    assert [path.suffix for path, _ in ready(root).parts["val"].items] == [".jpeg", ".png", ".JPG"]
    assert ready(root).parts["val"][1][0].shape == (3, SIZE, SIZE)


def test_a_part_of_its_own_is_tested_on(root, tmp_path):
    for kind in KINDS:
        data = ready(root, kind, test_on=["test"])
        assert [len(data.parts[part]) for part in ("train", "val", "test")] == [4, 3, 2]
        assert [len(batch[1]) for batch in data.test_dataloader()] == [2]
    for part, scenes in PARTS.items():
        write_coco(scenes, tmp_path / "coco", part)
    options = {"size": None, "num_workers": 0}
    data = COCODetection(str(tmp_path / "coco"), 2, train_on="train", evaluate_on="val", test_on="test", **options)
    data.setup()
    assert [len(data.parts[part]) for part in ("train", "val", "test")] == [4, 3, 2]


def test_one_who_has_them_downloads_nothing(root, monkeypatch):
    def download(*_, **__):
        raise AssertionError

    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive", download)
    VOCDetection(str(root), train_on=["train"], evaluate_on=["nowhere"], download=True).prepare_data()


def test_what_is_missing_is_named_with_the_way_out(root):
    with pytest.raises(
        DataError, match=r"digits/nowhere does not exist\. The image set 'train' of .*/nowhere needs JPEG"
    ):
        ready(root / "nowhere")
    with pytest.raises(DataError, match=r"ImageSets/Main/dev\.txt does not exist.*named YEAR/SET, such as 2012/train"):
        ready(root, evaluate_on=["dev"])
    with pytest.raises(
        DataError, match=r"Segmentation/dev\.txt does not exist.* needs JPEGImages, SegmentationClass and"
    ):
        ready(root, VOCSegmentation, evaluate_on=["dev"])
    (root / "Annotations/val_000001.xml").unlink()
    with pytest.raises(DataError, match=r"Annotations/val_000001\.xml does not exist \(1 of 3 files"):
        ready(root)
    (root / "JPEGImages/train_000002.jpg").unlink()
    with pytest.raises(DataError, match=r"Main/train\.txt, line 3: .*JPEGImages holds no image called train_000002"):
        ready(root)
    Image.new("RGB", (SIZE, SIZE)).save(root / "JPEGImages/train_000001.png")
    with pytest.raises(DataError, match=r"JPEGImages holds train_000001\.jpg and train_000001\.png"):
        ready(root)
    (root / "ImageSets/Main/val.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"val\.txt is not a readable text file"):
        ready(root, train_on=["val"])
